"""The thread that steps an engine, with an inbox before it and one receiver a request behind it.

Everything that drives an engine, synchronous or asynchronous, does so through :class:`EngineLoop`; only how chunks are
received differs.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import secrets
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from drivetrain.assembly import ServingStack
from drivetrain.collecting import collect_as_usual
from drivetrain.errors import (
    DrainingError,
    DrivetrainError,
    InvalidRequestError,
    QueueFullError,
    RequestFailedError,
    SwapError,
)
from drivetrain.registry import PartRequest
from drivetrain.serving.background import LateError, Work, result_by, start
from drivetrain.serving.request import Request
from drivetrain.serving.swap import (
    DEFAULT_PROBATION_STEPS,
    PreparedSwap,
    SwapOutcome,
    SwapReport,
    commit,
    prepare,
    put_to_the_vote,
    wait_for,
)
from drivetrain.serving.types import Chunk, FinishReason, GenerationRequest, PromptInfo
from drivetrain.serving.vote import Voter

if TYPE_CHECKING:
    import torch

_log = logging.getLogger("drivetrain")


@dataclass(frozen=True)
class Health:
    """Whether the loop makes progress, not just whether it lives.

    state:                  idle, busy, stalled (a step takes longer than ``stall_seconds``), draining or failed.
    seconds_since_progress: since the loop last finished a step or had nothing to do.
    error:                  why it failed.
    """

    state: str
    running: int
    waiting: int
    seconds_since_progress: float
    error: str | None = None

    @property
    def ok(self) -> bool:
        return self.state in ("idle", "busy")


@dataclass
class Ticket:
    """A request on its way through the loop.

    arrival_seconds: when it was submitted, by the engine's clock.
    receive:         called in the loop's thread with each step's chunks of this request.
    open_indexes:    the sequences that have not given their last chunk.
    """

    request_id: str
    request: GenerationRequest
    prompt: tuple[int, ...]
    arrival_seconds: float
    receive: Callable[[Ticket, list[Chunk]], None]
    sequences: list[Request] = field(default_factory=list)
    prompt_info: PromptInfo | None = None
    open_indexes: set[int] = field(init=False)

    def __post_init__(self) -> None:
        self.open_indexes = set(range(self.request.params.n))


class EngineLoop:
    """Steps an engine in a thread of its own. ``submit`` and ``cancel`` may be called from any thread.

    peers: the other ranks that a swap asks, by name; none where one process serves.
    """

    def __init__(self, stack: ServingStack, peers: Mapping[str, Voter] | None = None) -> None:
        self.stack = stack
        self.peers = dict(peers or {})
        self.engine = stack.engine
        self._wake = threading.Condition()
        self._inbox: deque[Callable[[], None]] = deque()
        self._num_unread = 0
        self._tickets: dict[str, Ticket] = {}
        self._ids = f"req-{secrets.token_hex(4)}"  # no request has the name of one before a restart
        self._numbers = itertools.count()
        self._is_draining = False
        self._is_stopping = False
        self._failure: str | None = None
        self._thread: threading.Thread | None = None
        self._swapping = threading.Lock()
        self._preparing: list[Work[PreparedSwap]] = []
        self._last_progress = time.monotonic()

    # --- life ------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the thread. Calling it again does nothing.

        Who ends the interpreter without :meth:`shutdown` gets it then: a daemon thread that computes while the
        interpreter comes apart aborts the process.
        """
        with self._wake:
            if self._thread is None:
                atexit.register(self.shutdown)
                self._thread = threading.Thread(target=self._run, name="drivetrain-engine", daemon=True)
                self._thread.start()

    def refuse_new(self) -> None:
        """From here on, ``submit`` raises DrainingError."""
        self._is_draining = True

    @property
    def is_empty(self) -> bool:
        return not self._inbox and not self._tickets

    def shutdown(self) -> None:
        """End what is left as cancelled and stop the thread. Safe to call twice.

        A step that does not return within ``stall_seconds`` is left to itself, and all that is left ends with an error.
        """
        atexit.unregister(self.shutdown)
        with self._wake:
            self._is_draining = True
            self._is_stopping = True
            self._wake.notify()
        if self._thread is None:
            self._end_everything(None)
        elif self._thread is not threading.current_thread():
            self._thread.join(self.engine.settings.stall_seconds)
            if self._thread.is_alive():
                _log.critical("a step does not return; the engine's thread is left behind")
                self._give_up("the engine was stopped while a step did not return")

    def health(self) -> Health:
        since = 0.0 if self.is_empty else time.monotonic() - self._last_progress
        running, waiting = self.engine.num_running, self.engine.num_waiting
        if self._failure is not None:
            state = "failed"
        elif self._is_draining:
            state = "draining"
        elif self.is_empty:
            state = "idle"
        else:
            state = "stalled" if since > self.engine.settings.stall_seconds else "busy"
        return Health(state, running, waiting, since, self._failure)

    # --- requests --------------------------------------------------------------------------------------------------

    def submit(
        self,
        request: GenerationRequest,
        receive: Callable[[Ticket, list[Chunk]], None],
        *,
        is_bounded: bool = True,
    ) -> Ticket:
        """Check, tokenize and queue a request. Raises a RequestError; after that, every sequence ends with a chunk that
        has a finish reason, whatever happens.

        is_bounded: whether ``max_waiting`` applies.
        """
        arrival_seconds = self.engine.now()
        self._check_open()
        _check_timing(request)
        prompt = self._token_ids(request)
        self.engine.check(request, prompt)
        ticket = Ticket(f"{self._ids}-{next(self._numbers)}", request, prompt, arrival_seconds, receive)
        with self._wake:
            self._check_open()  # again: now nothing can close before the request is in the inbox
            if self.is_empty:
                self._last_progress = time.monotonic()  # until now there was nothing to do
            waiting = self.engine.num_waiting + self._num_unread
            if is_bounded and waiting >= self.engine.settings.max_waiting:
                raise QueueFullError(
                    f"{waiting} requests wait already, and engine.max_waiting is {self.engine.settings.max_waiting}",
                    hint="Try again later.",
                )
            self._num_unread += 1
            self._tickets[ticket.request_id] = ticket
            self._post(lambda: self._take(ticket))
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """End a request that is still under way; its sequences end as ``cancelled``. Safe to call at any time."""
        with self._wake:
            if ticket.request_id in self._tickets:
                self._post(lambda: self._deliver(self.engine.cancel(ticket.request_id)))

    def _check_open(self) -> None:
        if self._failure is not None:
            raise RequestFailedError("the engine has failed", hint=f"Its error was: {self._failure}")
        if self._is_stopping:
            raise DrainingError("the engine was closed and takes no new requests", hint="Send it to another one.")
        if self._is_draining:
            raise DrainingError("the server is draining and takes no new requests", hint="Send it to another replica.")

    def _post(self, command: Callable[[], None]) -> None:
        self._inbox.append(command)
        self._wake.notify()

    def _token_ids(self, request: GenerationRequest) -> tuple[int, ...]:
        if isinstance(request.prompt, str):
            return tuple(self.stack.tokenizer.encode(request.prompt, add_special_tokens=request.add_special_tokens))
        return tuple(request.prompt)

    # --- exchanging parts ------------------------------------------------------------------------------------------

    def swap(
        self,
        requests: Mapping[str, PartRequest],
        *,
        dry_run: bool = False,
        probation_steps: int = DEFAULT_PROBATION_STEPS,
        timeout_seconds: float | None = None,
    ) -> SwapReport:
        """Exchange parts of the running engine; see ``drivetrain.serving.swap``. Blocks the caller, not the loop.

        requests:        kind -> what is asked for. One swap at a time; a second caller is told so.
        timeout_seconds: for all of it, the probation included; by default ``engine.swap_timeout_seconds``.

        Raises SwapError, PluginError or ConfigError with nothing changed.
        """
        limit = self.engine.settings.swap_timeout_seconds if timeout_seconds is None else timeout_seconds
        _check_limit(limit)
        _check_swap(dry_run, probation_steps)
        deadline = time.monotonic() + limit
        if not self._swapping.acquire(blocking=False):
            raise SwapError("another swap is under way", hint="Try again when it has ended.")
        try:
            self._check_open()
            if self.engine.probation is not None:
                raise SwapError("the last swap was given up and is not undone yet", hint="Try again in a moment.")
            prepared = self._prepare(requests, dry_run, limit, deadline)
            if dry_run:
                return _estimate(prepared, self.engine.epoch)
            put_to_the_vote(self.stack, prepared, self.peers, deadline)
            with self._wake:
                self._post(lambda: self._commit(prepared, probation_steps))
            report = wait_for(prepared, lambda: self._thread is not None and self._thread.is_alive(), deadline)
        finally:
            self._swapping.release()
        self._tell(report)
        return report

    def _tell(self, report: SwapReport) -> None:
        for kind, (old, new) in report.changes.items():
            self.engine.metrics.swapped(kind, report.outcome.value, self.engine.epoch)
            self.engine.notify("swap_done", kind=kind, old=old, new=new, epoch=report.epoch)

    def _commit(self, prepared: PreparedSwap, probation_steps: int) -> None:
        self._deliver(self.engine.settle())
        commit(self.stack, prepared, probation_steps, self._tell)

    def _prepare(
        self, requests: Mapping[str, PartRequest], dry_run: bool, limit_seconds: float, deadline_seconds: float
    ) -> PreparedSwap:
        """The new parts, made in a thread of its own: whatever hangs in their code is left behind with it."""

        def work() -> PreparedSwap:
            _enter_thread(self.engine.runner.device)
            return prepare(self.stack, requests, dry_run=dry_run)

        what = f"preparing {', '.join(requests) or 'nothing'}"
        preparing = start(work, "drivetrain-swap")
        self._preparing = [*(other for other in self._preparing if other.thread.is_alive()), preparing]
        try:
            return result_by(deadline_seconds, preparing, what, lambda: not self._is_stopping)
        except LateError as error:
            if self._is_stopping:
                raise SwapError("the engine stopped before the swap was finished; nothing has changed") from error
            raise SwapError(
                f"{what} took longer than {limit_seconds:g} s and was given up; nothing has changed",
                hint="Where the parts need longer, set engine.swap_timeout_seconds. What a hanging part holds is free "
                "again only when it returns.",
            ) from error
        except DrivetrainError:
            raise
        except Exception as error:  # the new part's code, or memory that is not there
            raise SwapError(f"the new parts could not be prepared: {type(error).__name__}: {error}") from error

    # --- the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        _enter_thread(self.engine.runner.device)
        collect_as_usual()
        try:
            while self._wait_for_work():
                self._drain_inbox()
                if self.engine.has_work:
                    self._deliver(self.engine.step())
                if not self.engine.has_work:
                    self.engine.end_probation()  # nothing runs that could show a fault, or will before the next request
                self._last_progress = time.monotonic()
        except BaseException as error:
            _log.critical("the engine's loop failed", exc_info=error)
            self._failure = f"{type(error).__name__}: {error}"
            self._end_everything(f"the engine failed: {self._failure}")
            if not isinstance(error, Exception):
                raise
        else:
            self._end_everything(None)

    def _wait_for_work(self) -> bool:
        """Sleep until there is something to do; False when it is time to stop."""
        with self._wake:
            if not self._inbox and not self.engine.has_work:
                self.engine.metrics.levels(0, 0, self.engine.kv.usage)
            while not self._inbox and not self.engine.has_work and not self._is_stopping:
                self._wake.wait()
                self._last_progress = time.monotonic()
            return not self._is_stopping

    def _drain_inbox(self) -> None:
        # Only what is there now: a flood of arrivals must not keep the running requests from their next step.
        for _ in range(len(self._inbox)):
            self._inbox.popleft()()

    def _take(self, ticket: Ticket) -> None:
        with self._wake:
            self._num_unread -= 1
        try:
            ticket.sequences = self.engine.add(ticket.request_id, ticket.request, ticket.prompt, ticket.arrival_seconds)
        except Exception as error:  # a tokenizer's or a scheduler's code; only this request ends with it
            _log.error("request %s could not be taken", ticket.request_id, exc_info=error)
            self._deliver(_failed(ticket, f"the engine could not take the request: {type(error).__name__}: {error}"))

    def _deliver(self, chunks: Sequence[Chunk]) -> None:
        grouped: dict[str, list[Chunk]] = {}
        for chunk in chunks:
            grouped.setdefault(chunk.request_id, []).append(chunk)
        for request_id, own in grouped.items():
            ticket = self._tickets.get(request_id)
            if ticket is None:
                continue  # given up by shutdown, and then the step did return
            if ticket.prompt_info is None and ticket.sequences:
                # The first chunk comes with the first token: from here on nothing about the prompt changes.
                ticket.prompt_info = self.engine.prompt_info(ticket.sequences)
            for chunk in own:
                if chunk.finish_reason is not None:
                    ticket.open_indexes.discard(chunk.index)
            if not ticket.open_indexes:
                self._tickets.pop(request_id, None)
            try:
                ticket.receive(ticket, own)
            except Exception as error:  # the caller's code; nobody else's request may suffer from it
                _log.error("the receiver of %s failed; the request is cancelled", request_id, exc_info=error)
                self.cancel(ticket)

    def _end_everything(self, error: str | None) -> None:
        with self._wake:
            self._is_draining = True
            try:
                if error is None:
                    self._drain_inbox()
                    self._deliver(self.engine.cancel_all())
                else:
                    self._deliver(self.engine.fail_all(error))
            except Exception as fault:
                # The books themselves are broken; what matters now is that nobody waits for ever.
                _log.critical("the engine could not end its requests", exc_info=fault)
                error = error or f"the engine could not stop: {type(fault).__name__}: {fault}"
            self._give_up(error or "the engine was stopped")
        self.engine.close()

    def _give_up(self, message: str) -> None:
        """End what still has no end, without touching the engine."""
        with self._wake:
            self._inbox.clear()
            for ticket in list(self._tickets.values()):
                self._deliver(_failed(ticket, message))

    def stats(self) -> dict[str, Any]:
        """The engine's counters as plain numbers."""
        return self.engine.metrics.snapshot()


def _enter_thread(device: torch.device) -> None:
    """Take over what the platform set when it was activated: OpenMP keeps the number of threads for each thread, and
    drivers the current device."""
    import torch

    torch.set_num_threads(torch.get_num_threads())
    if device.type != "cpu":
        torch.get_device_module(device).set_device(device)


def _check_limit(seconds: object) -> None:
    is_number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    if not (is_number and 0 < seconds <= threading.TIMEOUT_MAX):  # type: ignore[operator]
        raise SwapError(f"timeout_seconds must be a number > 0 and <= {threading.TIMEOUT_MAX:g}", found=seconds)


def _check_swap(dry_run: object, probation_steps: object) -> None:
    if not isinstance(dry_run, bool):
        raise SwapError("dry_run must be true or false", found=dry_run)
    if isinstance(probation_steps, bool) or not isinstance(probation_steps, int) or probation_steps < 0:
        raise SwapError("probation_steps must be an integer >= 0", found=probation_steps)


def _estimate(prepared: PreparedSwap, epoch: int) -> SwapReport:
    return SwapReport(
        SwapOutcome.DRY_RUN,
        prepared.changes,
        prepared.cache,
        epoch,
        prepared.extra_memory_bytes,
        prepared.peak_memory_bytes,
        prepared.expected_pause_seconds,
        prepare_seconds=prepared.prepare_seconds,
        weights=prepared.weights,
    )


def _failed(ticket: Ticket, message: str) -> list[Chunk]:
    return [
        Chunk(ticket.request_id, index, "", (), finish_reason=FinishReason.ERROR, error=message)
        for index in sorted(ticket.open_indexes)
    ]


def _check_timing(request: GenerationRequest) -> None:
    timeout = request.timeout_seconds
    is_number = isinstance(timeout, int | float) and not isinstance(timeout, bool)
    if timeout is not None and not (is_number and 0 < timeout <= sys.float_info.max):  # an int may be larger
        raise InvalidRequestError("timeout_seconds must be a number > 0", param="timeout_seconds", found=timeout)
    if isinstance(request.priority, bool) or not isinstance(request.priority, int):
        raise InvalidRequestError("priority must be an integer", param="priority", found=request.priority)
