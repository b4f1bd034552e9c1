"""A server to measure: one that runs already, or one started here for as long as it is needed."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import yaml

from drivetrain.config import Settings
from drivetrain.contracts.kinds import KINDS
from drivetrain.errors import ConfigError, DrivetrainError

_START_SECONDS = 600.0


@contextlib.contextmanager
def running_server(settings: Settings, url: str | None) -> Iterator[str]:
    """The address of a server: ``url`` itself, or a child process with ``settings`` on a free port.

    The child is told to drain at the end. Raises ConfigError without a model, DrivetrainError when it does not start.
    """
    if url is not None:
        yield url.rstrip("/")
        return
    if settings.model is None:
        raise ConfigError("neither a server nor a model is named", hint="Give --url of a server, or --model NAME.")
    with tempfile.TemporaryDirectory(prefix="drivetrain-bench-") as folder:
        config = Path(folder, "serve.yaml")
        config.write_text(yaml.safe_dump(as_tree(settings)), encoding="utf-8")
        log = Path(folder, "serve.log")
        with log.open("wb") as output:
            command = [sys.executable, "-m", "drivetrain", "serve", "--config", str(config), "--port", "0"]
            child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            yield _wait_for_address(child, config, log)
        finally:
            _stop(child)


def as_tree(settings: Settings) -> dict[str, object]:
    """Settings as the YAML file that would give them."""
    tree: dict[str, object] = {"model": settings.model}
    for kind, request in settings.parts.items():
        tree[KINDS[kind].key] = {"name": request.name, **request.options}
    tree["engine"] = settings.engine.model_dump(exclude_unset=True)
    if settings.allow is not None:
        tree["plugins"] = {"allow": list(settings.allow)}
    return tree


def _wait_for_address(child: subprocess.Popen[bytes], config: Path, log: Path) -> str:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        text = log.read_text(encoding="utf-8", errors="replace")
        match = re.search(r"^Serving .* at (http://\S+)", text, re.MULTILINE)
        if match:
            return match[1]
        if child.poll() is not None:
            said = re.findall(r"^error: (.*)", text, re.MULTILINE) or text.strip().splitlines() or ["nothing"]
            # The file that names the settings is ours; the user wrote them elsewhere.
            reason = re.sub(rf"{re.escape(str(config))}(:\d+)?", "settings", said[-1])
            raise DrivetrainError(f"the server ended with status {child.returncode} and said: {reason}")
        time.sleep(0.05)
    raise DrivetrainError(f"the server did not start within {_START_SECONDS:.0f} seconds")


def _stop(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        child.send_signal(signal.SIGTERM)
        try:
            child.wait(timeout=60)
        except subprocess.TimeoutExpired:
            os.kill(child.pid, signal.SIGKILL)
            child.wait()
