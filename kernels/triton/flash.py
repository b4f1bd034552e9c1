"""Attention of several new tokens a sequence, over packed or paged keys.

Scores never leave a program. Source: Dao et al. 2022, "FlashAttention", algorithm 1, with the online softmax of
Milakov & Gimelshein 2018, in base 2. The gradients are in :mod:`drivetrain.kernels.triton.flash_backward`.

The query heads that share a key/value head are rows beside each other: row m is query head ``m % R`` of token ``m //
R``. So keys and values are read once for all of them, and their gradients need no sum over heads. A tile is BLOCK_M
rows of one sequence; tiles come in a list that is made once a step, longest first, so that a batch of any lengths is
one launch. The host makes it without idle programs. Where a step is recorded and replayed with other lengths the
device does (:func:`list_tiles`), with room for as many tiles as there may be; programs beyond the list leave at once.

Shapes: T tokens of a step; H query heads; G key/value heads; R = H / G; D head size; B blocks of the cache; N tokens
in a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from drivetrain.contracts.attention import AttentionBatch, LayerAttention
from drivetrain.kernels.triton.codes import from_codes, load_scales, parts_of
from drivetrain.kernels.triton.launch import INTERPRETED, dot, power_of_two, tanh
from drivetrain.kernels.triton.tuning import FUSED, Blocks
from drivetrain.pages import Pages

LOG2_E = 1 / math.log(2)

_LISTED_SEQUENCES, _LISTED_AT_ONCE = 64, 2048
"""Sequences that a program lists the tiles of, and the tiles that it stores at once."""


@triton.jit
def scores(
    q: tl.tensor, k: tl.tensor, factor: tl.tensor, cap: tl.tensor, HAS_CAP: tl.constexpr, WIDE: tl.constexpr
) -> tl.tensor:
    """Scores times log2(e). See :func:`score_constants`."""
    return cap_scores(dot(q, k, WIDE) * factor, cap, HAS_CAP)


@triton.jit
def cap_scores(s: tl.tensor, cap: tl.tensor, HAS_CAP: tl.constexpr) -> tl.tensor:
    if HAS_CAP:
        s = cap * tanh(s)
    return s


@triton.jit
def attend_keys(
    total: tl.tensor,
    best: tl.tensor,
    weight: tl.tensor,
    q: tl.tensor,
    positions: tl.tensor,
    table_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    k_scales_ptr: tl.tensor,
    v_scales_ptr: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    first_key: tl.tensor,
    end_key: tl.tensor,
    factor: tl.tensor,
    cap: tl.tensor,
    k_by_block: tl.tensor,
    k_by_token: tl.tensor,
    v_by_block: tl.tensor,
    v_by_token: tl.tensor,
    scales_by_token: tl.tensor,
    D: tl.constexpr,
    N: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    FORMAT: tl.constexpr,
    IS_MASKED: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tl.tensor:
    """Add the keys from ``begin`` to ``end`` to the running sums.

    IS_MASKED: some of the keys are hidden from some of the rows, or not there: outside ``first_key .. end_key``.
    N:         0 where keys lie one after another.
    FORMAT:    0 for keys and values as they are; otherwise they are codes, and scores and weights take their scales.
    """
    dims = tl.arange(0, BLOCK_D)
    for start in range(begin, end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        is_key = (keys >= first_key) & (keys < end_key)
        if N > 0:
            if IS_MASKED:
                blocks = tl.load(table_ptr + keys // N, mask=is_key, other=0).to(tl.int64)
            else:
                blocks = tl.load(table_ptr + keys // N).to(tl.int64)
            k_rows = k_ptr + blocks * k_by_block + keys % N * k_by_token
            v_rows = v_ptr + blocks * v_by_block + keys % N * v_by_token
        else:
            k_rows = k_ptr + keys.to(tl.int64) * k_by_token
            v_rows = v_ptr + keys.to(tl.int64) * v_by_token
        if IS_MASKED:
            # What lies in hidden places may be anything, NaN too, which not even a weight of 0 undoes.
            k = tl.load(k_rows[None, :] + dims[:, None], mask=is_key[None, :] & (dims < D)[:, None], other=0)
        elif D < BLOCK_D:
            k = tl.load(k_rows[None, :] + dims[:, None], mask=(dims < D)[:, None], other=0)
        else:
            k = tl.load(k_rows[None, :] + dims[:, None])
        if FORMAT > 0:
            places = (blocks * N + keys % N) * scales_by_token
            k = from_codes(k, FORMAT).to(q.dtype)
            raw = dot(q, k, WIDE) * load_scales(k_scales_ptr, places, is_key, FORMAT)[None, :]
            s = cap_scores(raw * factor, cap, HAS_CAP)
        else:
            s = scores(q, k, factor, cap, HAS_CAP, WIDE)
        if IS_MASKED:
            is_seen = is_key[None, :] & (keys[None, :] <= positions[:, None])
            if WINDOW > 0:
                is_seen = is_seen & (keys[None, :] > positions[:, None] - WINDOW)
            s = tl.where(is_seen, s, float("-inf"))
        better = tl.maximum(best, tl.max(s, axis=1))
        if IS_MASKED:
            safe = tl.where(better == float("-inf"), 0.0, better)  # a row that has seen nothing yet
        else:
            safe = better
        p = tl.exp2(s - safe[:, None])
        shrink = tl.exp2(best - safe)
        weight = weight * shrink + tl.sum(p, axis=1)
        if IS_MASKED:
            v = tl.load(v_rows[:, None] + dims[None, :], mask=is_key[:, None] & (dims < D)[None, :], other=0)
        elif D < BLOCK_D:
            v = tl.load(v_rows[:, None] + dims[None, :], mask=(dims < D)[None, :], other=0)
        else:
            v = tl.load(v_rows[:, None] + dims[None, :])
        if FORMAT > 0:
            v = from_codes(v, FORMAT).to(q.dtype)
            p = p * load_scales(v_scales_ptr, places, is_key, FORMAT)[None, :]
        total = total * shrink[:, None] + dot(p.to(v.dtype), v, WIDE)
        best = better
    return total, best, weight


@triton.jit
def seen_range(first: tl.tensor, last: tl.tensor, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr) -> tl.tensor:
    """For queries at positions first .. last: where the keys begin that any sees, and which blocks all of them see."""
    begin = 0
    whole_from = 0
    whole_to = (first + 1) // BLOCK_N * BLOCK_N
    if WINDOW > 0:
        begin = tl.maximum(0, first - WINDOW + 1) // BLOCK_N * BLOCK_N
        whole_from = tl.cdiv(tl.maximum(0, last - WINDOW + 1), BLOCK_N) * BLOCK_N
        is_none = whole_from >= whole_to
        whole_from = tl.where(is_none, begin, whole_from)
        whole_to = tl.where(is_none, begin, whole_to)
    return begin, whole_from, whole_to


@triton.jit(do_not_specialize=["table_width"])
def _forward(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    k_scales_ptr: tl.tensor,
    v_scales_ptr: tl.tensor,
    out_ptr: tl.tensor,
    log_ptr: tl.tensor,
    tiles_ptr: tl.tensor,
    table_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    kv_lengths_ptr: tl.tensor,
    factor: tl.tensor,
    cap: tl.tensor,
    q_by_token: tl.tensor,
    q_by_head: tl.tensor,
    k_by_block: tl.tensor,
    k_by_token: tl.tensor,
    k_by_head: tl.tensor,
    v_by_block: tl.tensor,
    v_by_token: tl.tensor,
    v_by_head: tl.tensor,
    table_width: tl.tensor,
    G: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    N: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    FORMAT: tl.constexpr,
    KEEPS_LOG: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """One tile and one key/value head a program."""
    sequence = tl.load(tiles_ptr + 2 * tl.program_id(0))
    first_row = tl.load(tiles_ptr + 2 * tl.program_id(0) + 1)
    if sequence < 0:
        return
    group = tl.program_id(1)
    start = tl.load(starts_ptr + sequence).to(tl.int64)
    length = tl.load(starts_ptr + sequence + 1).to(tl.int32) - start.to(tl.int32)
    context = tl.load(kv_lengths_ptr + sequence).to(tl.int32) - length
    rows = first_row + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    tokens, heads = rows // R, group * R + rows % R
    is_in = (rows < length * R)[:, None] & (dims < D)[None, :]
    q_rows = q_ptr + (start + tokens) * q_by_token + heads * q_by_head
    q = tl.load(q_rows[:, None] + dims[None, :], mask=is_in, other=0.0)
    k_group = k_ptr + group * k_by_head
    v_group = v_ptr + group * v_by_head
    k_scales = k_scales_ptr
    v_scales = v_scales_ptr
    if FORMAT > 0:
        k_scales += group
        v_scales += group
    if N > 0:
        table_row = table_ptr + sequence.to(tl.int64) * table_width
    else:
        table_row = None
        k_group += start * k_by_token
        v_group += start * v_by_token
    first = context + first_row // R
    last = context + tl.minimum(length - 1, (first_row + BLOCK_M - 1) // R)
    begin, whole_from, whole_to = seen_range(first, last, WINDOW, BLOCK_N)
    first_key = 0
    if WINDOW > 0:
        first_key = tl.maximum(0, first - WINDOW + 1)
    positions = context + tokens
    total = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    best = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    weight = tl.zeros([BLOCK_M], dtype=tl.float32)
    if WINDOW > 0:
        total, best, weight = attend_keys(
            total, best, weight, q, positions, table_row, k_group, v_group, k_scales, v_scales,
            begin, whole_from, first_key, last + 1,
            factor, cap, k_by_block, k_by_token, v_by_block, v_by_token, G,
            D, N, WINDOW, HAS_CAP, FORMAT, True, WIDE, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    total, best, weight = attend_keys(
        total, best, weight, q, positions, table_row, k_group, v_group, k_scales, v_scales,
        whole_from, whole_to, first_key, last + 1,
        factor, cap, k_by_block, k_by_token, v_by_block, v_by_token, G,
        D, N, WINDOW, HAS_CAP, FORMAT, False, WIDE, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    total, best, weight = attend_keys(
        total, best, weight, q, positions, table_row, k_group, v_group, k_scales, v_scales,
        whole_to, last + 1, first_key, last + 1,
        factor, cap, k_by_block, k_by_token, v_by_block, v_by_token, G,
        D, N, WINDOW, HAS_CAP, FORMAT, True, WIDE, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    weight = tl.where(weight > 0.0, weight, 1.0)  # rows that are not there may have seen nothing
    out_rows = (start + tokens) * (G * R) + heads
    out = total / weight[:, None]
    tl.store(out_ptr + out_rows[:, None] * D + dims[None, :], out.to(out_ptr.dtype.element_ty), mask=is_in)
    if KEEPS_LOG:
        tl.store(log_ptr + out_rows, best + tl.log2(weight), mask=rows < length * R)


# --- tiles that the device lists -----------------------------------------------------------------------------------


@triton.jit
def _num_tiles(
    sequences: tl.tensor,
    num_sequences: tl.tensor,
    starts_ptr: tl.tensor,
    kv_lengths_ptr: tl.tensor,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
) -> tl.tensor:
    """How many tiles each sequence has, none where it has one token or none; its length with what is in the cache."""
    is_in = sequences < num_sequences
    starts = tl.load(starts_ptr + sequences, mask=is_in, other=0)
    tokens = tl.load(starts_ptr + sequences + 1, mask=is_in, other=0) - starts
    lengths = tl.load(kv_lengths_ptr + sequences, mask=is_in, other=0)
    return tl.where(tokens > 1, tl.cdiv(tokens * R, BLOCK_M), 0).to(tl.int32), lengths.to(tl.int32)


@triton.jit(do_not_specialize=["num_sequences"])
def _list_tiles(
    starts_ptr: tl.tensor,
    kv_lengths_ptr: tl.tensor,
    tiles_ptr: tl.tensor,
    num_sequences: tl.tensor,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr,
) -> None:
    """The tiles of BLOCK_S sequences a program: behind those of all longer ones, and the last rows first."""
    own = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    counts, lengths = _num_tiles(own, num_sequences, starts_ptr, kv_lengths_ptr, R, BLOCK_M)
    before = tl.zeros([BLOCK_S], dtype=tl.int32)
    for first in range(0, num_sequences, BLOCK_S):
        others = first + tl.arange(0, BLOCK_S)
        other_counts, other_lengths = _num_tiles(others, num_sequences, starts_ptr, kv_lengths_ptr, R, BLOCK_M)
        is_equal = other_lengths[None, :] == lengths[:, None]
        is_first = (other_lengths[None, :] > lengths[:, None]) | (is_equal & (others[None, :] < own[:, None]))
        before += tl.sum(tl.where(is_first, other_counts[None, :], 0), axis=1)
    for start in range(0, tl.max(counts, axis=0), BLOCK_T):
        places = (start + tl.arange(0, BLOCK_T))[None, :]
        is_tile = places < counts[:, None]
        tile = tiles_ptr + 2 * (before[:, None] + places)
        tl.store(tile, own[:, None] + places * 0, mask=is_tile)
        tl.store(tile + 1, (counts[:, None] - 1 - places) * BLOCK_M, mask=is_tile)


def list_tiles(batch: AttentionBatch, rows_of_token: int, rows_of_tile: int) -> torch.Tensor:
    """int32 [tiles that there may be, 2]: sequence and first row of each tile of those with several tokens; -1 behind
    the last. Of the batch the host reads how many sequences and tokens there are."""
    count, num_tokens, device = batch.num_sequences, batch.num_tokens, batch.query_starts.device
    room = num_tokens * rows_of_token // rows_of_tile + min(count, num_tokens // 2)
    tiles = torch.full((room, 2), -1, dtype=torch.int32, device=device)
    block = min(_LISTED_SEQUENCES, max(16, power_of_two(count)))
    _list_tiles[(triton.cdiv(count, block),)](
        batch.query_starts,
        batch.kv_lengths,
        tiles,
        count,
        R=rows_of_token,
        BLOCK_M=rows_of_tile,
        BLOCK_S=block,
        BLOCK_T=_LISTED_AT_ONCE // block,
        num_warps=4,
        **FUSED,
    )
    return tiles


# --- how they are launched -----------------------------------------------------------------------------------------


def score_constants(layer: LayerAttention) -> tuple[float, float]:
    """What products are multiplied by, and the soft cap; both so that scores come out times log2(e)."""
    if layer.soft_cap is None:
        return layer.scale * LOG2_E, 1.0
    return layer.scale / layer.soft_cap, layer.soft_cap * LOG2_E


def forward_candidates(layer: LayerAttention, itemsize: int) -> list[Blocks]:
    """Tiles that fit; the first one is safe everywhere."""
    if INTERPRETED:
        return [Blocks.of(BLOCK_M=32, BLOCK_N=64)]
    if itemsize == 4:
        return [Blocks.of(4, 2, BLOCK_M=32, BLOCK_N=32), Blocks.of(4, 2, BLOCK_M=64, BLOCK_N=32)]
    size = power_of_two(layer.head_size)
    if size <= 128:
        return [
            Blocks.of(4, 2, BLOCK_M=64, BLOCK_N=64),
            Blocks.of(8, 3, BLOCK_M=128, BLOCK_N=64),
            Blocks.of(4, 3, BLOCK_M=128, BLOCK_N=64),
            Blocks.of(8, 2, BLOCK_M=128, BLOCK_N=128),
            Blocks.of(8, 3, BLOCK_M=128, BLOCK_N=128),
            Blocks.of(4, 3, BLOCK_M=64, BLOCK_N=64),
        ]
    return [
        Blocks.of(4, 1, BLOCK_M=64, BLOCK_N=32),
        Blocks.of(8, 2, BLOCK_M=128, BLOCK_N=32),
        Blocks.of(8, 2, BLOCK_M=128, BLOCK_N=64),
        Blocks.of(8, 2, BLOCK_M=64, BLOCK_N=64),
    ]


TilesOf = Callable[[int, int], torch.Tensor]
"""(rows of a token, rows of a tile) -> int32 [tiles, 2]: sequence, and first row of the tile in it."""


def layer_constants(layer: LayerAttention) -> dict[str, Any]:
    """What every kernel is compiled for."""
    return {
        "G": layer.num_kv_heads,
        "R": layer.num_heads // layer.num_kv_heads,
        "D": layer.head_size,
        "WINDOW": layer.window or 0,
        "HAS_CAP": layer.soft_cap is not None,
        "WIDE": INTERPRETED,
        "BLOCK_D": max(16, power_of_two(layer.head_size)),
    }


class LayerLaunch:
    """A launch for one kind of layer in a step. What does not change from layer to layer is put together once: it takes
    Python longer than a step of few tokens takes the device."""

    def __init__(self, launch: Callable[..., Any], common: tuple[Any, ...], constants: dict[str, Any]) -> None:
        """common: arguments behind queries, keys, values, their scales and the output, which are a layer's own."""
        self._launch, self._common, self._constants = launch, common, constants

    def __call__(self, q_THD: torch.Tensor, keys: Pages, values: Pages, out_THD: torch.Tensor) -> None:
        """Attend into those rows of ``out_THD`` that the launch is about."""
        (k, k_scales, _), (v, v_scales, _) = parts_of(keys), parts_of(values)
        self._launch(q_THD, k, v, k_scales, v_scales, out_THD, *self._common, **self._constants)


class Forward(LayerLaunch):
    """Several new tokens a sequence.

    Keys and values are [T, G, D] of the step itself, or a cache [B, N, G, D] with the sequences' ``table`` of blocks.
    """

    def __init__(
        self,
        layer: LayerAttention,
        q_THD: torch.Tensor,
        keys: Pages,
        values: Pages,
        log_TH: torch.Tensor | None,
        starts: torch.Tensor,
        kv_lengths: torch.Tensor,
        table: torch.Tensor | None,
        tiles: torch.Tensor,
        blocks: Blocks,
    ) -> None:
        """Of queries, keys and values only types and strides are used; other layers' have the same.

        log_TH: takes the log2 of each row's sum of exponentials, for the backward.
        tiles:  of all sequences that are attended for, for these ``blocks``.
        """
        is_paged = table is not None
        (k, _, form), (v, _, _) = parts_of(keys), parts_of(values)
        strides = [x.stride()[:3] if is_paged else (0, *x.stride()[:2]) for x in (k, v)]
        self._is_empty = tiles.shape[0] == 0
        common = (
            log_TH,
            tiles,
            table,
            starts,
            kv_lengths,
            *score_constants(layer),
            q_THD.stride(0),
            q_THD.stride(1),
            *strides[0],
            *strides[1],
            0 if table is None else table.stride(0),
        )
        constants = {
            "N": k.shape[1] if is_paged else 0,
            "FORMAT": form,
            "KEEPS_LOG": log_TH is not None,
            **layer_constants(layer),
            **blocks.launch,
        }
        super().__init__(_forward[(tiles.shape[0], layer.num_kv_heads)], common, constants)

    def __call__(self, q_THD: torch.Tensor, keys: Pages, values: Pages, out_THD: torch.Tensor) -> None:
        if not self._is_empty:
            super().__call__(q_THD, keys, values, out_THD)
