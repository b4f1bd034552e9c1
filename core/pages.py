"""The two paged layouts that the core names, in plain torch: making, writing, reading, copying and clearing blocks.

``PAGED_BNGD`` keeps keys and values as they are; ``PAGED_SCALED`` keeps int8 or fp8 numbers with a scale for each token
and key/value head. A backend that keeps either subclasses :class:`PagedBackend`.

Shapes: T tokens; G key/value heads; D head size; B blocks of the cache; N tokens in a block; W blocks that are read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from pydantic import Field

from drivetrain.contracts.attention import (
    PAGED_BNGD,
    PAGED_SCALED,
    SCALED_KV,
    AnyPagedCache,
    AttentionBackend,
    AttentionSpec,
    KVContract,
    KVGroup,
    PagedCache,
    ScaledCache,
    ScaledPages,
)
from drivetrain.contracts.plugin import PluginConfig
from drivetrain.serving.transfer import on_device

LEAST = 2.0**-100
"""What the largest number of a row counts at least, so that neither a scale nor its inverse leaves float32. Rows that
are smaller become zeros."""

_CACHE_LINE = 64
"""Bytes. Rows of float32 heads that straddle lines made decodes a fifth slower."""

Pages = torch.Tensor | ScaledPages
"""Keys or values of one layer."""

_LARGEST = {getattr(torch, dtype): largest for dtype, largest in SCALED_KV.values()}


# --- rows ----------------------------------------------------------------------------------------------------------


def scale_rows(x_TGD: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [T, G, D] in ``dtype`` (int8 or float8_e4m3fn) and float32 scales [T, G]."""
    wide_TGD = x_TGD.float()
    largest_TG = wide_TGD.abs().amax(-1).clamp_min(LEAST)  # a NaN stays one
    codes_TGD = wide_TGD * (_LARGEST[dtype] / largest_TG).unsqueeze(-1)
    scales_TG = torch.where(largest_TG.isfinite(), largest_TG / _LARGEST[dtype], torch.nan)
    if dtype == torch.int8:
        codes_TGD = codes_TGD.round().nan_to_num(0.0)
    return codes_TGD.to(dtype), scales_TG


def unscale_rows(codes_TGD: torch.Tensor, scales_TG: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What codes and scales stand for, in ``dtype``."""
    return (codes_TGD.float() * scales_TG.unsqueeze(-1)).to(dtype)


# --- pages ---------------------------------------------------------------------------------------------------------


def write_tokens(pages: Pages, slots_T: torch.Tensor, new_TGD: torch.Tensor) -> torch.Tensor:
    """Put new tokens into their slots; returns them as later steps will read them, in their own dtype."""
    if isinstance(pages, ScaledPages):
        codes_TGD, scales_TG = scale_rows(new_TGD, pages.codes.dtype)
        _bytes_of(pages.codes).flatten(0, 1).index_copy_(0, slots_T, _bytes_of(codes_TGD))
        pages.scales.flatten(0, 1).index_copy_(0, slots_T, scales_TG)
        return unscale_rows(codes_TGD, scales_TG, new_TGD.dtype)
    pages.flatten(0, 1).index_copy_(0, slots_T, new_TGD.to(pages.dtype))
    return new_TGD


def read_blocks(pages: Pages, blocks_W: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tokens of some blocks, [W * N, G, D]. Whole blocks as rows: 1.7 times faster than by token."""
    if isinstance(pages, ScaledPages):
        groups, size = pages.codes.shape[2:]
        codes = _bytes_of(pages.codes).flatten(1).index_select(0, blocks_W).view(pages.codes.dtype)
        scales = pages.scales.flatten(1).index_select(0, blocks_W)
        return unscale_rows(codes.view(-1, groups, size), scales.view(-1, groups), dtype)
    groups, size = pages.shape[2:]
    return pages.flatten(1).index_select(0, blocks_W).view(-1, groups, size)


def tensors_of(pages: Pages) -> tuple[torch.Tensor, ...]:
    """All that a layer's keys or values are kept in, by block, in types that every operation of torch takes."""
    return (_bytes_of(pages.codes), pages.scales) if isinstance(pages, ScaledPages) else (pages,)


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros; in main memory, pages that the system hands out as they are first written, so that a large cache costs
    nothing before it is used (torch.zeros writes them all), from the start of a cache line on."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    room = np.zeros(size + _CACHE_LINE, dtype=np.uint8)
    start = -room.ctypes.data % _CACHE_LINE
    return torch.from_numpy(room[start : start + size]).view(dtype).view(shape)


def _bytes_of(codes: torch.Tensor) -> torch.Tensor:
    """int8 as they are, and fp8 as bytes, which torch can index everywhere."""
    return codes if codes.dtype == torch.int8 else codes.view(torch.uint8)


# --- whole caches --------------------------------------------------------------------------------------------------


def scaled_cache(
    made: ScaledCache, plain: PagedCache, spec: AttentionSpec, live_blocks: Sequence[Sequence[int]]
) -> None:
    """Fill a new cache with the ``live_blocks`` of each KV group of a plain one, a few at a time."""
    for group, blocks in zip(spec.groups, live_blocks, strict=True):
        for layer in group.layers:
            for old, new in ((plain.keys[layer], made.keys[layer]), (plain.values[layer], made.values[layer])):
                for chunk in torch.tensor(blocks, dtype=torch.int64, device=old.device).split(256):
                    shape = (len(chunk), *old.shape[1:])
                    tokens_TGD = old.index_select(0, chunk).flatten(0, 1)
                    codes, scales = scale_rows(tokens_TGD, new.codes.dtype)
                    _bytes_of(new.codes).index_copy_(0, chunk, _bytes_of(codes).view(shape))
                    new.scales.index_copy_(0, chunk, scales.view(shape[:-1]))


class PagedConfig(PluginConfig):
    """Settings of a backend with paged layouts."""

    block_size: int = Field(
        16, ge=1, description="Tokens in a block of the cache. Smaller wastes less memory; larger gathers faster."
    )
    prefault: bool = Field(
        False,
        description="Take all main memory of a new cache when it is made, so that no step waits for it; otherwise it "
        "is taken block by block, as each is first used. On a device all of it is there at once anyway.",
    )


class PagedBackend(AttentionBackend):
    """A backend that keeps ``PAGED_BNGD``, and ``PAGED_SCALED`` for the KV formats that it claims."""

    Config: ClassVar[type[PagedConfig]] = PagedConfig
    config: PagedConfig

    def kv_contract(self, spec: AttentionSpec) -> KVContract:
        layout = PAGED_SCALED if spec.kv in SCALED_KV else PAGED_BNGD
        return KVContract(layout, self.config.block_size, spec.kv_dtype)

    def bytes_per_block(self, spec: AttentionSpec, group: KVGroup) -> int:
        itemsize, scale = getattr(torch, spec.kv_dtype).itemsize, 4 if spec.kv in SCALED_KV else 0
        layers = [spec.layers[index] for index in group.layers]
        row = sum(layer.num_kv_heads * (layer.head_size * itemsize + scale) for layer in layers)
        return 2 * self.config.block_size * row

    def allocate(self, spec: AttentionSpec, num_blocks: Sequence[int], device: torch.device) -> AnyPagedCache:
        """Zeros, because masked slots take part in products: 0 * NaN would be NaN."""
        dtype: torch.dtype = getattr(torch, spec.kv_dtype)
        blocks_of_layer = {layer: num_blocks[group.index] for group in spec.groups for layer in group.layers}
        shapes = [
            (blocks_of_layer[index], self.config.block_size, layer.num_kv_heads, layer.head_size)
            for index, layer in enumerate(spec.layers)
        ]

        def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
            made = lazy_zeros(shape, dtype, device)
            if self.config.prefault and device.type == "cpu":
                made.view(torch.uint8).zero_()  # on all threads
            return made

        if spec.kv not in SCALED_KV:
            plain = [tuple(zeros(shape, dtype) for shape in shapes) for _ in range(2)]
            return PagedCache(*plain)

        def scaled(shape: tuple[int, ...]) -> ScaledPages:
            return ScaledPages(zeros(shape, dtype), zeros(shape[:-1], torch.float32))

        keys, values = (tuple(scaled(shape) for shape in shapes) for _ in range(2))
        return ScaledCache(keys, values)

    def copy_blocks(self, cache: AnyPagedCache, group: KVGroup, pairs: Sequence[tuple[int, int]]) -> None:
        if not pairs:
            return
        device = tensors_of(cache.keys[group.layers[0]])[0].device
        source, destination = on_device(np.array(pairs, dtype=np.int64), device).unbind(1)
        for store in _stores(cache, group):
            store.index_copy_(0, destination, store.index_select(0, source))

    def clear_blocks(self, cache: AnyPagedCache, group: KVGroup, blocks: Sequence[int]) -> None:
        for store in _stores(cache, group):
            store[list(blocks)] = 0


def _stores(cache: AnyPagedCache, group: KVGroup) -> list[torch.Tensor]:
    both = [pages for layer in group.layers for pages in (cache.keys[layer], cache.values[layer])]
    return [store for pages in both for store in tensors_of(pages)]
