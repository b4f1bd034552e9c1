"""The engine for asyncio: requests are submitted from coroutines, chunks arrive as asynchronous iterators."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry

from drivetrain.assembly import ServingStack, build_engine, resolve_parts
from drivetrain.config import Settings
from drivetrain.contracts.source import Progress, silent
from drivetrain.observers import Observers
from drivetrain.registry import PartRequest, SelectionReport
from drivetrain.serving.loop import EngineLoop, Health, Ticket
from drivetrain.serving.swap import DEFAULT_PROBATION_STEPS, SwapReport
from drivetrain.serving.tokenizer import LONG_TEXT, Tokenizer
from drivetrain.serving.types import Chunk, GenerationRequest, PromptInfo


class _Mailbox:
    """Chunks on their way from the engine's thread into an event loop. Waking the loop costs a system call, so it is
    done once for all that comes until it looks."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._arrived: deque[tuple[RequestStream, Sequence[Chunk]]] = deque()
        self._is_woken = False

    def put(self, stream: RequestStream, chunks: Sequence[Chunk]) -> None:
        """Called in the engine's thread. Raises RuntimeError when the event loop is closed."""
        self._arrived.append((stream, chunks))
        if not self._is_woken or self.loop.is_closed():
            self._is_woken = True
            self.loop.call_soon_threadsafe(self._hand_out)

    def _hand_out(self) -> None:
        self._is_woken = False  # before looking: what comes from here on wakes again
        while self._arrived:
            stream, chunks = self._arrived.popleft()
            stream.arrive(chunks)


class RequestStream:
    """The chunks of one request, all n sequences interleaved; ends when each has its finish reason."""

    def __init__(self, engine: AsyncEngine, mailbox: _Mailbox, num_sequences: int) -> None:
        self._engine = engine
        self._mailbox = mailbox
        self._chunks: deque[Chunk] = deque()
        self._arrived = asyncio.Event()
        self._num_open = num_sequences
        self._ticket: Ticket | None = None

    @property
    def request_id(self) -> str:
        assert self._ticket is not None
        return self._ticket.request_id

    @property
    def prompt_token_ids(self) -> tuple[int, ...]:
        assert self._ticket is not None
        return self._ticket.prompt

    @property
    def prompt(self) -> PromptInfo:
        """What is known of the prompt; complete once the first chunk has arrived."""
        assert self._ticket is not None
        return self._ticket.prompt_info or PromptInfo(self._ticket.prompt)

    def cancel(self) -> None:
        """Free everything the request holds. Safe to call twice, and after its end."""
        if self._ticket is not None:
            self._engine.loop.cancel(self._ticket)

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> Chunk:
        while not self._chunks:
            if self._num_open == 0:
                raise StopAsyncIteration
            self._arrived.clear()
            await self._arrived.wait()
        chunk = self._chunks.popleft()
        if chunk.finish_reason is not None:
            self._num_open -= 1
        return chunk

    def receive(self, ticket: Ticket, chunks: Sequence[Chunk]) -> None:
        """Called in the engine's thread."""
        try:
            self._mailbox.put(self, chunks)
        except RuntimeError:
            # The event loop is closed: nobody is left to read, so the request is of no use to anyone.
            self._engine.loop.cancel(ticket)

    def arrive(self, chunks: Sequence[Chunk]) -> None:
        """Called in the event loop."""
        self._chunks.extend(chunks)
        self._arrived.set()


class AsyncEngine:
    """Serves requests from coroutines. Made by :meth:`from_settings`; started with :meth:`start`."""

    def __init__(self, stack: ServingStack) -> None:
        self.stack = stack
        self.loop = EngineLoop(stack)
        self.created = int(time.time())
        self._mailbox: _Mailbox | None = None

    @classmethod
    def from_settings(
        cls, settings: Settings, *, observers: Observers | None = None, progress: Progress = silent
    ) -> AsyncEngine:
        """Choose the parts, load the model, and return an engine that is not started yet."""
        parts = resolve_parts(settings, observers=observers, progress=progress, leave_out=("frontend",))
        return cls(build_engine(parts, observers=observers, progress=progress))

    @property
    def model_name(self) -> str:
        return self.stack.parts.settings.model or ""

    @property
    def max_model_len(self) -> int:
        return self.stack.max_model_len

    @property
    def max_waiting(self) -> int:
        """Most requests that wait at a time; one more is refused."""
        return self.stack.engine.settings.max_waiting

    @property
    def tokenizer(self) -> Tokenizer:
        return self.stack.tokenizer

    @property
    def defaults(self) -> Mapping[str, Any]:
        """Sampling defaults that the model's authors recommend, by SamplingParams field."""
        return self.stack.defaults

    @property
    def registry(self) -> CollectorRegistry:
        """The Prometheus registry that the engine counts in."""
        return self.stack.engine.metrics.registry

    def start(self) -> None:
        """Start the step loop's thread."""
        self.loop.start()

    async def submit(self, request: GenerationRequest) -> RequestStream:
        """Queue a request. Raises InvalidRequestError, PromptTooLongError, QueueFullError or DrainingError."""
        mailbox, loop = self._mailbox, asyncio.get_running_loop()
        if mailbox is None or mailbox.loop is not loop:
            mailbox = self._mailbox = _Mailbox(loop)
        stream = RequestStream(self, mailbox, request.params.n)
        if isinstance(request.prompt, str) and len(request.prompt) > LONG_TEXT:
            stream._ticket = await self._submit_in_thread(request, stream)
        else:
            stream._ticket = self.loop.submit(request, stream.receive)
        return stream

    async def _submit_in_thread(self, request: GenerationRequest, stream: RequestStream) -> Ticket:
        submitting = asyncio.ensure_future(asyncio.to_thread(self.loop.submit, request, stream.receive))
        try:
            return await asyncio.shield(submitting)
        except asyncio.CancelledError:
            submitting.add_done_callback(self._cancel_unwanted)
            raise

    def _cancel_unwanted(self, submitting: asyncio.Future[Ticket]) -> None:
        """Whoever submitted has gone while the thread was still at it."""
        if not submitting.cancelled() and submitting.exception() is None:
            self.loop.cancel(submitting.result())

    def health(self) -> Health:
        return self.loop.health()

    def stats(self) -> dict[str, Any]:
        return self.loop.stats()

    def report(self) -> SelectionReport:
        """What was chosen for each kind, and why."""
        return self.stack.parts.report

    def selection_dict(self) -> dict[str, Any]:
        """The report with the plan's digest, bound operations and notes, JSON-able."""
        return self.stack.selection_dict()

    async def swap(
        self,
        requests: Mapping[str, PartRequest],
        *,
        dry_run: bool = False,
        probation_steps: int = DEFAULT_PROBATION_STEPS,
        timeout_seconds: float | None = None,
    ) -> SwapReport:
        """Exchange parts while requests are in flight; see :meth:`drivetrain.LLM.swap`."""
        return await asyncio.to_thread(
            self.loop.swap,
            requests,
            dry_run=dry_run,
            probation_steps=probation_steps,
            timeout_seconds=timeout_seconds,
        )

    async def drain(self, timeout_seconds: float | None) -> bool:
        """Refuse new work and wait for what is under way; False when the time ran out first."""
        self.loop.refuse_new()
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        while not self.loop.is_empty:
            if deadline is not None and time.monotonic() >= deadline:
                return False
            await asyncio.sleep(0.02)
        return True

    def shutdown(self) -> None:
        """Stop the loop; what is left ends as cancelled."""
        self.loop.shutdown()
