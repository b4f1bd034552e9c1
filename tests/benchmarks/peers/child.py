"""The harness's side of the protocol: one driver as a child process that can be stopped while another is timed."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

ANSWER_SECONDS = 1800.0
_CLOSE_SECONDS = 10.0
_TAIL_LINES = 8


class PeerError(Exception):
    """A peer could not be installed, started or run; the message ends with the last lines that it wrote."""


class Child:
    """A driver process and everything that it starts, as one process group.

    command: the interpreter and the script.
    env:     added to this process's environment.
    log:     the file that standard error goes to; its last lines are part of every failure.
    """

    def __init__(self, command: Sequence[str | Path], log: Path, env: Mapping[str, str] | None = None) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log
        self._is_closed = False
        self._answers: queue.SimpleQueue[str] = queue.SimpleQueue()
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={**os.environ, **(env or {})},
                text=True,
                start_new_session=True,
            )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def ask(self, do: str, *, answer_seconds: float = ANSWER_SECONDS, **fields: Any) -> dict[str, Any]:
        """What the driver answers to one request. Raises PeerError when it fails, ends or says nothing in time."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **fields}) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise PeerError(self._ended(do)) from error
        line = self._wait_for_answer(do, answer_seconds)
        try:
            answer = json.loads(line)
            if "error" in answer:
                raise PeerError(self._with_tail(f"{do}: {answer['error']}"))
            return dict(answer["ok"])
        except (ValueError, KeyError, TypeError) as error:
            raise PeerError(self._with_tail(f"{do}: answered {line[:200]!r}, which is not the protocol")) from error

    def pause(self) -> None:
        """Stop the whole group: a peer that waits actively would slow down the one that is timed."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def close(self) -> None:
        """End the group: asked first, killed if it does not. Safe to call twice, and after a failure."""
        if self._is_closed:
            return
        self.resume()
        if self._process.poll() is None:
            try:
                self.ask("close", answer_seconds=_CLOSE_SECONDS)
                self._process.wait(timeout=_CLOSE_SECONDS)
            except (PeerError, subprocess.TimeoutExpired) as error:
                # What it answered before stands.
                print(f"a peer did not end when asked, and is killed: {error}", file=sys.stderr)
        self._signal(signal.SIGKILL)  # what it started and left behind
        self._process.wait()
        self._is_closed = True
        self._reader.join(timeout=_CLOSE_SECONDS)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):  # a request that a dead process did not read
                    pipe.close()

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)

    def _wait_for_answer(self, do: str, answer_seconds: float) -> str:
        deadline = time.monotonic() + answer_seconds
        while time.monotonic() < deadline:
            has_ended = self._process.poll() is not None
            if has_ended:
                self._reader.join(timeout=1)
            try:
                return self._answers.get(timeout=0.0 if has_ended else 0.2)
            except queue.Empty:
                if has_ended:
                    raise PeerError(self._ended(do)) from None
        raise PeerError(self._with_tail(f"{do}: no answer within {answer_seconds:.0f} seconds"))

    def _ended(self, do: str) -> str:
        return self._with_tail(f"{do}: the process ended with status {self._process.wait()}")

    def _with_tail(self, what: str) -> str:
        tail = last_lines(self._log)
        return f"{what}\n{tail}" if tail else what

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):  # all of it is gone
            os.killpg(self._process.pid, number)


def last_lines(log: Path, count: int = _TAIL_LINES) -> str:
    """The last lines of a log that hold anything."""
    lines = [line.rstrip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    return "\n".join([line for line in lines if line][-count:])
