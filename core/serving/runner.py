"""Runs the model for one step: packs the granted tokens, computes, and picks the rows whose logits are wanted.

Shapes: N rows whose logits are wanted; V vocabulary.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Sequence

import torch

from drivetrain.contracts.attention import AttentionBackend, AttentionBatch, AttentionSpec, KVCache
from drivetrain.contracts.model import CausalLM, FindsMostLikely
from drivetrain.contracts.source import Progress
from drivetrain.errors import GraphCaptureError
from drivetrain.serving.blocks import KVManager
from drivetrain.serving.graphs import (
    MOST_TOKENS,
    Capture,
    CapturedSteps,
    DecodeGraphs,
    GraphLimits,
    StepParts,
    launched_sizes,
    why_no_graphs,
    with_scratch,
)
from drivetrain.serving.packing import Scheduled, StepBuffers, StepInputs, bytes_of_step, pack
from drivetrain.serving.pieces import CapturePieces, StepPieces
from drivetrain.serving.prompt_graphs import PromptGraphs, can_capture_prompts
from drivetrain.serving.request import Request
from drivetrain.serving.sampler import MostLikely

_log = logging.getLogger("drivetrain")

_FEWEST_TOKENS = 8
"""Steps of more are computed ahead where only decodes are captured."""

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
        capture: Capture | None = None,
        *,
        capture_pieces: CapturePieces | None = None,
        must_capture: bool = False,
        spec: AttentionSpec | None = None,
    ) -> None:
        """capture: records steps for replay: decodes, and where the attention backend claims it others too; None where
            the platform can't, or was told not to.
        capture_pieces: records what ``capture`` can't, but for its attention; None likewise.
        must_capture: a step that can't be recorded is an error, not run in the plain way with a warning.
        spec: the model's attention with the format in which keys and values are kept; by default the model's own.
        """
        self.model = model
        self._finder = model if isinstance(model, FindsMostLikely) else None
        self.attention = attention
        self.device = device
        self.spec = spec or model.spec.attention
        self._capture = capture
        self._capture_pieces = capture_pieces
        self._must_capture = must_capture
        self.on_fallback: Callable[[int], None] = lambda count: None
        self.cache: KVCache = attention.allocate(self.spec, self.blocks_to_allocate(num_blocks), device)
        # Two sets: the next step is packed while one still runs.
        self._buffers = (StepBuffers(device), StepBuffers(device))
        self._next_buffers = itertools.cycle(self._buffers)
        self._graph_limits: GraphLimits | None = None
        self._graphs: DecodeGraphs | None = None
        self._prompts: PromptGraphs | StepPieces | None = None

    def blocks_to_allocate(self, num_blocks: Sequence[int]) -> list[int]:
        """How many blocks a cache needs for ``num_blocks`` that sequences may get: captured steps take one more."""
        return with_scratch(num_blocks, self._capture is not None or self._capture_pieces is not None)

    def exchange(
        self,
        model: CausalLM,
        attention: AttentionBackend,
        cache: KVCache,
        kv: KVManager,
        spec: AttentionSpec | None = None,
    ) -> None:
        """Use other parts from the next step on; ``cache`` is one that ``attention`` can read, ``kv`` its books.

        spec: where keys and values are kept in another format than before.
        """
        kept = self.model is model and self.attention is attention and self.cache is cache
        self.model, self.attention, self.cache = model, attention, cache
        self._finder = model if isinstance(model, FindsMostLikely) else None
        self.spec = spec or self.spec
        if self._graph_limits is not None and not kept:
            self._plan_graphs(kv, self._graph_limits.max_tokens, self._graph_limits.max_running)

    def drop_cache(self) -> None:
        """Let go of the cache, and of steps that were captured on it. No step can run before :meth:`exchange`."""
        self.cache = None
        self._graphs = self._prompts = None

    def allocate(self, attention: AttentionBackend, spec: AttentionSpec, kv: KVManager) -> KVCache:
        """An empty cache of ``attention`` for these books, with the block that captured steps take."""
        return attention.allocate(spec, self.blocks_to_allocate([pool.total for pool in kv.pools]), self.device)

    def _plan_graphs(self, kv: KVManager, max_batched_tokens: int, max_running: int) -> None:
        """Capture steps anew, each size when it first comes."""
        scratch = tuple(pool.total for pool in kv.pools)
        limits = GraphLimits(max_running, max_batched_tokens, kv.tables[0].shape[1], kv.block_size, scratch)
        parts = StepParts(self.model, self.attention, self.spec, self.cache, limits, self.device)
        self._graph_limits, self._graphs, self._prompts = limits, None, None
        if self._capture is not None and why_no_graphs(self._capture, self.attention) is None:
            self._graphs = DecodeGraphs(self._capture, parts)
            if can_capture_prompts(self.attention):
                self._prompts = PromptGraphs(self._capture, parts)
        if self._prompts is None and self._capture_pieces is not None:
            self._prompts = StepPieces(self._capture_pieces, parts)

    def reserve(self, kv: KVManager, max_batched_tokens: int, max_running: int) -> None:
        """Make the buffers for steps within these limits."""
        max_running = min(max_running, max_batched_tokens)  # each sequence of a step has a token at least
        for buffers in self._buffers:
            buffers.reserve(bytes_of_step(kv, max_batched_tokens, max_running))
        self._plan_graphs(kv, max_batched_tokens, max_running)

    @property
    def captured(self) -> tuple[CapturedSteps, ...]:
        """The kinds of steps that are captured."""
        return tuple(steps for steps in (self._graphs, self._prompts) if steps is not None)

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
        if self._graphs is not None and self._graphs.takes(inputs):
            try:
                return self._graphs.run(inputs)
            except GraphCaptureError as error:
                self._do_without_graphs(error)
        return self.model.logits(self._wanted(inputs))

    def choose(self, inputs: StepInputs) -> torch.Tensor | MostLikely:
        """Compute the step for its most likely tokens: the scores as :meth:`forward` gives them, or the best ones alone
        where that is less work."""
        if self._finder is None or self._graphs is not None:
            return self.forward(inputs)
        hidden_NE = self._wanted(inputs)
        found = self._finder.most_likely(hidden_NE)
        return self.model.logits(hidden_NE) if found is None else MostLikely(*found)

    def _wanted(self, inputs: StepInputs) -> torch.Tensor:
        """The states behind the tokens whose logits are wanted, [N, E]."""
        hidden_TE = self._hidden(inputs)
        if inputs.attention.ends_only and inputs.rows_N.shape[0] == hidden_TE.shape[0]:
            return hidden_TE  # a decode of one token for each sequence: all rows, in their order
        return hidden_TE.index_select(0, inputs.rows_N)

    def _hidden(self, inputs: StepInputs) -> torch.Tensor:
        """The states behind all tokens of a step, [T, E]."""
        if self._prompts is not None and self._prompts.takes(inputs):
            try:
                return self._prompts.run(inputs)
            except GraphCaptureError as error:
                self._do_without_prompts(error)
        step = self.attention.begin(self.spec, inputs.attention, self.cache)
        return self.model.forward(inputs.ids_T, inputs.positions_T, step)

    def capture_ahead(self, progress: Progress) -> None:
        """Capture steps before the first request, so that none waits for it, and compute such that are not captured:
        what kernels compile or measure on first use is then there. Raises GraphCaptureError where steps must be
        captured."""
        if not self.captured:
            return
        with torch.inference_mode():
            try:
                if self._graphs is not None:
                    self._graphs.capture_ahead(progress)
            except GraphCaptureError as error:
                self._do_without_graphs(error)
            try:
                if self._prompts is not None:
                    self._prompts.capture_ahead(progress)
            except GraphCaptureError as error:
                self._do_without_prompts(error)
            self._compute_ahead(progress)

    def _compute_ahead(self, progress: Progress) -> None:
        assert self._graph_limits is not None
        most = self._graph_limits.max_tokens
        sizes = launched_sizes(most, min(most, MOST_TOKENS) if self._prompts is not None else _FEWEST_TOKENS)
        what = "computing steps that are not captured"
        for index, size in enumerate(sizes):
            progress(what, index, len(sizes), "sizes")
            try:
                self._compute_nobodys(size, self._graph_limits)
            except torch.OutOfMemoryError as error:
                told = "there is too little memory for a step of %d tokens, which will fail: lower %s (%s)"
                _log.warning(told, size, "scheduler.max_batched_tokens", error)
                return
        if sizes:
            progress(what, len(sizes), len(sizes), "sizes")

    def _compute_nobodys(self, size: int, limits: GraphLimits) -> None:
        """A prompt and a decode that are nobody's, ``size`` tokens together."""
        device, width = self.device, math.ceil(size / limits.block_size)
        lengths = [size - 1, 1]
        batch = AttentionBatch(
            query_lengths=lengths,
            context_lengths=[0, 0],
            query_starts=torch.tensor([0, size - 1, size], dtype=torch.int32, device=device),
            kv_lengths=torch.tensor(lengths, dtype=torch.int32, device=device),
            block_tables=tuple(
                torch.full((2, width), scratch, dtype=torch.int32, device=device) for scratch in limits.scratch_blocks
            ),
            slots=tuple(
                torch.full((size,), scratch * limits.block_size, dtype=torch.int64, device=device)
                for scratch in limits.scratch_blocks
            ),
        )
        tokens_T = torch.zeros(size, dtype=torch.int64, device=device)
        hidden_TE = self.model.forward(tokens_T, tokens_T, self.attention.begin(self.spec, batch, self.cache))
        self.model.logits(hidden_TE[-2:])

    def _do_without_graphs(self, error: GraphCaptureError) -> None:
        """What a decode step can't be recorded for lies in other steps too."""
        self._fall_back(error)
        self._graphs = self._prompts = None

    def _do_without_prompts(self, error: GraphCaptureError) -> None:
        self._fall_back(error)
        self._prompts = None

    def _fall_back(self, error: GraphCaptureError) -> None:
        """Raise the error, or tell that such steps are launched one by one from now on."""
        if self._must_capture:
            raise error
        _log.warning("%s; such steps are run without graphs from now on", error)
        self.on_fallback(1)

    def copy_blocks(self, kv: KVManager, copies: Copies | None = None) -> None:
        """Carry out the block copies that the manager decided on: all that are pending, or those taken before."""
        for group, runs in zip(kv.groups, kv.take_copies() if copies is None else copies, strict=True):
            for pairs in runs:
                self.attention.copy_blocks(self.cache, group, pairs)
