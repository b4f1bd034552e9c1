"""Flash attention for Hopper GPUs (compute capability 9.0): where it serves, and how it is launched.

It takes the place of :mod:`drivetrain.kernels.triton.flash` and its backward where a step has no cache, heads of 64 or
128 in half precision, and neither windows nor a soft cap. Sizes of its tiles are fixed, so nothing is tuned.

Shapes: T tokens of a step; H query heads; G key/value heads; R = H / G; D head size; P places of logarithms, each
sequence's tokens rounded up to whole tiles.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from drivetrain.contracts.attention import LayerAttention
from drivetrain.kernels.triton.flash import LOG2_E
from drivetrain.kernels.triton.launch import has_gluon, num_processors
from drivetrain.kernels.triton.tuning import FUSED

TILE = 128
"""Tokens in a tile: queries of the forward, keys of the backward."""

_QUERY_BLOCK = 64
"""Queries that the backward takes at a time."""

_STAGES = 2

_LARGEST_FIRST = 1.25
"""How many of the backward's last tiles start by what they cost alone, as a share of the programs that run at a time.
More would go through more sequences and heads at a time than the device's cache holds."""

_HEAD_SIZES = (64, 128)
_LAUNCH = {"maxnreg": 168, **FUSED}
"""Registers of a thread when a program starts: 65,536 over three groups of four warps. Those that compute take more
from the one that copies."""

Lengths = np.ndarray[Any, np.dtype[np.int64]]


# --- where it serves -----------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=16)
def is_hopper(device: torch.device) -> bool:
    """Whether the kernels are written for this device and this version of Triton."""
    return has_gluon(device) and torch.cuda.get_device_capability(device) == (9, 0)


def covers(layer: LayerAttention, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernels know this layer's attention without a cache."""
    if layer.window is not None or layer.soft_cap is not None or layer.scale <= 0:
        return False
    return layer.head_size in _HEAD_SIZES and dtype in (torch.bfloat16, torch.float16) and is_hopper(device)


def can_be_copied(x_THD: torch.Tensor) -> bool:
    """What copies by the tensor memory accelerator ask for: heads beside each other, and rows that begin at multiples
    of 16 bytes. The last dim is dense."""
    if x_THD.stride(1) != x_THD.shape[2] or x_THD.shape[0] == 0:
        return False
    return x_THD.data_ptr() % 16 == 0 and x_THD.stride(0) * x_THD.itemsize % 16 == 0


# --- lists of tiles ------------------------------------------------------------------------------------------------


def _rows_of_tiles(lengths: Lengths) -> tuple[Lengths, Lengths]:
    """Sequence and first row of each tile."""
    counts = -(-lengths // TILE)
    sequences = np.repeat(np.arange(len(lengths)), counts)
    return sequences, (np.arange(len(sequences)) - np.repeat(counts.cumsum() - counts, counts)) * TILE


def num_places(lengths: Lengths) -> int:
    """Places of logarithms: each sequence begins at a whole tile, as copies of single numbers ask for."""
    return int((-(-lengths // TILE)).sum()) * TILE


def _entries(lengths: Lengths, sequences: Lengths, firsts: Lengths, heads: Lengths) -> Lengths:
    """[tiles, 5], as the kernels read them: first token of the sequence, its length, first row, head, first place."""
    places = -(-lengths // TILE) * TILE
    starts, log_starts = lengths.cumsum() - lengths, places.cumsum() - places
    return np.stack((starts[sequences], lengths[sequences], firsts, heads, log_starts[sequences]), axis=1)


def _by_head(lengths: Lengths, num_heads: int, firsts_first: bool) -> tuple[Lengths, Lengths, Lengths]:
    """Sequence, first row and head of each tile of each head. Those of one sequence and head lie together, the longest
    sequence before the others, so that what they share stays in the cache of the device."""
    of_sequence, firsts = _rows_of_tiles(lengths)
    sequences, firsts = np.tile(of_sequence, num_heads), np.tile(firsts, num_heads)
    heads = np.repeat(np.arange(num_heads), len(of_sequence))
    ranks = np.empty_like(lengths)
    ranks[np.argsort(-lengths, kind="stable")] = np.arange(len(lengths))
    order = np.lexsort((firsts if firsts_first else -firsts, heads, ranks[sequences]))
    return sequences[order], firsts[order], heads[order]


def forward_tiles(lengths: Lengths, num_heads: int, num_kv_heads: int, processors: int) -> Lengths:
    """Tiles of the forward, in the order in which ``processors`` programs take them in turn.

    Those with most keys come first, and query heads that share keys are beside each other. In each round of
    ``processors`` tiles the program that has had least to do so far takes the largest.
    """
    repeats = num_heads // num_kv_heads
    sequences, firsts, groups = (np.repeat(x, repeats) for x in _by_head(lengths, num_kv_heads, firsts_first=False))
    heads = groups * repeats + np.arange(len(groups)) % repeats
    work = firsts // TILE + 2  # blocks of keys, and about as much as one for what a tile costs besides
    order, done = np.arange(len(work)), np.zeros(processors, dtype=np.int64)
    for begin in range(0, len(work), processors):
        round_ = np.arange(begin, min(begin + processors, len(work)))
        largest_first = round_[np.argsort(-work[round_], kind="stable")]
        programs = np.argsort(done[: len(round_)], kind="stable")
        order[begin + programs] = largest_first
        done[programs] += work[largest_first]
    return _entries(lengths, sequences[order], firsts[order], heads[order])


def backward_tiles(lengths: Lengths, num_kv_heads: int, processors: int) -> Lengths:
    """Tiles of the backward, in the order in which they start on ``processors``: of a sequence and key/value head,
    those that most queries see come first.

    The last ones start in the order of their queries, whosever they are. Else the longest tiles of the last heads would
    start when the others are nearly done, and most processors wait for them: 14% of the time at 4 x 4,096.
    """
    sequences, firsts, heads = _by_head(lengths, num_kv_heads, firsts_first=True)
    queries = lengths[sequences] - firsts
    order = np.arange(len(queries))
    last = order[-int(_LARGEST_FIRST * processors) :]
    order[len(order) - len(last) :] = last[np.argsort(-queries[last], kind="stable")]
    return _entries(lengths, sequences[order], firsts[order], heads[order])


# --- what goes before and after the backward -----------------------------------------------------------------------


@triton.jit
def _means(
    out_ptr: tl.tensor,
    grad_ptr: tl.tensor,
    means_ptr: tl.tensor,
    tiles_ptr: tl.tensor,
    places: tl.tensor,
    H: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """By the softmax's derivative, each row's mean of (grad . v) under its probabilities: that is grad . out."""
    entry = tiles_ptr + 5 * tl.program_id(0)
    start, length, first = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    head, log_start = tl.load(entry + 3), tl.load(entry + 4)
    rows = first + tl.arange(0, ROWS)
    dims = tl.arange(0, D)
    where = ((start + rows).to(tl.int64) * H + head)[:, None] * D + dims[None, :]
    is_in = (rows < length)[:, None]
    out = tl.load(out_ptr + where, mask=is_in, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + where, mask=is_in, other=0.0).to(tl.float32)
    tl.store(means_ptr + head.to(tl.int64) * places + log_start + rows, tl.sum(out * grad, axis=1))


@triton.jit
def _scale(
    sums_ptr: tl.tensor, out_ptr: tl.tensor, scale: tl.tensor, num_numbers: tl.tensor, BLOCK: tl.constexpr
) -> None:
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.load(sums_ptr + at, mask=at < num_numbers, other=0.0)
    tl.store(out_ptr + at, (sums * scale).to(out_ptr.dtype.element_ty), mask=at < num_numbers)


def row_means(out_THD: torch.Tensor, grad_THD: torch.Tensor, tiles: torch.Tensor, places: int) -> torch.Tensor:
    """``out . grad`` of each row, [H, P]. Both dense; ``tiles`` are the forward's."""
    heads, size = out_THD.shape[1:]
    means_HP = torch.empty(heads, places, dtype=torch.float32, device=out_THD.device)
    _means[(len(tiles),)](out_THD, grad_THD, means_HP, tiles, places, H=heads, D=size, ROWS=TILE, num_warps=8, **FUSED)
    return means_HP


def scaled(sums: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """``sums * scale``, rounded once."""
    out = torch.empty(sums.shape, dtype=dtype, device=sums.device)
    _scale[(triton.cdiv(sums.numel(), 4096),)](sums, out, scale, sums.numel(), BLOCK=4096, num_warps=8, **FUSED)
    return out


# --- launches ------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=16)
def _layout(tokens: int, size: int, dtype: torch.dtype) -> Any:
    """How a block lies in shared memory."""
    from triton.experimental.gluon import language as gl

    return gl.NVMMASharedLayout.get_default_for([tokens, size], getattr(gl, str(dtype).removeprefix("torch.")))


@functools.lru_cache(maxsize=1)
def _tools() -> tuple[Any, Any]:
    """The class that describes copies, and how single numbers of query blocks lie in shared memory."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    return TensorDescriptor, gl.NVMMASharedLayout(0, 32, 1)


def _map(x_THD: torch.Tensor, tokens: int) -> Any:
    """How blocks of ``tokens`` tokens of one head are copied."""
    rows, heads, size = x_THD.shape
    shape, strides = [rows, heads * size], [x_THD.stride(0), 1]
    return _tools()[0](x_THD, shape, strides, [tokens, size], _layout(tokens, size, x_THD.dtype))


def _map_of_numbers(x: torch.Tensor) -> Any:
    """How single numbers of query blocks are copied."""
    descriptor, layout = _tools()
    return descriptor(x, [x.numel()], [1], [_QUERY_BLOCK], layout)


def forward(
    layer: LayerAttention,
    q_THD: torch.Tensor,
    k_TGD: torch.Tensor,
    v_TGD: torch.Tensor,
    out_THD: torch.Tensor,
    tiles: torch.Tensor,
    places: int,
) -> torch.Tensor:
    """Attend into ``out_THD``, dense; returns [H, P], the log2 of each row's sum of exponentials."""
    from drivetrain.kernels.triton import hopper_forward

    logs_HP = torch.empty(layer.num_heads, places, dtype=torch.float32, device=q_THD.device)
    hopper_forward.forward[(min(len(tiles), num_processors(q_THD.device)),)](
        _map(q_THD, TILE),
        _map(k_TGD, TILE),
        _map(v_TGD, TILE),
        out_THD,
        logs_HP,
        tiles,
        len(tiles),
        places,
        layer.scale * LOG2_E,
        H=layer.num_heads,
        R=layer.num_heads // layer.num_kv_heads,
        STAGES=_STAGES,
        num_warps=4,
        **_LAUNCH,
    )
    return logs_HP


def backward(
    layer: LayerAttention,
    q_THD: torch.Tensor,
    k_TGD: torch.Tensor,
    v_TGD: torch.Tensor,
    out_THD: torch.Tensor,
    logs_HP: torch.Tensor,
    grad_THD: torch.Tensor,
    forward_tiles: torch.Tensor,
    tiles: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of queries, keys and values, dense. The first are summed in float32 by many programs, in the order in
    which these come."""
    from drivetrain.kernels.triton import hopper_backward

    grad_THD = grad_THD.contiguous()
    if not can_be_copied(grad_THD):
        grad_THD = grad_THD.clone()
    sums_THD = torch.zeros(q_THD.shape, dtype=torch.float32, device=q_THD.device)
    means_HP = row_means(out_THD, grad_THD, forward_tiles, logs_HP.shape[1])
    k_grad, v_grad = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k_TGD, v_TGD))
    hopper_backward.backward[(len(tiles),)](
        _map(q_THD, _QUERY_BLOCK),
        _map(k_TGD, TILE),
        _map(v_TGD, TILE),
        _map(grad_THD, _QUERY_BLOCK),
        _map_of_numbers(logs_HP),
        _map_of_numbers(means_HP),
        _map(sums_THD, _QUERY_BLOCK),
        k_grad,
        v_grad,
        tiles,
        logs_HP.shape[1],
        layer.scale,
        layer.scale * LOG2_E,
        G=layer.num_kv_heads,
        R=layer.num_heads // layer.num_kv_heads,
        STAGES=_STAGES,
        num_warps=8,
        **_LAUNCH,
    )
    return scaled(sums_THD, layer.scale, q_THD.dtype), k_grad, v_grad
