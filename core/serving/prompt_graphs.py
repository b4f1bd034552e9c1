"""Steps with prompts, captured whole where a platform claims ``graphs`` and the attention ``graph_safe_prompts``.

Such a step is recorded once for each of a few numbers of tokens. How its tokens are divided among sequences lies in
buffers that stay where they are, and only the device reads it there (``AttentionBatch.is_open``). A replay is one
launch, and nothing of the step is left to Python but to fill the buffers.

A step is filled up to the next size that is captured: behind its sequences comes one that is nobody's and has the other
tokens, in a block that belongs to nobody, and then sequences of no tokens, up to as many as a step may have.

Shapes: T tokens and S sequences of a step; t tokens of a captured size, s sequences; M the largest t, R the largest s;
W blocks of a row of a table; E hidden size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch

from drivetrain.contracts.attention import AttentionBackend, AttentionBatch
from drivetrain.serving.graphs import Capture, CapturedSteps, GraphLimits, StepParts, TokenBuffers, token_sizes
from drivetrain.serving.packing import StepInputs


def can_capture_prompts(attention: AttentionBackend) -> bool:
    """Whether a backend's steps with prompts can be captured whole."""
    return "graph_safe_prompts" in type(attention).abilities()


class PromptGraphs(CapturedSteps):
    """Steps of any lengths, captured whole."""

    unit = "tokens"

    def __init__(self, capture: Capture, parts: StepParts) -> None:
        super().__init__(parts, token_sizes(parts.limits.max_tokens))
        self._capture = capture
        self._tokens = TokenBuffers(self._sizes[-1], parts.limits, parts.device)
        self._sequences = _SequenceBuffers(self._sizes[-1], parts.limits, parts.device)
        self._filled_for = 0
        self._hidden_ME: torch.Tensor | None = None

    def takes(self, inputs: StepInputs) -> bool:
        """Whether the step is one of those that are captured."""
        fits = inputs.attention.num_sequences <= self._parts.limits.max_running
        return fits and len(inputs.ids_T) <= self._sizes[-1]

    def run(self, inputs: StepInputs) -> torch.Tensor:
        """The hidden states behind the step's tokens, [T, E], good until the next call. Raises GraphCaptureError."""
        count = len(inputs.ids_T)
        size = self._filled_for = self._size_for(count)
        self._tokens.fill(inputs)
        self._sequences.fill(inputs.attention, count, size)
        self._replay_of(size)()
        assert self._hidden_ME is not None
        return self._hidden_ME[:count]

    def _tensor_bytes_kept(self, bytes_of_largest: int) -> int:
        """Sizes share what they hand over, and by the platform's contract the rest."""
        return bytes_of_largest

    def _rehearse(self, size: int) -> Callable[[], Callable[[], None]]:
        parts, tokens = self._parts, self._tokens
        if self._filled_for != size:  # no step of this size waits: all tokens are nobody's
            self._filled_for = size
            tokens.empty_from(0)
            self._sequences.empty(size)
        batch = self._sequences.batch(size, tokens.slots(size))

        def compute() -> None:
            step = parts.attention.begin(parts.spec, batch, parts.cache)
            hidden_tE = parts.model.forward(tokens.ids_M[:size], tokens.positions_M[:size], step)
            if self._hidden_ME is None:
                self._hidden_ME = hidden_tE.new_zeros((self._sizes[-1], *hidden_tE.shape[1:]))
            self._hidden_ME[:size].copy_(hidden_tE)

        compute()
        return functools.partial(self._capture, compute)


class _SequenceBuffers:
    """How a captured step's tokens are divided among sequences, at addresses that never change."""

    def __init__(self, most: int, limits: GraphLimits, device: torch.device) -> None:
        self._limits = limits
        rows = self._most_of(most)
        # The sequence that is nobody's may be longer than any other.
        width = max(limits.max_blocks, math.ceil(most / limits.block_size))
        self._starts = torch.zeros(rows + 1, dtype=torch.int32, device=device)
        self._kv_lengths_R = torch.zeros(rows, dtype=torch.int32, device=device)
        self._tables_RW = [
            torch.full((rows, width), block, dtype=torch.int32, device=device) for block in limits.scratch_blocks
        ]

    def _most_of(self, size: int) -> int:
        """Sequences that a step of so many tokens may have, and the one that is nobody's."""
        return min(size, self._limits.max_running) + 1

    def fill(self, batch: AttentionBatch, num_tokens: int, size: int) -> None:
        """Put a step's sequences into the first rows, and what is left of ``size`` tokens behind them."""
        count = batch.num_sequences
        self._starts[: count + 1].copy_(batch.query_starts)
        self._kv_lengths_R[:count].copy_(batch.kv_lengths)
        for table_RW, table_SW in zip(self._tables_RW, batch.block_tables, strict=True):
            table_RW[:count, : table_SW.shape[1]].copy_(table_SW)
        self._end(count, num_tokens, size)

    def empty(self, size: int) -> None:
        """All of ``size`` tokens are nobody's."""
        self._starts[:1] = 0
        self._end(0, 0, size)

    def _end(self, count: int, num_tokens: int, size: int) -> None:
        # Slices are filled on the device; a single number would be copied there, and the copy waited for.
        self._starts[count + 1 :] = size
        self._kv_lengths_R[count : count + 1] = size - num_tokens
        self._kv_lengths_R[count + 1 :] = 0
        for table_RW, scratch in zip(self._tables_RW, self._limits.scratch_blocks, strict=True):
            table_RW[count : count + 1] = scratch

    def batch(self, size: int, slots: tuple[torch.Tensor, ...]) -> AttentionBatch:
        """A batch of ``size`` tokens whose division is read when it is attended for."""
        rows = self._most_of(size)
        return AttentionBatch(
            query_lengths=[size, *[0] * (rows - 1)],
            context_lengths=[0] * rows,
            query_starts=self._starts[: rows + 1],
            kv_lengths=self._kv_lengths_R[:rows],
            block_tables=tuple(table_RW[:rows] for table_RW in self._tables_RW),
            slots=slots,
            is_open=True,
        )
