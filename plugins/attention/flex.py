"""FlexAttention over the paged cache of ``sdpa``: masks that no other kernel covers, compiled by torch.

Shapes: T query tokens of one step, padded to at least 2; S sequences; H query heads; G key/value heads; D head size; B
blocks of the cache; N tokens in a block; L = B * N slots of the cache, or the step's tokens when there is none; M tiles
of 128 queries; P pairs of a sequence and a tile that holds some of its queries; W blocks of the longest sequence.

The whole cache is the keys and values of one call, and nothing is gathered: a block mask lists for each tile of queries
the blocks that any of them sees, and a mask function decides slot by slot. What a step's sequences look like is in
tensors that the mask function reads, padded to sizes that seldom change, so one compiled program serves every step.
"""

from __future__ import annotations

import functools
import importlib
import os
import shutil
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from pydantic import Field, field_validator
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from drivetrain.contracts.attention import (
    PAGED_BNGD,
    AnyPagedCache,
    AttentionBatch,
    AttentionSpec,
    AttentionStep,
    KVContract,
    KVGroup,
    LayerAttention,
    LayerPages,
    PagedCache,
    ScaledCache,
)
from drivetrain.contracts.plugin import Probe, ProbeContext, Purpose, Tier
from drivetrain.errors import ConfigError, EngineError, KernelBuildError
from drivetrain.pages import PagedConfig, write_tokens
from drivetrain.plugins.attention.sdpa import SdpaAttention

_TILE = 128
"""Queries in a tile of the block mask; without a cache, keys too. torch's own default."""

_LEAST_TOKENS = 2048
_LEAST_BLOCKS = 2**16
"""Least sizes of the tensors that the mask function reads. They are constants of the compiled program (torch 2.13 can't
compile a mask for CPUs that reads tensors of varying size), so they grow by powers of two."""

_DTYPES = ("float32", "bfloat16", "float16")

Sees = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Positions of queries and of keys in their sequence, int64 -> whether the query may see the key; broadcasts."""


class FlexConfig(PagedConfig):
    """Settings of the flex backend."""

    block_size: int = Field(
        16, ge=16, description="Tokens in a block of the cache, at least the 16 of a GPU's smallest matrix product."
    )
    chunk: int | None = Field(
        None,
        ge=1,
        description="Every query sees only keys of its own chunk of this many positions; null leaves that out. It "
        "narrows what the model's own windows allow.",
    )
    mask: str | None = Field(
        None,
        description="MODULE:FUNCTION that narrows what a query sees. It is called with the positions of queries and "
        "keys in their sequence, int64 tensors that broadcast, and returns where the key may be seen; it must be plain "
        "torch without branches on values. Null leaves the model's own mask.",
    )

    @field_validator("mask")
    @classmethod
    def _check_form(cls, value: str | None) -> str | None:
        if value is not None:
            module, _, name = value.partition(":")
            if not all(part.isidentifier() for part in (*module.split("."), name)):
                raise ValueError("must be of the form MODULE:FUNCTION")
        return value


def _find_mask(name: str) -> Sees:
    """Raises ConfigError when there is no such function."""
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"the mask can't be imported: {error}", where="attention.mask", found=name) from error
    if not callable(found):
        raise ConfigError("the mask is no function", where="attention.mask", found=name)
    return found


# --- the compiled programs -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Program:
    """What one compiled program is for; everything else about a step may vary."""

    device_type: str
    dtype: torch.dtype
    num_heads: int
    num_kv_heads: int
    head_size: int
    is_capped: bool
    block_size: int | None
    mask: str | None
    needs_gradients: bool

    @classmethod
    def of(cls, layer: LayerAttention, q_THD: torch.Tensor, block_size: int | None, config: FlexConfig) -> Self:
        return cls(
            q_THD.device.type,
            q_THD.dtype,
            layer.num_heads,
            layer.num_kv_heads,
            layer.head_size,
            layer.soft_cap is not None,
            block_size,
            config.mask,
            torch.is_grad_enabled(),
        )


def _attend(
    q_1HTD: torch.Tensor,
    k_1GLD: torch.Tensor,
    v_1GLD: torch.Tensor,
    score: Callable[..., torch.Tensor],
    mask: BlockMask,
    options: Any,
) -> Any:
    is_grouped = q_1HTD.shape[1] != k_1GLD.shape[1]
    return flex_attention(q_1HTD, k_1GLD, v_1GLD, score, mask, 1.0, is_grouped, kernel_options=options)


@functools.cache
def _compiled(program: _Program) -> Callable[..., torch.Tensor]:
    """torch keeps a bounded number of programs for one code object and then stops compiling, so each has its own."""
    own = types.FunctionType(_attend.__code__.replace(co_name=f"attend_{abs(hash(program))}"), globals())
    compiled: Callable[..., torch.Tensor] = torch.compile(own, dynamic=True, fullgraph=True)
    return compiled


def _is_build_error(error: RuntimeError) -> bool:
    # Imported late: together they take longer to import than torch itself.
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import InvalidCxxCompiler

    return isinstance(error, TorchDynamoException | InvalidCxxCompiler)


def _build_error(error: Exception) -> KernelBuildError:
    said = " ".join([line.strip() for line in str(error).splitlines() if line.strip()][:2])
    return KernelBuildError(
        f"torch could not compile FlexAttention: {said or type(error).__name__}",
        output=str(error),
        where="attention/flex",
        hint="Install g++ (on a CPU) or choose attention=sdpa, which needs no compiler. All that was said is in the "
        "error's output.",
    )


def _static(tensor: torch.Tensor) -> torch.Tensor:
    torch._dynamo.mark_static(tensor)
    return tensor


def _varying(tensor: torch.Tensor, *dims: int) -> torch.Tensor:
    for dim in dims:
        torch._dynamo.maybe_mark_dynamic(tensor, dim)
    return tensor


def _score_of(layer: LayerAttention, device: torch.device) -> Callable[..., torch.Tensor]:
    """Scale and soft cap of a layer. They are read from tensors, since a number would be a constant of the program."""
    scale_H = _static(torch.full((layer.num_heads,), layer.scale, device=device))
    if layer.soft_cap is None:

        def scaled(s: torch.Tensor, b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            return s * scale_H[h]

        return scaled
    cap_H = _static(torch.full((layer.num_heads,), layer.soft_cap, device=device))

    def capped(s: torch.Tensor, b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return cap_H[h] * torch.tanh(s * scale_H[h] / cap_H[h])

    return capped


# --- the plan of one step ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rows:
    """Where the step's tokens stand, on the host; all int64.

    sequence_T: the sequence of each token.
    last_T:     its own position in the sequence, which is the last that it sees.
    first_T:    the first position that it sees.
    """

    sequence_T: np.ndarray
    last_T: np.ndarray
    first_T: np.ndarray

    @classmethod
    def of(cls, batch: AttentionBatch, window: int | None, chunk: int | None) -> Self:
        lengths = np.asarray(batch.query_lengths, dtype=np.int64)
        sequence_T = np.repeat(np.arange(lengths.size), lengths)
        starts = lengths.cumsum() - lengths
        own = np.arange(sequence_T.size) - starts[sequence_T]
        last_T = np.asarray(batch.context_lengths, dtype=np.int64)[sequence_T] + own
        first_T = np.zeros_like(last_T) if window is None else np.maximum(0, last_T - window + 1)
        if chunk is not None:
            first_T = np.maximum(first_T, last_T // chunk * chunk)
        return cls(sequence_T, last_T, first_T)

    @property
    def num_tokens(self) -> int:
        """At least 2: a size of 1 would be a program of its own."""
        return max(2, self.last_T.size)

    @property
    def num_tiles(self) -> int:
        """At least 2, likewise."""
        return max(2, -(-self.last_T.size // _TILE))

    def pairs(self) -> np.ndarray:
        """[4, P]: tile, sequence, and the first and last position that any of the sequence's queries in it sees."""
        tile_T = np.arange(self.last_T.size) // _TILE
        is_new = np.ones(tile_T.size, dtype=bool)
        is_new[1:] = (tile_T[1:] != tile_T[:-1]) | (self.sequence_T[1:] != self.sequence_T[:-1])
        begin = np.flatnonzero(is_new)
        end = np.append(begin[1:], tile_T.size) - 1
        # Both bounds only grow along a sequence.
        return np.stack((tile_T[begin], self.sequence_T[begin], self.first_T[begin], self.last_T[end]))


def _padded(values: np.ndarray, fill: int, device: torch.device) -> torch.Tensor:
    """A tensor of a size that seldom changes, with ``fill`` behind the values."""
    size = max(_LEAST_TOKENS, 1 << (values.size - 1).bit_length())
    out = np.full(size, fill, dtype=np.int64)
    out[: values.size] = values
    return _static(torch.from_numpy(out).to(device))


def _block_mask(
    seen_MB: torch.Tensor, lengths: tuple[int, int], tile: tuple[int, int], mask: Callable[..., Any], gradients: bool
) -> BlockMask:
    """The block mask with the blocks that are seen; rows of ``seen_MB`` have one column too many, which is left out.

    lengths: of the queries and the keys.
    """
    seen_MB = seen_MB[:, :-1]
    num_tiles, num_blocks = seen_MB.shape
    place_MB = torch.where(seen_MB, seen_MB.cumsum(1) - 1, num_blocks)
    indices_MB = torch.zeros(num_tiles, num_blocks + 1, dtype=torch.int32, device=seen_MB.device)
    blocks_MB = torch.arange(num_blocks, dtype=torch.int32, device=seen_MB.device).expand(num_tiles, -1)
    indices_MB.scatter_(1, place_MB, blocks_MB)
    return BlockMask.from_kv_blocks(
        _varying(seen_MB.sum(1, dtype=torch.int32)[None, None], 2),
        _varying(indices_MB[None, None, :, :-1].contiguous(), 2, 3),
        BLOCK_SIZE=tile,
        mask_mod=mask,
        seq_lengths=lengths,
        compute_q_blocks=gradients,
    )


def _mask_over_cache(rows: _Rows, table_SW: torch.Tensor, num_blocks: int, size: int, sees: Sees | None) -> BlockMask:
    device = table_SW.device
    num_sequences = table_SW.shape[0]
    pairs = rows.pairs()
    tile_P, sequence_P, first_P, last_P = torch.from_numpy(pairs).to(device)
    columns_W = torch.arange(table_SW.shape[1], device=device)
    is_seen_PW = (columns_W >= (first_P // size)[:, None]) & (columns_W <= (last_P // size)[:, None])
    blocks_PW = table_SW.long()[sequence_P]
    seen_MB = torch.zeros(rows.num_tiles, num_blocks + 1, dtype=torch.bool, device=device)
    seen_MB[tile_P[:, None], torch.where(is_seen_PW, blocks_PW, num_blocks)] = True
    # For every sequence and block of the cache, the number that the block has in the sequence.
    count = num_sequences * num_blocks
    number = torch.full((max(_LEAST_BLOCKS, 1 << count.bit_length()),), -1, dtype=torch.int64, device=device)
    place_PW = torch.where(is_seen_PW, sequence_P[:, None] * num_blocks + blocks_PW, count)
    number[place_PW] = columns_W.expand(place_PW.shape)
    number = _static(number)
    row_T = _padded(rows.sequence_T * num_blocks, 0, device)
    first_T, last_T = _padded(rows.first_T, 0, device), _padded(rows.last_T, -1, device)

    def mask(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        # A block that is not the sequence's has number -1, which puts all its slots before the first position.
        position = number[row_T[q] + k // size] * size + k % size
        is_visible = (position >= first_T[q]) & (position <= last_T[q])
        return is_visible if sees is None else is_visible & sees(last_T[q], position)

    return _block_mask(seen_MB, (rows.num_tokens, num_blocks * size), (_TILE, size), mask, False)


def _mask_over_step(rows: _Rows, device: torch.device, sees: Sees | None, gradients: bool) -> BlockMask:
    """Without a cache: slot and row are the same, so a sequence's first row takes the place of its table."""
    own_T = np.arange(rows.last_T.size)
    start_T = _padded(own_T - rows.last_T, 0, device)
    first_T, last_T = _padded(own_T - rows.last_T + rows.first_T, 0, device), _padded(own_T, -1, device)
    tile_P, sequence_P, first_P, last_P = rows.pairs()
    begin_S = (own_T - rows.last_T)[np.searchsorted(rows.sequence_T, sequence_P)]
    seen_MM = np.zeros((rows.num_tiles, rows.num_tiles + 1), dtype=bool)
    for tile, begin, first, last in zip(tile_P, begin_S, first_P, last_P, strict=True):
        seen_MM[tile, (begin + first) // _TILE : (begin + last) // _TILE + 1] = True

    def mask(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        is_visible = (k >= first_T[q]) & (k <= last_T[q])
        return is_visible if sees is None else is_visible & sees(last_T[q] - start_T[q], k - start_T[q])

    lengths = (rows.num_tokens, rows.num_tokens)
    return _block_mask(torch.from_numpy(seen_MM).to(device), lengths, (_TILE, _TILE), mask, gradients)


# --- the step ------------------------------------------------------------------------------------------------------


def _as_batch(x_THD: torch.Tensor) -> torch.Tensor:
    """[T, H, D] -> [1, H, T, D], with at least two tokens."""
    if x_THD.shape[0] == 1:
        x_THD = torch.cat((x_THD, torch.zeros_like(x_THD)))
    return _varying(x_THD.contiguous().transpose(0, 1).unsqueeze(0), 2)


class FlexStep:
    """Attention of one step: one call a layer over the whole cache."""

    def __init__(
        self,
        spec: AttentionSpec,
        config: FlexConfig,
        scores: Sequence[Callable[..., torch.Tensor]],
        masks: Sequence[BlockMask],
        batch: AttentionBatch,
        cache: PagedCache | None,
    ) -> None:
        self._layers = spec.layers
        self._config = config
        self._cache = cache
        self._device = batch.query_starts.device
        self._group_of_layer = {layer: group.index for group in spec.groups for layer in group.layers}
        self._scores, self._masks = scores, masks
        self._slots = batch.slots
        # A GPU's kernel steps through keys in pieces that a block must hold whole.
        piece = _TILE if cache is None else min(64, config.block_size)
        self._options = None if self._device.type == "cpu" else {"BLOCK_N": min(64, piece)}

    def attend(self, layer: int, q_THD: torch.Tensor, k_TGD: torch.Tensor, v_TGD: torch.Tensor) -> torch.Tensor:
        if self._cache is None:
            self._refuse_gradients(q_THD, k_TGD, v_TGD)
            return self._run(layer, q_THD, _as_batch(k_TGD), _as_batch(v_TGD))
        slots = self._slots[self._group_of_layer[layer]]
        write_tokens(self._cache.keys[layer], slots, k_TGD)
        write_tokens(self._cache.values[layer], slots, v_TGD)
        return self.attend_written(layer, q_THD)

    def layer_pages(self, layer: int) -> LayerPages | None:
        if self._cache is None:
            return None
        return LayerPages(self._cache.keys[layer], self._cache.values[layer], self._slots[self._group_of_layer[layer]])

    def attend_written(self, layer: int, q_THD: torch.Tensor) -> torch.Tensor:
        assert self._cache is not None
        stores = (self._cache.keys[layer], self._cache.values[layer])
        k_1GLD, v_1GLD = (_varying(x.flatten(0, 1).transpose(0, 1).unsqueeze(0), 2) for x in stores)
        return self._run(layer, q_THD, k_1GLD, v_1GLD)

    def _run(self, layer: int, q_THD: torch.Tensor, k_1GLD: torch.Tensor, v_1GLD: torch.Tensor) -> torch.Tensor:
        block_size = None if self._cache is None else self._config.block_size
        run = _compiled(_Program.of(self._layers[layer], q_THD, block_size, self._config))
        mask = self._masks[self._group_of_layer[layer]]
        try:
            o_1HTD = run(_as_batch(q_THD), k_1GLD, v_1GLD, self._scores[layer], mask, self._options)
        except RuntimeError as error:
            if _is_build_error(error):
                raise _build_error(error) from error
            raise
        return o_1HTD[0].transpose(0, 1)[: q_THD.shape[0]]

    def _refuse_gradients(self, *tensors: torch.Tensor) -> None:
        if self._device.type == "cpu" and torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            raise EngineError(
                "torch's FlexAttention has no backward on CPUs",
                where="attention/flex",
                hint="Train with attention=sdpa.",
            )


# --- the plugin ----------------------------------------------------------------------------------------------------


class FlexAttention(SdpaAttention):
    """torch's FlexAttention over the paged cache of sdpa, compiled on first use: chunks and masks of one's own."""

    tier = Tier.PORTABLE
    Config = FlexConfig
    config: FlexConfig

    @classmethod
    def abilities(cls) -> frozenset[str]:
        """Those of sdpa but for KV formats: torch's programs take keys and values as they are."""
        return super().abilities() - {"kv_int8", "kv_fp8"}

    @classmethod
    def probe(cls, context: ProbeContext) -> Probe:
        if (refused := cls.refuses_kv(context)) is not None:
            return refused
        if context.dtype is not None and context.dtype not in _DTYPES:
            return Probe.no(
                "unsupported_dtype",
                f"FlexAttention does not compute in {context.dtype}",
                wanted=", ".join(_DTYPES),
                offered=context.dtype,
            )
        if context.platform is None:
            return Probe.yes("torch compiles it on first use")
        on_cpu = context.platform.device_type == "cpu"
        if on_cpu and context.purpose is Purpose.TRAIN:
            return Probe.no(
                "no_backward", "FlexAttention has no backward on CPUs", wanted="a GPU", offered=context.platform.name
            )
        # torch itself takes the compiler from this variable.
        compiler = os.environ.get("CXX", "g++")
        if on_cpu and shutil.which(compiler) is None:
            return Probe.no(
                "no_compiler",
                "torch compiles FlexAttention with a C++ compiler, and there is none",
                wanted=compiler,
                offered="not found on the path",
            )
        sizes = {layer.head_size for layer in context.model.attention.layers} if context.model else set()
        if not on_cpu and any(size < 16 for size in sizes):
            return Probe.no(
                "unsupported_head_size",
                "on a GPU FlexAttention needs heads of at least 16",
                wanted=">= 16",
                offered=str(min(sizes)),
            )
        return Probe.yes("torch compiles it on first use")

    def __init__(self, config: FlexConfig) -> None:
        super().__init__(config)
        self._sees = None if config.mask is None else _find_mask(config.mask)

    def kv_contract(self, spec: AttentionSpec) -> KVContract:
        """That of sdpa; what another mask has made of the hidden states is nothing for a backend without it."""
        parts = [f"chunk={self.config.chunk}"] if self.config.chunk is not None else []
        parts += [f"mask={self.config.mask}"] if self.config.mask is not None else []
        return KVContract("+".join((PAGED_BNGD, *parts)), self.config.block_size, spec.dtype)

    def begin(self, spec: AttentionSpec, batch: AttentionBatch, cache: AnyPagedCache | None) -> AttentionStep:
        assert not isinstance(cache, ScaledCache), "the probe refuses what makes such a cache"
        if cache is None and any(batch.context_lengths):
            raise EngineError(
                "a sequence has context in a cache, but no cache was given",
                where="attention/flex",
                found=list(batch.context_lengths),
                allowed="context_lengths of 0",
            )
        masks = [self._mask_of(group, batch, cache) for group in spec.groups]
        device = batch.query_starts.device
        made = {layer: _score_of(layer, device) for layer in set(spec.layers)}
        return FlexStep(spec, self.config, [made[layer] for layer in spec.layers], masks, batch, cache)

    def _mask_of(self, group: KVGroup, batch: AttentionBatch, cache: PagedCache | None) -> BlockMask:
        rows = _Rows.of(batch, group.window, self.config.chunk)
        if cache is None:
            gradients = torch.is_grad_enabled()
            return _mask_over_step(rows, batch.query_starts.device, self._sees, gradients)
        num_blocks = cache.keys[group.layers[0]].shape[0]
        return _mask_over_cache(rows, batch.block_tables[group.index], num_blocks, self.config.block_size, self._sees)
