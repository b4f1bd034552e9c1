"""Where steps run: one after the other, in the order in which they were given.

A lane decides only *when* the engine's thread goes on: :class:`InlineLane` runs a step before it returns, which on a
device that queues its work means that the work is queued; :class:`ThreadLane` hands it to a thread of its own, so that
the next step can be prepared while this one computes on the processor.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

T = TypeVar("T")


class Outcome(Generic[T]):
    """What a piece of work gives, once it has run."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._work: Callable[[], T] | None = work
        self._done = threading.Event()
        self._value: T | None = None
        self._error: BaseException | None = None

    @classmethod
    def failed(cls, error: BaseException) -> Outcome[T]:
        """The outcome of work that could not even begin."""

        def give_up() -> T:
            raise error

        outcome = cls(give_up)
        outcome.run()
        return outcome

    def run(self) -> None:
        """Do the work; what it raises is kept for who waits."""
        assert self._work is not None
        try:
            self._value = self._work()
        except BaseException as error:
            self._error = error
        self._work = None
        self._done.set()

    def wait(self) -> T:
        """The work's result; raises what the work raised."""
        self._done.wait()
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[return-value]


class Lane(Protocol):
    """Runs work in order."""

    def run(self, work: Callable[[], T]) -> Outcome[T]:
        """Start ``work`` once all that came before has run. What it raises comes out of ``Outcome.wait``."""

    def close(self, timeout_seconds: float) -> None:
        """No more work comes. Waits until what was given has run, or for so long."""


class InlineLane:
    """Runs work in the caller's thread, at once."""

    def run(self, work: Callable[[], T]) -> Outcome[T]:
        outcome = Outcome(work)
        outcome.run()
        return outcome

    def close(self, timeout_seconds: float) -> None:
        pass


class ThreadLane:
    """Runs work in one thread of its own, which starts with the first piece."""

    def __init__(self) -> None:
        self._inbox: queue.SimpleQueue[Outcome[object] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def run(self, work: Callable[[], T]) -> Outcome[T]:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="drivetrain-model", daemon=True)
            self._thread.start()
        outcome = Outcome(work)
        self._inbox.put(outcome)  # type: ignore[arg-type]
        return outcome

    def close(self, timeout_seconds: float) -> None:
        thread, self._thread = self._thread, None
        if thread is not None:
            self._inbox.put(None)
            # A daemon thread that frees tensors while the interpreter ends aborts the process.
            thread.join(timeout_seconds)

    def _run(self) -> None:
        import torch

        # OpenMP keeps the thread count for each thread: take over what the platform set.
        torch.set_num_threads(torch.get_num_threads())
        while (outcome := self._inbox.get()) is not None:
            outcome.run()
            del outcome  # what it gave is not kept until the next one comes
