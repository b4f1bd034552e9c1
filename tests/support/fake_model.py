"""A language model in whole numbers, with a real paged cache, and the same model once more in plain Python.

Every layer writes one number a token into its block of the cache and adds up what its queries see, each number times a
weight that depends on its place. All of it is exact in float64. A block mixed up, a slot written wrong, a stale or a
missing entry, a window one token off or a wrong position changes the sums, and with them the tokens.

Shapes: T tokens of a step; N rows whose logits are wanted; V vocabulary; B blocks; K tokens in a block.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from drivetrain.config import EngineSettings
from drivetrain.contracts.attention import (
    AttentionBackend,
    AttentionBatch,
    AttentionSpec,
    AttentionStep,
    KVContract,
    KVGroup,
    LayerAttention,
)
from drivetrain.contracts.model import ModelSpec
from drivetrain.contracts.plugin import PluginConfig
from drivetrain.contracts.scheduler import Scheduler
from drivetrain.observers import Observers
from drivetrain.plugins.scheduler.fcfs import FcfsScheduler
from drivetrain.plugins.scheduler.priority import PriorityScheduler
from drivetrain.serving.blocks import KVManager
from drivetrain.serving.engine import Engine, EngineLimits
from drivetrain.serving.request import Request
from drivetrain.serving.runner import ModelRunner
from drivetrain.serving.types import Chunk, FinishReason, GenerationRequest, SamplingParams

VOCAB_SIZE = 64
END_TOKENS = frozenset({7, 23})
WINDOWS = (None, 5)

_MODULUS = 10007
_WEIGHTS = 13

# --- the model, once in plain Python ---------------------------------------------------------------------------------


def _first(token: int, position: int) -> int:
    return (token * 389 + position * 97 + 11) % _MODULUS


def _value(hidden: int, position: int, layer: int) -> int:
    return (hidden * 31 + position * 17 + layer * 5 + 1) % 1009


def _weight(index: int) -> int:
    return 1 + index % _WEIGHTS


def _next(hidden: int, attended: int) -> int:
    return (hidden * 3 + attended) % _MODULUS


def scores(hidden: int) -> list[float]:
    """Logits over the vocabulary; all different, so that there is one best token."""
    return [((hidden * 131 + v * v * 29 + v * 17) % 101) / 16 + (VOCAB_SIZE - v) / 4096 for v in range(VOCAB_SIZE)]


class PlainModel:
    """One sequence, token by token, with nothing paged and nothing shared."""

    def __init__(self, windows: Sequence[int | None] = WINDOWS) -> None:
        self._windows = tuple(windows)
        self._seen: list[list[int]] = [[] for _ in windows]

    def push(self, token: int) -> list[float]:
        """The logits behind ``token``."""
        position = len(self._seen[0])
        hidden = _first(token, position)
        for layer, window in enumerate(self._windows):
            seen = self._seen[layer]
            seen.append(_value(hidden, position, layer) * _weight(position))
            hidden = _next(hidden, sum(seen if window is None else seen[-window:]))
        return scores(hidden)


def expected_tokens(prompt: Sequence[int], count: int, windows: Sequence[int | None] = WINDOWS) -> list[int]:
    """The ``count`` tokens that greedy decoding gives, end tokens included."""
    model = PlainModel(windows)
    for token in prompt:
        logits = model.push(token)
    tokens: list[int] = []
    for _ in range(count):
        tokens.append(max(range(VOCAB_SIZE), key=logits.__getitem__))
        logits = model.push(tokens[-1])
    return tokens


@dataclass(frozen=True)
class Expected:
    tokens: list[int]
    text: str
    reason: FinishReason
    stop_reason: str | int | None = None


def expected_output(
    prompt: Sequence[int],
    params: SamplingParams,
    *,
    max_model_len: int,
    windows: Sequence[int | None] = WINDOWS,
) -> Expected:
    """What a greedy request must give when nothing disturbs it, by the words of SamplingParams."""
    model = PlainModel(windows)
    for token in prompt:
        logits = model.push(token)
    room = max_model_len - len(prompt)
    most = room if params.max_tokens is None else params.max_tokens
    ends = frozenset() if params.ignore_eos else END_TOKENS
    tokens: list[int] = []
    text = ""
    while True:
        forbidden = {*ends, *params.stop_token_ids} if len(tokens) < params.min_tokens else set()
        allowed = [v for v in range(VOCAB_SIZE) if v not in forbidden]
        token = max(allowed, key=logits.__getitem__)
        tokens.append(token)
        if token in ends or token in params.stop_token_ids:
            return Expected(tokens, text, FinishReason.STOP, None if token in ends else token)
        text += piece(token)
        for stop in params.stop if len(tokens) > params.min_tokens else ():
            # A piece is one character, so a stop string that is complete ends the text.
            if text.endswith(stop):
                cut = text if params.include_stop else text.removesuffix(stop)
                return Expected(tokens, cut, FinishReason.STOP, stop)
        if len(tokens) == most:
            return Expected(tokens, text, FinishReason.LENGTH)
        logits = model.push(token)


def piece(token: int) -> str:
    """The text of a token: one letter of twenty-six."""
    return chr(ord("a") + token % 26)


# --- and once with a paged cache -------------------------------------------------------------------------------------


@dataclass
class Faults:
    """What goes wrong in the next step that runs.

    error:     raised by the model.
    nan_row:   this row of the logits (modulo their number) becomes NaN, if there are any.
    gate:      while it is not set, the model does not return.
    entered:   set when the model is reached.
    """

    error: BaseException | None = None
    nan_row: int | None = None
    gate: threading.Event | None = None
    entered: threading.Event = field(default_factory=threading.Event)


class FakeLM:
    """The model as the runner knows it."""

    def __init__(self, windows: Sequence[int | None], max_position: int) -> None:
        layers = tuple(LayerAttention(1, 1, 1, 1.0, window) for window in windows)
        self.spec = ModelSpec("Fake", VOCAB_SIZE, 1, len(layers), max_position, 0, AttentionSpec(layers, "float64"))
        self.faults = Faults()
        self.num_tokens_computed = 0
        self.tokens_per_step: list[int] = []

    def forward(self, ids_T: torch.Tensor, positions_T: torch.Tensor, step: AttentionStep) -> torch.Tensor:
        self.faults.entered.set()
        if self.faults.gate is not None:
            self.faults.gate.wait()
        error, self.faults.error = self.faults.error, None
        if error is not None:
            raise error
        self.num_tokens_computed += len(ids_T)
        self.tokens_per_step.append(len(ids_T))
        hidden_T = (ids_T * 389 + positions_T * 97 + 11) % _MODULUS
        for layer in range(len(self.spec.attention.layers)):
            values_T = (hidden_T * 31 + positions_T * 17 + layer * 5 + 1) % 1009
            kv_T11 = values_T.double().view(-1, 1, 1)
            attended_T = step.attend(layer, kv_T11, kv_T11, kv_T11).view(-1)
            # NaN, which unwritten slots hold, stays NaN in floating point only.
            hidden_T = hidden_T * 3 + attended_T
            hidden_T = hidden_T - (hidden_T / _MODULUS).floor() * _MODULUS
        return hidden_T.double().view(-1, 1)

    def logits(self, hidden_NE: torch.Tensor) -> torch.Tensor:
        v_V = torch.arange(VOCAB_SIZE, dtype=torch.float64)
        raw_NV = hidden_NE * 131 + v_V * v_V * 29 + v_V * 17
        logits_NV = (raw_NV - (raw_NV / 101).floor() * 101) / 16 + (VOCAB_SIZE - v_V) / 4096
        row, self.faults.nan_row = self.faults.nan_row, None
        if row is not None and len(logits_NV):
            logits_NV[row % len(logits_NV)] = torch.nan
        return logits_NV


class FakeAttention(AttentionBackend):
    """Sums over what is visible, from a cache whose unwritten slots are NaN."""

    def __init__(self, block_size: int) -> None:
        super().__init__(PluginConfig())
        self.block_size = block_size

    def kv_contract(self, spec: AttentionSpec) -> KVContract:
        return KVContract("fake/1", self.block_size, "float64")

    def bytes_per_block(self, spec: AttentionSpec, group: KVGroup) -> int:
        return 8 * self.block_size * len(group.layers)

    def allocate(self, spec: AttentionSpec, num_blocks: Sequence[int], device: torch.device) -> list[torch.Tensor]:
        """One [B, K] tensor a layer."""
        sizes = {layer: num_blocks[group.index] for group in spec.groups for layer in group.layers}
        return [
            torch.full((sizes[layer], self.block_size), torch.nan, dtype=torch.float64)
            for layer in range(len(spec.layers))
        ]

    def begin(self, spec: AttentionSpec, batch: AttentionBatch, cache: list[torch.Tensor] | None) -> AttentionStep:
        assert cache is not None
        return _FakeStep(spec, batch, cache)

    def copy_blocks(self, cache: list[torch.Tensor], group: KVGroup, pairs: Sequence[tuple[int, int]]) -> None:
        sources, destinations = [s for s, _ in pairs], [d for _, d in pairs]
        assert len(set(destinations)) == len(destinations)
        assert not set(sources) & set(destinations)
        for layer in group.layers:
            cache[layer][destinations] = cache[layer][sources]

    def clear_blocks(self, cache: list[torch.Tensor], group: KVGroup, blocks: Sequence[int]) -> None:
        for layer in group.layers:
            cache[layer][list(blocks)] = 0


class _FakeStep:
    def __init__(self, spec: AttentionSpec, batch: AttentionBatch, cache: list[torch.Tensor]) -> None:
        self._spec = spec
        self._batch = batch
        self._cache = cache
        self._group_of = {layer: group for group in spec.groups for layer in group.layers}

    def attend(self, layer: int, q_THD: torch.Tensor, k_TGD: torch.Tensor, v_TGD: torch.Tensor) -> torch.Tensor:
        group, batch, cache_BK = self._group_of[layer], self._batch, self._cache[layer]
        cache_BK.view(-1)[batch.slots[group.index]] = v_TGD.view(-1)
        rows: list[torch.Tensor] = []
        for sequence, (context, count) in enumerate(zip(batch.context_lengths, batch.query_lengths, strict=True)):
            length = context + count
            index_L = torch.arange(length)
            table = batch.block_tables[group.index][sequence].long()
            block_size = cache_BK.shape[1]
            seen_L = cache_BK[table[index_L // block_size], index_L % block_size] * (1 + index_L % _WEIGHTS)
            query_C1 = torch.arange(context, length).unsqueeze(1)
            visible_CL = index_L <= query_C1
            if group.window is not None:
                visible_CL &= index_L > query_C1 - group.window
            rows.append(torch.where(visible_CL, seen_L, 0.0).sum(dim=1))
        return torch.cat(rows).view(-1, 1, 1)


class LetterDecoder:
    """The fake tokenizer's text: a letter a token."""

    def push(self, ids: Sequence[int]) -> str:
        return "".join(map(piece, ids))

    def flush(self) -> str:
        return ""


# --- an engine on it -------------------------------------------------------------------------------------------------


class FakeClock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


def make_scheduler(name: str, max_batched_tokens: int, max_running: int, **options: object) -> Scheduler:
    plugin = {"fcfs": FcfsScheduler, "priority": PriorityScheduler}[name]
    config = plugin.Config.model_validate(
        {"max_batched_tokens": max_batched_tokens, "max_running": max_running, **options}
    )
    return plugin(config)


def make_engine(
    scheduler: str | Scheduler = "fcfs",
    *,
    num_blocks: int | Sequence[int] = 64,
    block_size: int = 4,
    windows: Sequence[int | None] = WINDOWS,
    max_running: int = 8,
    max_batched_tokens: int = 16,
    prefix_cache: bool = True,
    max_model_len: int = 64,
    clock: Callable[[], float] | None = None,
    settings: EngineSettings | None = None,
    observers: Observers | None = None,
    make_decoder: Callable[[Sequence[int], bool], LetterDecoder] | None = None,
    attention: type[FakeAttention] | None = None,
    captures: Mapping[str, Any] | None = None,
    **scheduler_options: object,
) -> Engine:
    """An engine on the fake model. Refuses a cache that could not hold one request of ``max_model_len`` tokens.

    captures: what ``ModelRunner`` is told of capturing steps.
    """
    model, backend = FakeLM(windows, max_model_len), (attention or FakeAttention)(block_size)
    spec = model.spec.attention
    counts = [num_blocks] * len(spec.groups) if isinstance(num_blocks, int) else list(num_blocks)
    kv = KVManager(
        spec.groups,
        counts,
        block_size,
        max_running=max_running,
        max_tokens=max_model_len,
        prefix_cache=prefix_cache,
        salt="fake",
    )
    assert kv.fits(max_model_len, max_batched_tokens), "one request alone would not fit"
    if isinstance(scheduler, str):
        scheduler = make_scheduler(scheduler, max_batched_tokens, max_running, **scheduler_options)
    return Engine(
        ModelRunner(model, backend, counts, torch.device("cpu"), **(captures or {})),
        kv,
        scheduler,
        EngineLimits(max_model_len, VOCAB_SIZE, END_TOKENS),
        settings or EngineSettings(),
        make_decoder or (lambda prompt, skip_special: LetterDecoder()),
        observers,
        clock=clock or FakeClock(),
    )


def fake_lm(engine: Engine) -> FakeLM:
    """The model under an engine of :func:`make_engine`."""
    model = engine.runner.model
    assert isinstance(model, FakeLM)
    return model


def prompts(count: int, length: int = 9) -> Iterator[list[int]]:
    """Prompts that share nothing."""
    for number in range(count):
        yield [(number * 13 + i * i * 7 + i * 3 + 1) % VOCAB_SIZE for i in range(length)]


@dataclass
class Run:
    """What an engine gave for its requests: by (request id, index)."""

    tokens: dict[tuple[str, int], list[int]] = field(default_factory=dict)
    text: dict[tuple[str, int], str] = field(default_factory=dict)
    last: dict[tuple[str, int], Chunk] = field(default_factory=dict)
    chunks: list[Chunk] = field(default_factory=list)

    def add(self, chunks: Sequence[Chunk]) -> None:
        self.chunks += chunks
        for chunk in chunks:
            key = chunk.request_id, chunk.index
            assert key not in self.last, "a chunk after the last one"
            self.tokens[key] = self.tokens.get(key, []) + list(chunk.token_ids)
            self.text[key] = self.text.get(key, "") + chunk.text
            if chunk.finish_reason is not None:
                self.last[key] = chunk


def finish(engine: Engine, run: Run | None = None, *, max_steps: int = 5000) -> Run:
    """Step until nothing is left, and check that nothing is held."""
    run = run or Run()
    for _ in range(max_steps):
        if not engine.has_work:
            break
        run.add(engine.step())
    assert not engine.has_work, "requests are stuck"
    engine.kv.check()
    assert [pool.num_used for pool in engine.kv.pools] == [0] * len(engine.kv.pools)
    return run


def greedy(max_tokens: int | None = 8, **rest: object) -> SamplingParams:
    """Settings of a greedy request that end tokens do not end."""
    given: dict[str, object] = {"temperature": 0.0, "ignore_eos": True, "max_tokens": max_tokens, **rest}
    return SamplingParams(**given)  # type: ignore[arg-type]


def add(engine: Engine, name: str, prompt: Sequence[int], params: SamplingParams, **rest: Any) -> list[Request]:
    """Give the engine a request."""
    return engine.add(name, GenerationRequest(prompt, params, **rest), prompt)
