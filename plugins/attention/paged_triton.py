"""Attention in Triton: flash attention for prompts and training, split decode attention, over the plain paged cache.

A step is planned once for all layers: prompts are cut into tiles of queries, decodes into chunks of keys
(:mod:`drivetrain.kernels.triton.flash`, :mod:`drivetrain.kernels.triton.decode`). Plans are lists of a few integers a
tile, so a batch of any lengths is one launch of each kernel. Chunks are listed by the device, and tiles too where only
it knows the lengths. So of a step of decodes, and of one with prompts whose batch is open, the host knows no more than
how many sequences and tokens there are: it may be recorded and replayed with other lengths, blocks and tokens.

Shapes: T query tokens of a step; S sequences; H query heads; G key/value heads; D head size; B blocks of the cache; N
tokens in a block.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import Field

from drivetrain.contracts.attention import (
    FULL_KV,
    SCALED_KV,
    AnyPagedCache,
    AttentionBatch,
    AttentionSpec,
    AttentionStep,
    LayerAttention,
    LayerPages,
    PagedCache,
    ScaledPages,
)
from drivetrain.contracts.plugin import Probe, ProbeContext, Tier
from drivetrain.errors import EngineError
from drivetrain.kernels.triton import tuner_of
from drivetrain.kernels.triton.availability import DTYPES, probe
from drivetrain.kernels.triton.tuning import DEFAULT_FOLDER, Choice, rows_class
from drivetrain.pages import PagedBackend, PagedConfig, Pages, tensors_of

if TYPE_CHECKING:
    from drivetrain.kernels.triton.decode import Chunks
    from drivetrain.kernels.triton.flash_backward import BackwardInputs
    from drivetrain.kernels.triton.tuning import Blocks, Tuner

MAX_HEAD_SIZE = 256
"""A tile of queries and its sums lie in the registers of one program."""

_WORTH_TIMING_ROWS = 2048
"""Rows (tokens times heads) from which on a step tells something about block sizes."""

_WORTH_TIMING_KEYS = 65536
"""Keys (tokens times key/value heads) from which on a cache tells something about block sizes for decodes."""


class PagedTritonConfig(PagedConfig):
    """Settings of the paged-triton backend."""

    block_size: int = Field(16, ge=1, description="Tokens in a block of the cache; 16 or more read fastest.")
    chunk_size: int | None = Field(
        None,
        ge=1,
        description="Keys of a sequence that a program of a decode takes; unset divides a step's keys over the device.",
    )
    tune: bool = Field(True, description="Time block sizes on a GPU once for each head size and keep the fastest.")
    record: Path = Field(DEFAULT_FOLDER, description="Folder of the files that keep what was fastest.")
    hopper_kernels: bool = Field(
        True,
        description="On Hopper GPUs, take the kernels written for them where they apply; no takes those for all GPUs, "
        "whose gradients have the same bits in every run.",
    )


# --- the plan of one step ------------------------------------------------------------------------------------------


class StepPlan:
    """How one step's queries and keys are cut.

    has_prefills: whether there are, or may be, sequences with several new tokens; without a cache all are such.
    has_decodes:  whether there are, or may be, others.
    """

    def __init__(self, batch: AttentionBatch, has_cache: bool, chunk_size: int | None) -> None:
        self.batch = batch
        self.device = batch.query_starts.device
        self.lengths = np.asarray(batch.query_lengths, dtype=np.int64)
        self.contexts = np.asarray(batch.context_lengths, dtype=np.int64)
        self._prefills = np.flatnonzero((self.lengths != 1) | (not has_cache))
        self.has_prefills = batch.num_tokens > 1 if batch.is_open else len(self._prefills) > 0
        self.has_decodes = batch.is_open or len(self._prefills) < len(self.lengths)
        self._chunk_size = chunk_size
        self._tiles: dict[tuple[int, int], torch.Tensor] = {}
        self._hopper_tiles: dict[tuple[str, int, int], torch.Tensor] = {}
        self._chunks: dict[tuple[int | None, int], Chunks] = {}

    def tiles(self, rows_of_token: int, rows_of_tile: int) -> torch.Tensor:
        """int32 [tiles, 2]: sequence and first row of each tile of the prefills, those with most keys first; -1 where
        there is none."""
        key = (rows_of_token, rows_of_tile)
        if key not in self._tiles:
            self._tiles[key] = self._listed_by_device(*key) if self.batch.is_open else self._listed_by_host(*key)
        return self._tiles[key]

    def _listed_by_device(self, rows_of_token: int, rows_of_tile: int) -> torch.Tensor:
        from drivetrain.kernels.triton import flash

        return flash.list_tiles(self.batch, rows_of_token, rows_of_tile)

    def _listed_by_host(self, rows_of_token: int, rows_of_tile: int) -> torch.Tensor:
        counts = -(-self.lengths[self._prefills] * rows_of_token // rows_of_tile)
        sequences = np.repeat(self._prefills, counts)
        first_rows = _within(counts) * rows_of_tile
        last_key = self.contexts[sequences] + (first_rows + rows_of_tile) // rows_of_token
        order = np.argsort(-last_key, kind="stable")
        return self._on_device(np.stack((sequences[order], first_rows[order]), axis=1))

    def hopper_tiles(self, direction: Literal["forward", "backward"], layer: LayerAttention) -> torch.Tensor:
        """int32 [tiles, 5] of all sequences, for :mod:`drivetrain.kernels.triton.hopper`; no sequence has context."""
        key = (direction, layer.num_heads, layer.num_kv_heads)
        if key not in self._hopper_tiles:
            self._hopper_tiles[key] = self._on_device(self._cut_for_hopper(direction, layer))
        return self._hopper_tiles[key]

    def _cut_for_hopper(self, direction: str, layer: LayerAttention) -> np.ndarray[Any, Any]:
        from drivetrain.kernels.triton import hopper
        from drivetrain.kernels.triton.launch import num_processors

        processors = num_processors(self.device)
        if direction == "backward":
            return hopper.backward_tiles(self.lengths, layer.num_kv_heads, processors)
        return hopper.forward_tiles(self.lengths, layer.num_heads, layer.num_kv_heads, processors)

    @functools.cached_property
    def hopper_places(self) -> int:
        """Places for the logarithms of a head's rows."""
        from drivetrain.kernels.triton import hopper

        return hopper.num_places(self.lengths)

    def chunks(self, layer: LayerAttention, longest: int) -> Chunks:
        """The keys of the decodes, cut so that every processor has work.

        longest: keys that a sequence may have, as far as its table of blocks goes.
        """
        from drivetrain.kernels.triton import decode

        key = (layer.window, layer.num_kv_heads)
        if key not in self._chunks:
            self._chunks[key] = decode.cut(self.batch, *key, longest, self._chunk_size)
        return self._chunks[key]

    def _on_device(self, values: np.ndarray[Any, Any]) -> torch.Tensor:
        host = torch.from_numpy(values.astype(np.int32))
        if self.device.type == "cpu":
            return host
        return host.pin_memory().to(self.device, non_blocking=True)


def _within(counts: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """0 .. counts[0] - 1, 0 .. counts[1] - 1, ..., flat."""
    ends = counts.cumsum()
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts, counts)


# --- attention by the plan -----------------------------------------------------------------------------------------


class _Kernels:
    """The launches of all layers, with their blocks."""

    def __init__(self, tuner: Tuner, hopper_kernels: bool) -> None:
        from drivetrain.kernels.triton import decode, flash, flash_backward, hopper

        self.flash, self.flash_backward, self.decoding, self._tuner = flash, flash_backward, decode, tuner
        self.hopper, self._hopper_kernels = hopper, hopper_kernels
        self._choices: dict[tuple[str, LayerAttention, torch.dtype], Choice] = {}

    def prepare(self, spec: AttentionSpec, plan: StepPlan, block_size: int) -> None:
        """Make the lists that the step's layers will need, so that no layer waits for one; block_size 0: no cache."""
        dtype: torch.dtype = getattr(torch, spec.dtype)
        tables = {group.window: plan.batch.block_tables[group.index] for group in spec.groups if block_size}
        for layer in set(spec.layers):
            if block_size == 0 and self._covers_hopper(layer, dtype, plan.device):
                plan.hopper_tiles("forward", layer)
            elif plan.has_prefills:
                candidates = functools.partial(self.flash.forward_candidates, layer, dtype.itemsize)
                name = "flash" if block_size == 0 else _kernel_name("flash", spec.kv)
                blocks = self._choice(name, layer, dtype).known((block_size,), candidates)
                plan.tiles(layer.num_heads // layer.num_kv_heads, blocks["BLOCK_M"])
            if plan.has_decodes:
                plan.chunks(layer, tables[layer.window].shape[1] * block_size)

    def _covers_hopper(self, layer: LayerAttention, dtype: torch.dtype, device: torch.device) -> bool:
        if not self._hopper_kernels or torch.are_deterministic_algorithms_enabled():
            return False
        return self.hopper.covers(layer, dtype, device)

    def takes_hopper(self, layer: LayerAttention, *inputs: torch.Tensor) -> bool:
        """Whether the kernels for Hopper GPUs attend over these queries, keys and values of a step without a cache."""
        q_THD = inputs[0]
        return self._covers_hopper(layer, q_THD.dtype, q_THD.device) and all(map(self.hopper.can_be_copied, inputs))

    def prefill(
        self,
        layer: LayerAttention,
        q_THD: torch.Tensor,
        keys: Pages,
        values: Pages,
        out_THD: torch.Tensor,
        log_TH: torch.Tensor | None,
        table: torch.Tensor | None,
        plan: StepPlan,
    ) -> Callable[..., None]:
        """A launch, once its blocks are chosen."""
        starts, kv_lengths = plan.batch.query_starts, plan.batch.kv_lengths

        def with_blocks(blocks: Blocks) -> Callable[..., None]:
            tiles = plan.tiles(layer.num_heads // layer.num_kv_heads, blocks["BLOCK_M"])
            return self.flash.Forward(layer, q_THD, keys, values, log_TH, starts, kv_lengths, table, tiles, blocks)

        def launch(blocks: Blocks) -> None:
            with_blocks(blocks)(q_THD, keys, values, out_THD)

        choice = self._choice(_kernel_name("flash", _kv_of(keys)), layer, q_THD.dtype)
        block_size = 0 if table is None else tensors_of(keys)[0].shape[1]
        worth_it = q_THD.shape[0] * q_THD.shape[1] >= _WORTH_TIMING_ROWS
        candidates = functools.partial(self.flash.forward_candidates, layer, q_THD.dtype.itemsize)
        return with_blocks(choice((block_size,), candidates, launch, worth_it))

    def write(
        self,
        layer: LayerAttention,
        keys: Pages,
        values: Pages,
        k_TGD: torch.Tensor,
        v_TGD: torch.Tensor,
        slots_T: torch.Tensor,
    ) -> None:
        num_rows = k_TGD.shape[0] * layer.num_kv_heads
        launch = functools.partial(self.decoding.write, keys, values, k_TGD, v_TGD, slots_T)
        choice = self._choice(_kernel_name("write", _kv_of(keys)), layer, k_TGD.dtype)
        candidates = functools.partial(self.decoding.write_candidates, layer.head_size)
        launch(choice((rows_class(num_rows),), candidates, launch, num_rows >= _WORTH_TIMING_ROWS))

    def decode(
        self,
        layer: LayerAttention,
        q_THD: torch.Tensor,
        keys: Pages,
        values: Pages,
        table: torch.Tensor,
        plan: StepPlan,
    ) -> Callable[..., None]:
        """A launch, once its blocks are chosen."""
        pages = tensors_of(keys)[0]
        chunks = plan.chunks(layer, table.shape[1] * pages.shape[1])
        rehearsal = self.decoding.Rehearsal(layer, q_THD, keys, values)
        choice = self._choice(_kernel_name("decode", _kv_of(keys)), layer, q_THD.dtype)
        worth_it = math.prod(pages.shape[:3]) >= _WORTH_TIMING_KEYS
        candidates = functools.partial(self.decoding.candidates, layer, q_THD.dtype.itemsize)
        blocks = choice((pages.shape[1],), candidates, rehearsal, worth_it)
        return self.decoding.Decode(layer, q_THD, keys, values, table, chunks, blocks)

    def backward(
        self, inputs: BackwardInputs, layer: LayerAttention, plan: StepPlan
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of queries, keys and values."""
        q_grad, k_grad, v_grad = (
            torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (inputs.q_THD, inputs.k_TGD, inputs.v_TGD)
        )
        worth_it = q_grad.shape[0] * q_grad.shape[1] >= _WORTH_TIMING_ROWS
        launches: dict[str, Callable[[Blocks], None]] = {
            "keys": lambda blocks: inputs.key_gradients((k_grad, v_grad), plan.tiles, blocks),
            "queries": lambda blocks: inputs.query_gradients(q_grad, plan.tiles, blocks),
        }
        for name, launch in launches.items():
            choice = self._choice(f"flash/{name}", layer, q_grad.dtype)
            candidates = functools.partial(self.flash_backward.backward_candidates, layer, q_grad.dtype.itemsize)
            launch(choice((), candidates, launch, worth_it))
        return q_grad, k_grad, v_grad

    def _choice(self, kernel: str, layer: LayerAttention, dtype: torch.dtype) -> Choice:
        key = (kernel, layer, dtype)
        choice = self._choices.get(key)
        if choice is None:
            choice = self._choices[key] = Choice(self._tuner, f"{kernel}/{_layer_class(layer, dtype)}")
        return choice


def _kv_of(keys: Pages) -> str:
    """The KV format of a layer's keys."""
    dtype = str(keys.codes.dtype).removeprefix("torch.") if isinstance(keys, ScaledPages) else None
    return next((kv for kv, (stored, _) in SCALED_KV.items() if stored == dtype), FULL_KV)


def _kernel_name(kernel: str, kv: str) -> str:
    """Which blocks are fastest depends on how keys are kept."""
    return kernel if kv == FULL_KV else f"{kernel}+{kv}"


def _layer_class(layer: LayerAttention, dtype: torch.dtype) -> str:
    """What of a layer bears on which blocks are fastest."""
    kind = f"{'windowed' if layer.window else 'full'}{'+cap' if layer.soft_cap is not None else ''}"
    return f"{str(dtype).removeprefix('torch.')}/{layer.head_size}/{layer.num_heads // layer.num_kv_heads}/{kind}"


class _Attention(torch.autograd.Function):
    """Attention of packed sequences without a cache."""

    @staticmethod
    def forward(
        context: Any,
        kernels: _Kernels,
        layer: LayerAttention,
        plan: StepPlan,
        q_THD: torch.Tensor,
        k_TGD: torch.Tensor,
        v_TGD: torch.Tensor,
    ) -> torch.Tensor:
        out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
        context.is_hopper = kernels.takes_hopper(layer, q_THD, k_TGD, v_TGD)
        if context.is_hopper:
            tiles = plan.hopper_tiles("forward", layer)
            logs = kernels.hopper.forward(layer, q_THD, k_TGD, v_TGD, out_THD, tiles, plan.hopper_places)
        else:
            logs = torch.empty(q_THD.shape[:2], dtype=torch.float32, device=q_THD.device)
            launch = kernels.prefill(layer, q_THD, k_TGD, v_TGD, out_THD, logs, None, plan)
            launch(q_THD, k_TGD, v_TGD, out_THD)
        context.kernels, context.layer, context.plan = kernels, layer, plan
        context.save_for_backward(q_THD, k_TGD, v_TGD, out_THD, logs)
        return out_THD

    @staticmethod
    def backward(context: Any, grad_THD: torch.Tensor) -> Any:
        kernels, layer, plan = context.kernels, context.layer, context.plan
        saved = context.saved_tensors
        if context.is_hopper:
            tiles = plan.hopper_tiles("forward", layer), plan.hopper_tiles("backward", layer)
            return None, None, None, *kernels.hopper.backward(layer, *saved, grad_THD, *tiles)
        inputs = kernels.flash_backward.BackwardInputs(layer, *saved, grad_THD, plan.batch.query_starts)
        return None, None, None, *kernels.backward(inputs, layer, plan)


class _Launches:
    """How layers of one kind attend in a step, over queries, keys and values that lie in memory as the first one's."""

    def __init__(
        self,
        kernels: _Kernels,
        layer: LayerAttention,
        q_THD: torch.Tensor,
        keys: Pages,
        values: Pages,
        out_THD: torch.Tensor,
        table: torch.Tensor,
        plan: StepPlan,
    ) -> None:
        self._strides = self._strides_of(q_THD, keys, values)
        self._launches: list[Callable[..., None]] = []
        if plan.has_prefills:
            self._launches.append(kernels.prefill(layer, q_THD, keys, values, out_THD, None, table, plan))
        if plan.has_decodes:
            self._launches.append(kernels.decode(layer, q_THD, keys, values, table, plan))

    def fit(self, q_THD: torch.Tensor, keys: Pages, values: Pages) -> bool:
        """Whether these lie in memory in the same way."""
        return self._strides == self._strides_of(q_THD, keys, values)

    def __call__(self, q_THD: torch.Tensor, keys: Pages, values: Pages, out_THD: torch.Tensor) -> None:
        for launch in self._launches:
            launch(q_THD, keys, values, out_THD)

    @staticmethod
    def _strides_of(q_THD: torch.Tensor, *pages: Pages) -> tuple[tuple[int, ...], ...]:
        kept = (each.codes if isinstance(each, ScaledPages) else each for each in pages)
        return q_THD.stride(), *(each.stride() for each in kept)


class PagedTritonStep:
    """Attention of one step by its plan."""

    def __init__(self, spec: AttentionSpec, plan: StepPlan, cache: AnyPagedCache | None, kernels: _Kernels) -> None:
        self._layers = spec.layers
        self._launches: dict[LayerAttention, _Launches] = {}
        self._group_of = {layer: group.index for group in spec.groups for layer in group.layers}
        self._plan, self._cache, self._kernels = plan, cache, kernels

    def attend(self, layer: int, q_THD: torch.Tensor, k_TGD: torch.Tensor, v_TGD: torch.Tensor) -> torch.Tensor:
        q_THD, k_TGD, v_TGD = (x if x.stride(2) == 1 else x.contiguous() for x in (q_THD, k_TGD, v_TGD))
        attention, plan, kernels = self._layers[layer], self._plan, self._kernels
        if self._cache is None:
            return _Attention.apply(kernels, attention, plan, q_THD, k_TGD, v_TGD)
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        kernels.write(attention, keys, values, k_TGD, v_TGD, plan.batch.slots[self._group_of[layer]])
        return self.attend_written(layer, q_THD)

    def layer_pages(self, layer: int) -> LayerPages | None:
        """Every step with full keys and values: prompts too attend over pages."""
        if not isinstance(self._cache, PagedCache):
            return None
        slots = self._plan.batch.slots[self._group_of[layer]]
        return LayerPages(self._cache.keys[layer], self._cache.values[layer], slots)

    def attend_written(self, layer: int, q_THD: torch.Tensor) -> torch.Tensor:
        assert self._cache is not None
        q_THD = q_THD if q_THD.stride(2) == 1 else q_THD.contiguous()
        attention = self._layers[layer]
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
        launches = self._launches.get(attention)
        if launches is None or not launches.fit(q_THD, keys, values):
            table = self._plan.batch.block_tables[self._group_of[layer]]
            launches = _Launches(self._kernels, attention, q_THD, keys, values, out_THD, table, self._plan)
            self._launches[attention] = launches
        launches(q_THD, keys, values, out_THD)
        return out_THD


# --- the plugin ----------------------------------------------------------------------------------------------------


class PagedTritonAttention(PagedBackend):
    """Flash attention and split decode attention in Triton, over the plain paged cache."""

    contract_version = "1.3"
    tier = Tier.TUNED
    Config = PagedTritonConfig
    config: PagedTritonConfig

    @classmethod
    def probe(cls, context: ProbeContext) -> Probe:
        answer = cls.refuses_kv(context) or probe(context)
        if answer.ok and context.model is not None:
            largest = max(layer.head_size for layer in context.model.attention.layers)
            if largest > MAX_HEAD_SIZE:
                return Probe.no(
                    "unsupported_shape",
                    f"heads of more than {MAX_HEAD_SIZE} do not fit into one program",
                    wanted=str(largest),
                    offered=str(MAX_HEAD_SIZE),
                )
            if context.model.attention.dtype not in DTYPES:
                return Probe.no(
                    "unsupported_dtype",
                    f"the kernels compute in {', '.join(DTYPES)}",
                    wanted=context.model.attention.dtype,
                    offered=", ".join(DTYPES),
                )
        return answer

    @classmethod
    def abilities(cls) -> frozenset[str]:
        graph_safe = {"graph_safe", "graph_safe_prompts"}
        return frozenset({"training", "windows", "soft_cap", "takes_written", "kv_int8", "kv_fp8", *graph_safe})

    def begin(self, spec: AttentionSpec, batch: AttentionBatch, cache: AnyPagedCache | None) -> AttentionStep:
        if cache is None and any(batch.context_lengths):
            raise EngineError(
                "a sequence has context in a cache, but no cache was given",
                where="attention/paged-triton",
                found=list(batch.context_lengths),
                allowed="context_lengths of 0",
            )
        plan = StepPlan(batch, cache is not None, self.config.chunk_size)
        self._kernels.prepare(spec, plan, 0 if cache is None else self.config.block_size)
        return PagedTritonStep(spec, plan, cache, self._kernels)

    @functools.cached_property
    def _kernels(self) -> _Kernels:
        return _Kernels(tuner_of(self.config.record, self.config.tune), self.config.hopper_kernels)
