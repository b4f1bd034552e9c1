"""Runs the model for one step: packs the granted tokens flat, computes, and picks the rows whose logits are wanted.

Shapes: T tokens of the step; S sequences; N rows whose logits are wanted; V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from drivetrain.contracts.attention import AttentionBackend, AttentionBatch, KVCache
from drivetrain.contracts.model import CausalLM
from drivetrain.serving.blocks import KVManager
from drivetrain.serving.request import Request


@dataclass(frozen=True)
class Scheduled:
    """A request and how many of its pending tokens this step computes."""

    request: Request
    num_tokens: int

    @property
    def gives_token(self) -> bool:
        """Whether the step reaches the end of what is known, so that the next token can be chosen."""
        return self.num_tokens == self.request.pending_tokens


@dataclass(frozen=True)
class StepInputs:
    """One step, packed.

    sampling:       requests that get a token, in the order of their rows among the logits.
    prompt_rows:    (request, first row, first position, count): rows that score the prompt tokens after each position.
    """

    ids_T: torch.Tensor
    positions_T: torch.Tensor
    attention: AttentionBatch
    rows_N: torch.Tensor
    sampling: list[Request]
    prompt_rows: list[tuple[Request, int, int, int]]


class ModelRunner:
    """Owns the model, its attention backend and the cache on the device."""

    def __init__(
        self,
        model: CausalLM,
        attention: AttentionBackend,
        num_blocks: Sequence[int],
        device: torch.device,
    ) -> None:
        self.model = model
        self.attention = attention
        self.device = device
        self.spec = model.spec.attention
        self.cache: KVCache = attention.allocate(self.spec, num_blocks, device)

    def exchange(self, model: CausalLM, attention: AttentionBackend, cache: KVCache) -> None:
        """Use other parts from the next step on; ``cache`` is one that ``attention`` can read."""
        self.model, self.attention, self.cache = model, attention, cache

    def clear_blocks(self, kv: KVManager, blocks: Sequence[Sequence[int]]) -> None:
        """Make these blocks of each KV group finite again."""
        for group, own in zip(kv.groups, blocks, strict=True):
            if own:
                self.attention.clear_blocks(self.cache, group, own)

    def prepare(self, scheduled: Sequence[Scheduled], kv: KVManager) -> StepInputs:
        """Pack the step. Python's work is a few operations a request, whatever its length."""
        lengths = np.fromiter((item.num_tokens for item in scheduled), dtype=np.int64, count=len(scheduled))
        contexts = np.fromiter((item.request.num_computed for item in scheduled), dtype=np.int64, count=len(scheduled))
        starts = np.zeros(len(scheduled) + 1, dtype=np.int64)
        np.cumsum(lengths, out=starts[1:])
        ids: list[int] = []
        for item in scheduled:
            begin = item.request.num_computed
            ids += item.request.tokens[begin : begin + item.num_tokens]
        # Position of each token: where its sequence stands, plus how far into this step's share it is.
        positions = np.arange(starts[-1]) + np.repeat(contexts - starts[:-1], lengths)
        tables, slots = self._addresses(scheduled, kv, lengths, contexts, positions)
        rows, sampling, prompt_rows = _wanted_rows(scheduled, starts)
        attention = AttentionBatch(
            query_lengths=lengths.tolist(),
            context_lengths=contexts.tolist(),
            query_starts=self._to_device(starts.astype(np.int32)),
            kv_lengths=self._to_device((contexts + lengths).astype(np.int32)),
            block_tables=tables,
            slots=slots,
        )
        return StepInputs(
            self._to_device(np.asarray(ids, dtype=np.int64)),
            self._to_device(positions),
            attention,
            self._to_device(np.asarray(rows, dtype=np.int64)),
            sampling,
            prompt_rows,
        )

    def forward(self, inputs: StepInputs) -> torch.Tensor:
        """Compute the step and return the wanted logits, [N, V]."""
        step = self.attention.begin(self.spec, inputs.attention, self.cache)
        hidden_TE = self.model.forward(inputs.ids_T, inputs.positions_T, step)
        return self.model.logits(hidden_TE.index_select(0, inputs.rows_N))

    def copy_blocks(self, kv: KVManager) -> None:
        """Carry out the block copies that the manager decided on."""
        for group, runs in zip(kv.groups, kv.take_copies(), strict=True):
            for pairs in runs:
                self.attention.copy_blocks(self.cache, group, pairs)

    def _addresses(
        self,
        scheduled: Sequence[Scheduled],
        kv: KVManager,
        lengths: np.ndarray,
        contexts: np.ndarray,
        positions: np.ndarray,
    ) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """Block tables, and the slot each new token is written to, for each KV group."""
        table_rows = np.fromiter((_row(item.request) for item in scheduled), dtype=np.int64, count=len(scheduled))
        widest = -(-int((contexts + lengths).max()) // kv.block_size)
        row_of_token = np.repeat(np.arange(len(scheduled)), lengths)
        tables, slots = [], []
        for table in kv.tables:
            table_SB = table[table_rows, :widest]
            blocks = table_SB[row_of_token, positions // kv.block_size].astype(np.int64)
            tables.append(self._to_device(table_SB))
            slots.append(self._to_device(blocks * kv.block_size + positions % kv.block_size))
        return tuple(tables), tuple(slots)

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)


def _row(request: Request) -> int:
    assert request.blocks is not None, f"{request.name} runs without blocks"
    return request.blocks.row


def _wanted_rows(
    scheduled: Sequence[Scheduled], starts: np.ndarray
) -> tuple[list[int], list[Request], list[tuple[Request, int, int, int]]]:
    """Rows of the flat batch whose logits are wanted: those that give a token first, then those that score prompts."""
    rows: list[int] = []
    sampling: list[Request] = []
    for index, item in enumerate(scheduled):
        if item.gives_token:
            rows.append(int(starts[index + 1]) - 1)
            sampling.append(item.request)
    prompt_rows: list[tuple[Request, int, int, int]] = []
    for index, item in enumerate(scheduled):
        request = item.request
        if request.wants_prompt_logprobs:
            # Position p scores token p + 1, so the prompt's last position scores nothing of the prompt.
            count = min(item.num_tokens, request.num_prompt_tokens - 1 - request.num_computed)
            if count > 0:
                prompt_rows.append((request, len(rows), request.num_computed, count))
                rows += range(int(starts[index]), int(starts[index]) + count)
    return rows, sampling, prompt_rows
