"""Attention of the CPU kernels: C++ that reads the pages where they lie, and opens them to coarse kernels.

The cache is the one that ``sdpa`` keeps, so that a swap between the two keeps everything. Without a cache (training,
scoring) attention is ``sdpa``'s: it is differentiable.

Shapes: T query tokens of one step; H query heads; G key/value heads; D head size.
"""

from __future__ import annotations

import ctypes
from functools import cached_property

import torch

from drivetrain.contracts.attention import (
    AnyPagedCache,
    AttentionBatch,
    AttentionSpec,
    AttentionStep,
    LayerPages,
    PagedView,
    ScaledPages,
)
from drivetrain.contracts.plugin import Probe, ProbeContext, Tier
from drivetrain.contracts.source import Progress
from drivetrain.kernels.cpu.library import CACHE_FORMATS, FORMATS, check, open_library
from drivetrain.native import probe_compiler
from drivetrain.pages import Pages
from drivetrain.plugins.attention.sdpa import SdpaAttention


class PagedCpuStep:
    """Attention of one step over open pages."""

    def __init__(self, pages: PagedView, library: ctypes.CDLL) -> None:
        self._pages = pages
        self._library = library
        self._group_of_layer = {layer: group.index for group in pages.spec.groups for layer in group.layers}

    @property
    def pages(self) -> PagedView:
        """The pages of this step, for kernels that run whole layers."""
        return self._pages

    def attend(self, layer: int, q_THD: torch.Tensor, k_TGD: torch.Tensor, v_TGD: torch.Tensor) -> torch.Tensor:
        return self._attend(layer, q_THD, _plain(k_TGD), _plain(v_TGD))

    def layer_pages(self, layer: int) -> LayerPages | None:
        keys, values = self._pages.cache.keys[layer], self._pages.cache.values[layer]
        if isinstance(keys, ScaledPages) or isinstance(values, ScaledPages):
            return None
        return LayerPages(keys, values, self._pages.batch.slots[self._group_of_layer[layer]])

    def attend_written(self, layer: int, q_THD: torch.Tensor) -> torch.Tensor:
        return self._attend(layer, q_THD, None, None)

    def _attend(self, layer: int, q_THD: torch.Tensor, k: torch.Tensor | None, v: torch.Tensor | None) -> torch.Tensor:
        """k, v: to write; None where they are written already."""
        pages, attention = self._pages, self._pages.spec.layers[layer]
        batch, group = pages.batch, self._group_of_layer[layer]
        q = _plain(q_THD)
        out_THD = torch.empty_like(q)
        keys, key_scales = _parts_of(pages.cache.keys[layer])
        values, value_scales = _parts_of(pages.cache.values[layer])
        table = batch.block_tables[group]
        status = self._library.dt_attend(
            q.data_ptr(),
            None if k is None else k.data_ptr(),
            None if v is None else v.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            None if key_scales is None else key_scales.data_ptr(),
            None if value_scales is None else value_scales.data_ptr(),
            attention.num_heads,
            attention.num_kv_heads,
            attention.head_size,
            pages.block_size,
            CACHE_FORMATS[keys.dtype],
            attention.scale,
            attention.soft_cap or 0.0,
            attention.window or 0,
            batch.num_sequences,
            q.shape[0],
            batch.query_starts.data_ptr(),
            batch.kv_lengths.data_ptr(),
            table.data_ptr(),
            table.stride(0),
            batch.slots[group].data_ptr(),
            out_THD.data_ptr(),
        )
        check(status)
        return out_THD.to(q_THD.dtype)


def _plain(x_THD: torch.Tensor) -> torch.Tensor:
    """In float32, side by side in memory."""
    return x_THD.to(torch.float32, memory_format=torch.contiguous_format).contiguous()


def _parts_of(pages: Pages) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What keys or values of a layer are kept in, and their scales."""
    return (pages.codes, pages.scales) if isinstance(pages, ScaledPages) else (pages, None)


class PagedCpuAttention(SdpaAttention):
    """Paged attention in C++ on the CPU, over the same cache as sdpa; lets the CPU kernels run whole layers."""

    tier = Tier.TUNED

    @classmethod
    def probe(cls, context: ProbeContext) -> Probe:
        if context.platform is not None and context.platform.device_type != "cpu":
            return Probe.no(
                "other_device", "it computes on the CPU only", wanted="cpu", offered=context.platform.device_type
            )
        if (refused := cls.refuses_kv(context)) is not None:
            return refused
        dtypes = [str(dtype).removeprefix("torch.") for dtype in FORMATS]
        if context.dtype is not None and context.dtype not in dtypes:
            return Probe.no(
                "unsupported_dtype", "no kernel for this dtype", wanted=", ".join(dtypes), offered=context.dtype
            )
        return probe_compiler()

    @classmethod
    def abilities(cls) -> frozenset[str]:
        return super().abilities() | {"opens_pages"}

    def begin(self, spec: AttentionSpec, batch: AttentionBatch, cache: AnyPagedCache | None) -> AttentionStep:
        if cache is None:
            return super().begin(spec, batch, None)
        return PagedCpuStep(PagedView(spec, batch, cache, self.config.block_size), self._library)

    def build_ahead(self, progress: Progress) -> None:
        """Have the C++ compiled. Raises KernelBuildError."""
        open_library(progress=progress)

    @cached_property
    def _library(self) -> ctypes.CDLL:
        return open_library()
