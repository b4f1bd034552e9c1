"""The ``drivetrain`` command, called in this process or run as a child, and a model small enough for it."""

from __future__ import annotations

import json
import os
import re
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from support.tiny_models import save_tiny

COMMAND = [sys.executable, "-W", "error", "-m", "drivetrain"]
ONE_THREAD = ("--set", "platform.threads=1")
MAX_MODEL_LEN = 2048


def make_tiny_folder(folder: Path) -> Path:
    """A random model that loads in well under a second and takes prompts of 2048 tokens."""
    save_tiny("llama", folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"max_position_embeddings": MAX_MODEL_LEN}))
    return folder


def run_command(*arguments: object, stdin: str | bytes = "", timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """The command as a child process, to its end."""
    data = stdin.encode() if isinstance(stdin, str) else stdin
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)], input=data, capture_output=True, timeout=timeout, check=False
    )
    out, err = (text.decode(errors="replace") for text in (done.stdout, done.stderr))
    return subprocess.CompletedProcess(done.args, done.returncode, out, err)


def processor_seconds(*command: str) -> float:
    """User and system time of Python with these arguments, which must succeed: unlike time on the wall, it is about the
    same on a busy machine."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    # One thread: threads that wait for each other on a busy machine spin, and spinning counts.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *command], check=True, capture_output=True, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@contextmanager
def child(*arguments: object, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """The command as a child process, killed at the end if it still runs."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL} | options
    process = subprocess.Popen([*COMMAND, *map(str, arguments)], **options)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def read_until(stream: Any, wanted: bytes, timeout: float = 90) -> bytes:
    """What ``stream`` says up to and including ``wanted``, or to its end."""
    descriptor = stream if isinstance(stream, int) else stream.fileno()
    give_up = time.monotonic() + timeout
    seen = b""
    while wanted not in seen:
        ready, _, _ = select.select([descriptor], [], [], max(0.0, give_up - time.monotonic()))
        assert ready, f"{wanted!r} did not come within {timeout} s; instead: {seen!r}"
        try:
            part = os.read(descriptor, 65536)
        except OSError:  # the far end of a pseudo-terminal is closed
            part = b""
        if not part:
            break
        seen += part
    return seen


class ServedChild:
    """``drivetrain serve`` in a process of its own, on a free port."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process = process
        self.log = log
        line = read_until(process.stdout, b"\n").decode()
        match = re.match(r"Serving .* at (http://\S+)", line)
        assert match, f"{line!r} {self.errors()}"
        self.url = match[1]

    def errors(self) -> str:
        """What the server has written to standard error."""
        return self.log.read_text(errors="replace")

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, **({"timeout": 60} | options))

    def get(self, path: str) -> Any:
        return httpx.get(self.url + path, timeout=60)

    def stop(self, number: int = signal.SIGTERM, timeout: float = 60) -> int:
        """Send a signal and wait for the end; returns the exit status."""
        self.process.send_signal(number)
        return self.process.wait(timeout)


@contextmanager
def served_child(folder: Path, log: Path, *arguments: object) -> Iterator[ServedChild]:
    """A server of the model in ``folder``; its standard error goes to ``log``."""
    with (
        log.open("wb") as errors,
        child("serve", "--model", folder, "--port", 0, *ONE_THREAD, *arguments, stderr=errors) as process,
    ):
        yield ServedChild(process, log)
