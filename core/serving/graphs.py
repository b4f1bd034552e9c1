"""Steps that are captured once and replayed, on platforms that claim ``graphs``: decodes, and what all kinds share.

A decode step (one token a sequence) of one batch size launches the same work every time; a platform records it once and
launches it as one. What changes from step to step lies in buffers that stay where they are. A batch is filled up to the
next size that is captured: the added rows are sequences of one token in a block that belongs to nobody. Steps with
prompts are in :mod:`drivetrain.serving.prompt_graphs` and :mod:`drivetrain.serving.pieces`.

Shapes: S sequences of a step; b rows of a captured size; M the largest one; W blocks of the longest sequence; V
vocabulary; T tokens of a step.
"""

from __future__ import annotations

import functools
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from drivetrain.contracts.attention import AttentionBackend, AttentionBatch, AttentionSpec, KVCache
from drivetrain.contracts.model import CausalLM
from drivetrain.contracts.source import Progress
from drivetrain.errors import GraphCaptureError
from drivetrain.serving.packing import StepInputs

_log = logging.getLogger("drivetrain")

Capture = Callable[[Callable[[], None]], Callable[[], None]]
"""``SupportsGraphs.capture``."""

MOST_TOKENS = 1024
"""Steps of more tokens are not captured: they keep a device busy for longer than it takes to launch them."""

_READ_ANYWAY = 128
"""Up to so many tokens a step takes as long as the weights take to be read, and rows for nobody take no time."""

_DRIVER_BYTES_PER_LAYER = 2**18
"""What a driver keeps of a captured layer: the launches with their parameters. An estimate on the safe side, as no
driver tells: some ten launches a layer, and some KiB each, where captures end and begin again more."""


@dataclass(frozen=True)
class GraphLimits:
    """What captured steps are made for.

    max_running:    most sequences of a step.
    max_tokens:     most tokens of a step.
    max_blocks:     blocks of the longest sequence (W).
    block_size:     tokens in a block.
    scratch_blocks: for each KV group a block that no sequence ever gets.
    """

    max_running: int
    max_tokens: int
    max_blocks: int
    block_size: int
    scratch_blocks: tuple[int, ...]


def captured_sizes(max_running: int) -> list[int]:
    """The batch sizes that are captured: 1, 2, 4, then every eighth up to 64, and by a quarter of the next lower power
    of two beyond, up to the first that holds all. So at most a fifth of a large step is computed for nobody."""
    sizes = [1, 2, 4]
    while sizes[-1] < max_running:
        last = sizes[-1]
        step = max(8, 1 << max(0, last.bit_length() - 3))
        sizes.append(8 if last < 8 else last + step)
    return [size for size, smaller in zip(sizes, [0, *sizes], strict=False) if smaller < max_running]


def token_sizes(max_tokens: int) -> list[int]:
    """The numbers of tokens that steps with prompts are captured for, up to ``max_tokens`` or MOST_TOKENS, which is one
    of them: powers of two from 16 to 128, then in steps of 64, and from 512 on of 128."""
    most, sizes = min(max_tokens, MOST_TOKENS), [16]
    while sizes[-1] < most:
        last = sizes[-1]
        sizes.append(2 * last if last < _READ_ANYWAY else last + (64 if last < 512 else 128))
    return [*(size for size in sizes if size < most), most]


def launched_sizes(max_tokens: int, most_captured: int) -> list[int]:
    """Numbers of tokens of steps that are not captured: each twice the one before, and the largest there may be."""
    sizes = [2 * most_captured]
    while sizes[-1] < max_tokens:
        sizes.append(2 * sizes[-1])
    return [*(size for size in sizes if size < max_tokens), max_tokens] if max_tokens > most_captured else []


@dataclass(frozen=True, eq=False)
class StepParts:
    """What captured steps compute with."""

    model: CausalLM
    attention: AttentionBackend
    spec: AttentionSpec
    cache: KVCache
    limits: GraphLimits
    device: torch.device


class CapturedSteps(ABC):
    """Steps that are captured for each of a few sizes: ahead, or when a size first comes.

    unit: what a size counts.
    """

    unit: ClassVar[str]

    def __init__(self, parts: StepParts, sizes: Sequence[int]) -> None:
        self._parts = parts
        self._sizes = sizes
        self._replays: dict[int, Callable[[], None]] = {}

    def rehearse_largest(self) -> None:
        """Compute a step of the largest size as it is when captured; nothing is."""
        self._rehearse(self._sizes[-1])

    def bytes_kept(self, bytes_of_largest: int) -> int:
        """What all sizes together keep of the device's memory once they are captured, by what the largest takes at
        most while it is computed."""
        driver = len(self._sizes) * len(self._parts.spec.layers) * _DRIVER_BYTES_PER_LAYER
        return driver + self._tensor_bytes_kept(bytes_of_largest)

    @abstractmethod
    def _tensor_bytes_kept(self, bytes_of_largest: int) -> int:
        """The same without what the driver keeps of each capture."""

    def capture_ahead(self, progress: Progress) -> None:
        """Capture every size now, the largest first: smaller ones then find room in the memory that it took."""
        what = f"capturing steps by {self.unit}"
        for index, size in enumerate(reversed(self._sizes)):
            progress(what, index, len(self._sizes), "sizes")
            self._replay_of(size)
        progress(what, len(self._sizes), len(self._sizes), "sizes")

    def _size_for(self, count: int) -> int:
        return next(size for size in self._sizes if size >= count)

    def _replay_of(self, size: int) -> Callable[[], None]:
        """Raises GraphCaptureError."""
        if size not in self._replays:
            self._replays[size] = self._record(size)
        return self._replays[size]

    def _record(self, size: int) -> Callable[[], None]:
        started = time.perf_counter()
        capture = self._rehearse(size)
        try:
            replay = capture()
        except Exception as error:  # the platform's code, on what a model or backend launches
            raise GraphCaptureError(
                f"a step of {size} {self.unit} could not be captured: {type(error).__name__}: {error}",
                where="engine.graphs",
                hint="Set engine.graphs to off.",
            ) from error
        _log.debug("a step of %d %s was captured in %.2f s", size, self.unit, time.perf_counter() - started)
        return replay

    @abstractmethod
    def _rehearse(self, size: int) -> Callable[[], Callable[[], None]]:
        """Compute such a step once, as what is compiled or set up on first use must not be recorded; returns what
        captures it."""


class DecodeGraphs(CapturedSteps):
    """Decode steps, captured whole."""

    unit = "sequences"

    def __init__(self, capture: Capture, parts: StepParts) -> None:
        super().__init__(parts, captured_sizes(parts.limits.max_running))
        self._capture = capture
        self._logits: dict[int, torch.Tensor] = {}
        self._buffers = _Buffers(self._sizes[-1], parts.limits, parts.device)

    def takes(self, inputs: StepInputs) -> bool:
        """Whether the step is one that can be replayed: one token a sequence, and each gives the next."""
        count = inputs.attention.num_sequences
        return (
            count <= self._sizes[-1]
            and not inputs.prompt_rows
            and len(inputs.sampling) == count
            and len(inputs.ids_T) == count
        )

    def run(self, inputs: StepInputs) -> torch.Tensor:
        """Compute such a step; returns the logits [S, V], good until the next call."""
        count = inputs.attention.num_sequences
        size = self._size_for(count)
        self._buffers.fill(inputs, count)
        self._replay_of(size)()
        return self._logits[size][:count]

    def _tensor_bytes_kept(self, bytes_of_largest: int) -> int:
        """Logits of every size are held; what else a size takes may be its own. Both grow with the rows."""
        return bytes_of_largest * sum(self._sizes) // self._sizes[-1]

    def _rehearse(self, size: int) -> Callable[[], Callable[[], None]]:
        parts = self._parts

        def decode() -> None:
            step = parts.attention.begin(parts.spec, self._buffers.batch(size), parts.cache)
            hidden_bE = parts.model.forward(self._buffers.ids_M[:size], self._buffers.positions_M[:size], step)
            self._logits[size] = parts.model.logits(hidden_bE)

        decode()
        return functools.partial(self._capture, decode)


class _Buffers:
    """Inputs of a captured step, at addresses that never change."""

    def __init__(self, most: int, limits: GraphLimits, device: torch.device) -> None:
        self._limits = limits
        groups = range(len(limits.scratch_blocks))
        self.ids_M = torch.zeros(most, dtype=torch.int64, device=device)
        self.positions_M = torch.zeros(most, dtype=torch.int64, device=device)
        self._starts = torch.arange(most + 1, dtype=torch.int32, device=device)
        self._kv_lengths_M = torch.ones(most, dtype=torch.int32, device=device)
        self._tables_MW = [torch.zeros(most, limits.max_blocks, dtype=torch.int32, device=device) for _ in groups]
        self._slots_M = [torch.zeros(most, dtype=torch.int64, device=device) for _ in groups]
        self._num_filled = most
        self._empty_from(0)

    def fill(self, inputs: StepInputs, count: int) -> None:
        """Put a step's inputs into the first ``count`` rows; the others are nobody's."""
        batch = inputs.attention
        self.ids_M[:count].copy_(inputs.ids_T)
        self.positions_M[:count].copy_(inputs.positions_T)
        self._kv_lengths_M[:count].copy_(batch.kv_lengths)
        for table_MW, table_SW, slots_M, slots_S in zip(
            self._tables_MW, batch.block_tables, self._slots_M, batch.slots, strict=True
        ):
            table_MW[:count, : table_SW.shape[1]].copy_(table_SW)
            slots_M[:count].copy_(slots_S)
        if count < self._num_filled:
            self._empty_from(count)
        self._num_filled = count

    def _empty_from(self, first: int) -> None:
        rows = slice(first, self._num_filled)
        self.ids_M[rows] = 0
        self.positions_M[rows] = 0
        self._kv_lengths_M[rows] = 1
        for table_MW, slots_M, scratch in zip(self._tables_MW, self._slots_M, self._limits.scratch_blocks, strict=True):
            table_MW[rows] = scratch
            slots_M[rows] = scratch * self._limits.block_size

    def batch(self, size: int) -> AttentionBatch:
        """The first ``size`` rows. The lists on the host name the longest contexts there may ever be."""
        longest = self._limits.max_blocks * self._limits.block_size - 1
        return AttentionBatch(
            query_lengths=[1] * size,
            context_lengths=[longest] * size,
            query_starts=self._starts[: size + 1],
            kv_lengths=self._kv_lengths_M[:size],
            block_tables=tuple(table_MW[:size] for table_MW in self._tables_MW),
            slots=tuple(slots_M[:size] for slots_M in self._slots_M),
        )


class TokenBuffers:
    """What a captured step reads of its tokens, at addresses that never change. Rows that are not filled are nobody's:
    of token 0, and what they write goes to a block that belongs to nobody."""

    def __init__(self, most: int, limits: GraphLimits, device: torch.device) -> None:
        self.ids_M = torch.zeros(most, dtype=torch.int64, device=device)
        self.positions_M = torch.zeros(most, dtype=torch.int64, device=device)
        self._nobodys = [scratch * limits.block_size for scratch in limits.scratch_blocks]
        self._slots_M = [torch.full((most,), slot, dtype=torch.int64, device=device) for slot in self._nobodys]
        self._num_filled = 0

    def fill(self, inputs: StepInputs) -> None:
        """Put a step's tokens into the first rows; the others are nobody's."""
        count = len(inputs.ids_T)
        self.ids_M[:count].copy_(inputs.ids_T)
        self.positions_M[:count].copy_(inputs.positions_T)
        for slots_M, slots_T in zip(self._slots_M, inputs.attention.slots, strict=True):
            slots_M[:count].copy_(slots_T)
        self.empty_from(count)

    def empty_from(self, count: int) -> None:
        """Only the first ``count`` rows are anybody's."""
        rest = slice(count, max(count, self._num_filled))
        self.ids_M[rest] = 0
        self.positions_M[rest] = 0
        for slots_M, slot in zip(self._slots_M, self._nobodys, strict=True):
            slots_M[rest] = slot
        self._num_filled = count

    def slots(self, size: int) -> tuple[torch.Tensor, ...]:
        """Where the first ``size`` tokens write, for each KV group."""
        return tuple(slots_M[:size] for slots_M in self._slots_M)


def why_no_graphs(capture: Capture | None, attention: AttentionBackend) -> str | None:
    """Why decode steps can't be captured; None if they can."""
    if capture is None:
        return "the platform captures no graphs"
    if "graph_safe" not in type(attention).abilities():
        return f"attention backend {type(attention).__name__} does not claim to be graph_safe"
    return None


def with_scratch(num_blocks: Sequence[int], captures: bool) -> list[int]:
    """How many blocks a cache is made with: one more a KV group where steps may be captured."""
    return [count + captures for count in num_blocks]
