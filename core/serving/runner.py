"""Runs the model for one step: packs the granted tokens, computes, and picks the rows whose logits are wanted.

Shapes: N rows whose logits are wanted; V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from drivetrain.contracts.attention import AttentionBackend, KVCache
from drivetrain.contracts.model import CausalLM
from drivetrain.serving.blocks import KVManager
from drivetrain.serving.packing import Scheduled, StepBuffers, StepInputs, bytes_of_step, pack
from drivetrain.serving.request import Request

Copies = Sequence[Sequence[Sequence[tuple[int, int]]]]
"""For each KV group the runs of (source, destination) that ``KVManager.take_copies`` gives."""


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
        # Two sets: the next step is packed while one still runs.
        self._buffers = (StepBuffers(device), StepBuffers(device))
        self._next_buffers = itertools.cycle(self._buffers)

    def exchange(self, model: CausalLM, attention: AttentionBackend, cache: KVCache) -> None:
        """Use other parts from the next step on; ``cache`` is one that ``attention`` can read."""
        self.model, self.attention, self.cache = model, attention, cache

    def reserve(self, kv: KVManager, max_batched_tokens: int, max_running: int) -> None:
        """Make the buffers for steps within these limits."""
        for buffers in self._buffers:
            buffers.reserve(bytes_of_step(kv, max_batched_tokens, max_running))

    def clear_blocks(self, kv: KVManager, blocks: Sequence[Sequence[int]]) -> None:
        """Make these blocks of each KV group finite again."""
        for group, own in zip(kv.groups, blocks, strict=True):
            if own:
                self.attention.clear_blocks(self.cache, group, own)

    def prepare(self, scheduled: Sequence[Scheduled], kv: KVManager, before: Sequence[Request] = ()) -> StepInputs:
        """Pack the step. ``before``: whose tokens a step that still runs chooses, in the order of its rows."""
        return pack(scheduled, kv, next(self._next_buffers), before)

    def forward(self, inputs: StepInputs) -> torch.Tensor:
        """Compute the step and return the wanted logits, [N, V]."""
        step = self.attention.begin(self.spec, inputs.attention, self.cache)
        hidden_TE = self.model.forward(inputs.ids_T, inputs.positions_T, step)
        return self.model.logits(hidden_TE.index_select(0, inputs.rows_N))

    def copy_blocks(self, kv: KVManager, copies: Copies | None = None) -> None:
        """Carry out the block copies that the manager decided on: all that are pending, or those taken before."""
        for group, runs in zip(kv.groups, kv.take_copies() if copies is None else copies, strict=True):
            for pairs in runs:
                self.attention.copy_blocks(self.cache, group, pairs)
