"""Steps with prompts, captured in pieces where a platform claims ``graph_pieces``: all but their attention is replayed.

What a step with prompts launches depends on how its tokens are divided among sequences, but only in its attention. The
rest works on rows, and is recorded once for each of a few numbers of tokens; between two pieces the step attends, with
queries, keys, values and results in buffers that stay where they are. Launched one by one from Python, a step of a few
hundred tokens takes several times as long as the device computes. So any attention backend is served; where one claims
``graph_safe_prompts``, such steps are captured whole (:mod:`drivetrain.serving.prompt_graphs`).

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
from drivetrain.serving.graphs import CapturedSteps, StepParts, TokenBuffers, token_sizes
from drivetrain.serving.packing import StepInputs

CapturePieces = Callable[[Callable[[Callable[[Callable[[], None]], None]], None]], Callable[[], None]]
"""``CapturesPieces.capture_pieces``."""


class StepPieces(CapturedSteps):
    """Any steps, captured but for their attention."""

    unit = "tokens"

    def __init__(self, capture: CapturePieces, parts: StepParts) -> None:
        super().__init__(parts, token_sizes(parts.limits.max_tokens))
        self._capture = capture
        self._tokens = TokenBuffers(self._sizes[-1], parts.limits, parts.device)
        self._exchange = _Exchange(self._sizes[-1])

    def takes(self, inputs: StepInputs) -> bool:
        """Whether the step is one of those that are captured."""
        return len(inputs.ids_T) <= self._sizes[-1]

    def run(self, inputs: StepInputs) -> torch.Tensor:
        """The hidden states behind the step's tokens, [T, E], good until the next call. Raises GraphCaptureError."""
        parts, count = self._parts, len(inputs.ids_T)
        self._tokens.fill(inputs)
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
        ids_t, positions_t = self._tokens.ids_M[:size], self._tokens.positions_M[:size]
        # Of this step nothing is attended to: it only tells where keys and values go.
        pages = parts.attention.begin(parts.spec, self._one_prompt(size), parts.cache)
        kind = _WritesItself if isinstance(pages, TakesWritten) else _Interrupted

        def compute(between: Callable[[Callable[[], None]], None]) -> None:
            step = kind(pages, self._exchange, between)
            hidden_tE = parts.model.forward(ids_t, positions_t, step)
            self._exchange.keep("hidden", hidden_tE)

        compute(lambda work: None)
        return functools.partial(self._capture, compute)

    def _one_prompt(self, size: int) -> AttentionBatch:
        """A batch that has a captured size's tokens as one prompt in blocks of nobody."""
        limits, device = self._parts.limits, self._parts.device
        shape = (1, math.ceil(size / limits.block_size))
        tables = (torch.full(shape, block, dtype=torch.int32, device=device) for block in limits.scratch_blocks)
        return AttentionBatch(
            query_lengths=[size],
            context_lengths=[0],
            query_starts=torch.arange(2, dtype=torch.int32, device=device) * size,
            kv_lengths=torch.full((1,), size, dtype=torch.int32, device=device),
            block_tables=tuple(tables),
            slots=self._tokens.slots(size),
        )


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
