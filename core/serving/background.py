"""Work in a thread of its own, for as long as somebody waits for it.

A plugin's code may never return, and Python can't end a thread. What takes too long is left behind: its thread is a
daemon, and what it gives in the end is dropped.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

_log = logging.getLogger("drivetrain")

T = TypeVar("T")

_LOOK_SECONDS = 0.1
"""How often whoever waits looks whether the result is still wanted."""


class Work(Future[T]):
    """What comes of a daemon thread's work."""

    thread: threading.Thread


def start(work: Callable[[], T], name: str) -> Work[T]:
    """Run ``work`` in a daemon thread called ``name``."""
    future: Work[T] = Work()

    def run() -> None:
        try:
            result = work()
        except BaseException as error:  # handed to whoever waits
            future.set_exception(error)
        else:
            future.set_result(result)

    future.thread = threading.Thread(target=run, name=name, daemon=True)
    future.thread.start()
    return future


def result_by(deadline_seconds: float, future: Work[T], name: str, is_wanted: Callable[[], bool] = lambda: True) -> T:
    """The result of ``future`` if it is there by ``deadline_seconds`` of ``time.monotonic``. Raises what it raises.

    Raises LateError otherwise, also as soon as ``is_wanted`` says no or the wait itself is broken off; what comes
    afterwards is dropped, and logged.
    """
    try:
        while not (done := wait([future], _slice(deadline_seconds)).done):
            if time.monotonic() >= deadline_seconds or not is_wanted():
                raise LateError(name)
    except BaseException:  # too late, or an interrupt from the keyboard
        future.add_done_callback(lambda late: _drop(late, name))
        raise
    # It has only to let go of what it held: a daemon thread that frees tensors while the interpreter ends aborts the
    # process.
    future.thread.join()
    return done.pop().result()


def _slice(deadline_seconds: float) -> float:
    return min(_LOOK_SECONDS, max(0.0, deadline_seconds - time.monotonic()))


class LateError(Exception):
    """Work did not end in time; its thread is left behind."""


def _drop(future: Future[T], name: str) -> None:
    error = future.exception()
    _log.warning("%s ended too late, %s; it is dropped", name, "well" if error is None else f"with {error!r}")
