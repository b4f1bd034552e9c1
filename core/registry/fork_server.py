"""Programs that examine one plugin each, every one in a process of its own that has torch when it starts.

A server process is started from nothing, imports once what all examinations need, and forks for each of them: importing
torch takes seconds, forking a few milliseconds. This file is both ends of it: the class that a caller uses, and, run by
file, the program of the server.

What a program is: a module of this package with ``prepare()``, called once in the server, and ``run(request, write)``,
called in each fork. Each line that is written is a JSON object; standard output and error are left to the plugin, so
that what it prints is seen and not mixed up with an answer.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, NoReturn

_START_SECONDS = 60.0
_END_SECONDS = 5.0
_ANSWERS, _OUTPUT, _ERRORS = "answers", "output", "errors"
_READY = "ready"


@dataclass(frozen=True)
class Ended:
    """How the process of one examination ended.

    status:      its exit status, negative for a signal; None when it was killed at the time limit.
    has_orphans: it ended by itself and left processes behind, which were killed.
    lines:       the JSON objects that it wrote.
    """

    status: int | None
    has_orphans: bool
    lines: tuple[Mapping[str, Any], ...]
    output: str
    errors: str

    @property
    def stage(self) -> str:
        """The last step that was begun."""
        return next((str(line["stage"]) for line in reversed(self.lines) if "stage" in line), "start")

    def answer(self, key: str) -> Mapping[str, Any] | None:
        """The line that holds ``key``."""
        return next((line for line in self.lines if key in line), None)


class ForkServer:
    """One server and its forks, one at a time. It is started by the first call, and ends with this process.

    Forks of a process that has called before share the server; they must not call at the same time.

    program:     name of the module that is run.
    is_warm:     torch is imported beforehand: worth it for more than a few examinations.
    environment: of the server, in place of this process's; ``folder`` likewise its current folder.
    """

    def __init__(
        self,
        program: str,
        *,
        is_warm: bool,
        environment: Mapping[str, str] | None = None,
        folder: str | None = None,
    ) -> None:
        self._program = program
        self._is_warm = is_warm
        self._environment = environment
        self._folder = folder
        self._server: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def call(self, request: Mapping[str, Any], time_limit_seconds: float) -> Ended:
        """Examine in a new fork, which is killed at the time limit with all that it started."""
        if self._server is not None and self._has_hung_up():
            self.close()
        if self._server is None:
            self._server = self._start()
        with tempfile.TemporaryDirectory(prefix="drivetrain-fork-") as name:
            folder = Path(name)
            self._send({"folder": name, "sys_path": sys.path, "request": request})
            deadline = time.monotonic() + time_limit_seconds
            group = self._read(deadline)
            status = None if group is None else self._read(deadline)
            is_late = status is None
            if group is None:  # the machine is so busy that not even the fork has begun
                self.close(at_once=True)
                has_orphans = False
            else:
                has_orphans = _kill_group(int(group)) and not is_late
                if is_late and self._read(time.monotonic() + _END_SECONDS) is None:
                    self.close(at_once=True)
            texts = {kind: _text_of(folder / kind) for kind in (_ANSWERS, _OUTPUT, _ERRORS)}
        lines = tuple(json.loads(line) for line in texts[_ANSWERS].splitlines())
        return Ended(None if status is None else int(status), has_orphans, lines, texts[_OUTPUT], texts[_ERRORS])

    def close(self, *, at_once: bool = False) -> None:
        """End the server. It is started anew by the next call."""
        server, self._server = self._server, None
        if server is None:
            return
        assert server.stdin is not None
        assert server.stdout is not None
        if at_once:
            server.kill()
        with server.stdout:
            server.stdin.close()
            try:
                server.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()

    def _start(self) -> subprocess.Popen[bytes]:
        """A server that is ready. One that ends or hangs while it imports torch gives way to one that does not: each
        plugin that wants torch will then show what is wrong with it."""
        for is_warm in (True, False) if self._is_warm else (False,):
            # -P keeps the current folder, where a checkout may lie, from shadowing packages.
            self._server = subprocess.Popen(
                [sys.executable, "-P", __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=self._environment,
                cwd=self._folder,
                start_new_session=True,
            )
            self._send({"sys_path": sys.path, "program": self._program, "is_warm": is_warm})
            if self._read(time.monotonic() + _START_SECONDS) == _READY:
                return self._server
            self.close(at_once=True)
        from drivetrain.errors import DrivetrainError  # not above: the server imports nothing before it has its path

        raise DrivetrainError("a process for examining plugins could not be started", found=sys.executable)

    def _has_hung_up(self) -> bool:
        """Whether the server is gone. Asked of the pipe: in a fork of the process that has started it, the server is no
        child, and ``poll()`` takes it for dead."""
        assert self._server is not None
        assert self._server.stdout is not None
        waiting = select.poll()
        waiting.register(self._server.stdout, 0)
        return bool(waiting.poll(0))

    def _send(self, line: Mapping[str, Any]) -> None:
        assert self._server is not None
        assert self._server.stdin is not None
        self._server.stdin.write((json.dumps(line) + "\n").encode())
        self._server.stdin.flush()

    def _read(self, deadline: float) -> str | None:
        """The next line that the server says; None when there is none by ``deadline``, or the server has ended."""
        assert self._server is not None
        assert self._server.stdout is not None
        line = b""
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([self._server.stdout], [], [], max(0.0, deadline - time.monotonic()))
            part = os.read(self._server.stdout.fileno(), 1) if ready else b""
            if not part:
                return None
            line += part
        return line.decode().strip()


def _kill_group(group: int) -> bool:
    """Kill what is left of a process group; True when something was."""
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def _text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


# --- the server ------------------------------------------------------------------------------------------------------


def main() -> None:
    """Serve until standard input ends: a fork for each line that it has."""
    hello = json.loads(sys.stdin.buffer.readline())
    # The caller's search path, before anything of this project is imported: both must see the same plugins.
    sys.path[:] = hello["sys_path"]
    program = importlib.import_module(hello["program"])
    end: Callable[[int], NoReturn] = importlib.import_module("drivetrain.ending").end_process
    if hello["is_warm"]:
        program.prepare()
    gc.freeze()  # what lies in memory now stays shared with the forks
    _say(_READY)
    while line := sys.stdin.buffer.readline():
        child = os.fork()
        if child == 0:
            _run(program, end, **json.loads(line))
        _, status = os.waitpid(child, 0)
        _say(os.waitstatus_to_exitcode(status))


def _run(
    program: ModuleType,
    end: Callable[[int], NoReturn],
    folder: str,
    sys_path: list[str],
    request: Mapping[str, Any],
) -> NoReturn:
    """What a fork does: the program, in a session of its own, with streams that lead to files."""
    status = 1
    try:
        os.setsid()
        _say(os.getpid())
        sys.path[:] = sys_path
        answers = _open_streams(Path(folder))
        program.run(request, lambda told: os.write(answers, (json.dumps(told) + "\n").encode()))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        end(status)


def _open_streams(folder: Path) -> int:
    """Standard input is empty, output and errors go to files; returns the file for answers."""
    files = [folder / _OUTPUT, folder / _ERRORS, folder / _ANSWERS]
    output, errors, answers = (os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600) for file in files)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for descriptor, standard in ((nothing, 0), (output, 1), (errors, 2)):
        os.dup2(descriptor, standard)
        os.close(descriptor)
    return answers


def _say(what: object) -> None:
    os.write(1, f"{what}\n".encode())


if __name__ == "__main__":
    main()
