"""Steps with prompts, captured in pieces where a platform claims ``graph_pieces``: all but their attention is replayed.

What a step with prompts launches depends on how its tokens are divided among sequences, but only in its attention. The
rest works on rows, and is recorded once for each of a few numbers of tokens; between two pieces the step attends, with
queries, keys, values and results in buffers that stay where they are. Launched one by one from Python, a step of a few
hundred tokens takes several times as long as the device computes.

A step is filled up to the next size that is captured: the added rows are of token 0, and what they write goes to a
block that belongs to nobody.

Shapes: T tokens of a step; t tokens of a captured size; M the largest one; H heads; D head size; E hidden size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch

from drivetrain.contracts.attention import AttentionBatch, AttentionStep, LayerPages, TakesWritten
from drivetrain.serving.graphs import CapturedSteps, GraphLimits, StepParts
from drivetrain.serving.packing import StepInputs

CapturePieces = Callable[[Callable[[Callable[[Callable[[], None]], None]], None]], Callable[[], None]]
"""``CapturesPieces.capture_pieces``."""

MOST_TOKENS = 1024
"""Larger steps keep a device busy for longer than it takes to launch them."""

_READ_ANYWAY = 128
"""Up to so many tokens a step takes as long as the weights take to be read, and rows for nobody take no time."""


def piece_sizes(most: int) -> list[int]:
    """Numbers of tokens that are captured, up to ``most``, which is one of them: powers of two from 16 to 128, then in
    steps of 64, and from 512 on of 128."""
    sizes = [16]
    while sizes[-1] < most:
        last = sizes[-1]
        sizes.append(2 * last if last < _READ_ANYWAY else last + (64 if last < 512 else 128))
    return [*(size for size in sizes if size < most), most]


class StepPieces(CapturedSteps):
    """Any steps, captured but for their attention."""

    unit = "tokens"

    def __init__(self, capture: CapturePieces, parts: StepParts) -> None:
        super().__init__(parts, piece_sizes(min(parts.limits.max_tokens, MOST_TOKENS)))
        self._capture = capture
        self._buffers = _Buffers(self._sizes[-1], parts.limits, parts.device)
        self._exchange = _Exchange(self._sizes[-1])

    def takes(self, inputs: StepInputs) -> bool:
        """Whether the step is one of those that are captured."""
        return len(inputs.ids_T) <= self._sizes[-1]

    def run(self, inputs: StepInputs) -> torch.Tensor:
        """The hidden states behind the step's tokens, [T, E], good until the next call. Raises GraphCaptureError."""
        parts, count = self._parts, len(inputs.ids_T)
        self._buffers.fill(inputs, count)
        replay = self._replay_of(self._size_for(count))
        self._exchange.step = parts.attention.begin(parts.spec, inputs.attention, parts.cache)
        self._exchange.count = count
        try:
            replay()
        finally:
            self._exchange.step = None
        return self._exchange.place("hidden")[:count]

    def _tensor_bytes_kept(self, bytes_of_largest: int) -> int:
        """Sizes share what they hand over, and by the platform's contract the rest."""
        return bytes_of_largest

    def _rehearse(self, size: int) -> Callable[[], Callable[[], None]]:
        parts = self._parts
        ids_t, positions_t, batch = self._buffers.of(size)
        # Of this step nothing is attended to: it only tells where keys and values go.
        pages = parts.attention.begin(parts.spec, batch, parts.cache)
        kind = _WritesItself if isinstance(pages, TakesWritten) else _Interrupted

        def compute(between: Callable[[Callable[[], None]], None]) -> None:
            step = kind(pages, self._exchange, between)
            hidden_tE = parts.model.forward(ids_t, positions_t, step)
            self._exchange.keep("hidden", hidden_tE)

        compute(lambda work: None)
        return functools.partial(self._capture, compute)


class _Exchange:
    """What pieces and the attention between them hand over, at addresses that never change, and the step that attends.

    All sizes and layers use the same memory, one after another.
    """

    def __init__(self, most: int) -> None:
        self.step: AttentionStep | None = None
        self.count = 0
        self._most = most
        self._places: dict[tuple[Any, ...], torch.Tensor] = {}
        self._latest: dict[str, torch.Tensor] = {}

    def place(self, name: str) -> torch.Tensor:
        """Where the latest tensor of this name is kept, [M, ...]."""
        return self._latest[name]

    def room(self, name: str, like_T: torch.Tensor) -> torch.Tensor:
        """Memory of this name for tensors of this kind, [M, ...]; made, of zeros, when it is first asked for."""
        key = (name, *like_T.shape[1:], like_T.dtype)
        if key not in self._places:
            self._places[key] = like_T.new_zeros((self._most, *like_T.shape[1:]))
        self._latest[name] = self._places[key]
        return self._places[key]

    def keep(self, name: str, rows_tX: torch.Tensor) -> torch.Tensor:
        """Copy a captured size's rows to their place."""
        place = self.room(name, rows_tX)
        place[: len(rows_tX)].copy_(rows_tX)
        return place


class _Interrupted:
    """The attention of a step while it is captured. At each replay the step of then attends in its place."""

    def __init__(
        self, pages: AttentionStep, exchange: _Exchange, between: Callable[[Callable[[], None]], None]
    ) -> None:
        self._pages, self._exchange, self._between = pages, exchange, between

    def attend(self, layer: int, q_THD: torch.Tensor, k_TGD: torch.Tensor, v_TGD: torch.Tensor) -> torch.Tensor:
        exchange = self._exchange
        q, k, v = (exchange.keep(name, x) for name, x in (("q", q_THD), ("k", k_TGD), ("v", v_TGD)))
        out = exchange.room("out", q_THD)

        def attend() -> None:
            count = exchange.count
            assert exchange.step is not None
            out[:count].copy_(exchange.step.attend(layer, q[:count], k[:count], v[:count]))

        self._between(attend)
        return out[: len(q_THD)]


class _WritesItself(_Interrupted):
    """The same where the model may write keys and values itself."""

    def layer_pages(self, layer: int) -> LayerPages | None:
        assert isinstance(self._pages, TakesWritten)
        return self._pages.layer_pages(layer)

    def attend_written(self, layer: int, q_THD: torch.Tensor) -> torch.Tensor:
        exchange = self._exchange
        q, out = exchange.keep("q", q_THD), exchange.room("out", q_THD)

        def attend() -> None:
            count, step = exchange.count, exchange.step
            assert isinstance(step, TakesWritten)
            out[:count].copy_(step.attend_written(layer, q[:count]))

        self._between(attend)
        return out[: len(q_THD)]


class _Buffers:
    """What a captured step reads of its tokens, at addresses that never change."""

    def __init__(self, most: int, limits: GraphLimits, device: torch.device) -> None:
        self._limits, self._device = limits, device
        self._ids_M = torch.zeros(most, dtype=torch.int64, device=device)
        self._positions_M = torch.zeros(most, dtype=torch.int64, device=device)
        self._nobodys = [scratch * limits.block_size for scratch in limits.scratch_blocks]
        self._slots_M = [torch.full((most,), slot, dtype=torch.int64, device=device) for slot in self._nobodys]
        self._num_filled = 0

    def fill(self, inputs: StepInputs, count: int) -> None:
        """Put a step's tokens into the first ``count`` rows; the others are nobody's."""
        self._ids_M[:count].copy_(inputs.ids_T)
        self._positions_M[:count].copy_(inputs.positions_T)
        for slots_M, slots_T in zip(self._slots_M, inputs.attention.slots, strict=True):
            slots_M[:count].copy_(slots_T)
        rest = slice(count, max(count, self._num_filled))
        self._ids_M[rest] = 0
        self._positions_M[rest] = 0
        for slots_M, slot in zip(self._slots_M, self._nobodys, strict=True):
            slots_M[rest] = slot
        self._num_filled = count

    def of(self, size: int) -> tuple[torch.Tensor, torch.Tensor, AttentionBatch]:
        """Ids and positions of a captured size, and a batch that has them as one prompt in blocks of nobody."""
        width = math.ceil(size / self._limits.block_size)
        tables = (
            torch.full((1, width), scratch, dtype=torch.int32, device=self._device)
            for scratch in self._limits.scratch_blocks
        )
        batch = AttentionBatch(
            query_lengths=[size],
            context_lengths=[0],
            query_starts=torch.arange(2, dtype=torch.int32, device=self._device) * size,
            kv_lengths=torch.full((1,), size, dtype=torch.int32, device=self._device),
            block_tables=tuple(tables),
            slots=tuple(slots_M[:size] for slots_M in self._slots_M),
        )
        return self._ids_M[:size], self._positions_M[:size], batch
