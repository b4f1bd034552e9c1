"""Attention of one new token a sequence over a paged cache, and the write of new keys and values into it.

Memory is the bound: every key and value is read once. A sequence's keys are cut into as many chunks as it takes to
give every processor work, each chunk and key/value head is one program, and a second kernel merges the chunks by the
logarithms of their weights. Source: Dao et al. 2023, "Flash-Decoding for long-context inference". Chunks come in a list
that the host makes once a step, so a batch of any lengths is one launch without idle programs.

Shapes: T tokens of a step; H query heads; G key/value heads; R = H / G; D head size; B blocks of the cache; N tokens
in a block; C chunks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from drivetrain.contracts.attention import LayerAttention
from drivetrain.kernels.triton.codes import parts_of, to_codes
from drivetrain.kernels.triton.flash import attend_keys, score_constants
from drivetrain.kernels.triton.launch import INTERPRETED, power_of_two
from drivetrain.kernels.triton.tuning import FUSED, Blocks
from drivetrain.pages import Pages

CHUNK_STEP = 128
"""Chunks are multiples of so many keys: all key blocks that are tried divide it."""

_PROGRAMS_PER_PROCESSOR = 4
_CHUNKS_MERGED_TOGETHER = 16


@dataclass(frozen=True)
class Chunks:
    """How the keys of some sequences are cut.

    items:  int32 [C, 3]: sequence, first key, one past the last key.
    starts: int32 [s + 1]: the n-th of these sequences has chunks starts[n] .. starts[n + 1].
    rows:   int32 [s]: the row of the step that is the n-th sequence's new token.
    is_cut: whether any sequence has more than one chunk.
    """

    items: torch.Tensor
    starts: torch.Tensor
    rows: torch.Tensor
    is_cut: bool


def chunk_size(num_keys: int, num_kv_heads: int, processors: int) -> int:
    """Keys in a chunk so that all of them together make about four programs for every processor."""
    share = num_keys * num_kv_heads // (processors * _PROGRAMS_PER_PROCESSOR)
    return max(CHUNK_STEP, triton.cdiv(share, CHUNK_STEP) * CHUNK_STEP)


@triton.jit
def _decode(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    k_scales_ptr: tl.tensor,
    v_scales_ptr: tl.tensor,
    out_ptr: tl.tensor,
    parts_ptr: tl.tensor,
    logs_ptr: tl.tensor,
    items_ptr: tl.tensor,
    table_ptr: tl.tensor,
    query_starts_ptr: tl.tensor,
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
    HAS_CAP: tl.constexpr,
    FORMAT: tl.constexpr,
    IS_CUT: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """One chunk and one key/value head a program."""
    item = tl.program_id(0)
    group = tl.program_id(1)
    sequence = tl.load(items_ptr + 3 * item)
    begin = tl.load(items_ptr + 3 * item + 1)
    end = tl.load(items_ptr + 3 * item + 2)
    row = tl.load(query_starts_ptr + sequence).to(tl.int64)
    heads = tl.arange(0, BLOCK_R)
    dims = tl.arange(0, BLOCK_D)
    is_in = (heads < R)[:, None] & (dims < D)[None, :]
    q_rows = q_ptr + row * q_by_token + (group * R + heads) * q_by_head
    q = tl.load(q_rows[:, None] + dims[None, :], mask=is_in, other=0.0)
    positions = tl.full([BLOCK_R], 0, dtype=tl.int32) + (end - 1)
    whole = begin + (end - begin) // BLOCK_N * BLOCK_N
    table_row = table_ptr + sequence.to(tl.int64) * table_width
    k_group = k_ptr + group * k_by_head
    v_group = v_ptr + group * v_by_head
    k_scales = k_scales_ptr
    v_scales = v_scales_ptr
    if FORMAT > 0:
        k_scales += group
        v_scales += group
    total = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)
    best = tl.full([BLOCK_R], float("-inf"), dtype=tl.float32)
    weight = tl.zeros([BLOCK_R], dtype=tl.float32)
    total, best, weight = attend_keys(
        total, best, weight, q, positions, table_row, k_group, v_group, k_scales, v_scales,
        begin, whole, begin, end,
        factor, cap, k_by_block, k_by_token, v_by_block, v_by_token, G,
        D, N, 0, HAS_CAP, FORMAT, False, WIDE, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    total, best, weight = attend_keys(
        total, best, weight, q, positions, table_row, k_group, v_group, k_scales, v_scales,
        whole, end, begin, end,
        factor, cap, k_by_block, k_by_token, v_by_block, v_by_token, G,
        D, N, 0, HAS_CAP, FORMAT, True, WIDE, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    out = total / weight[:, None]
    if IS_CUT:
        own_rows = item.to(tl.int64) * (G * R) + group * R + heads
        tl.store(parts_ptr + own_rows[:, None] * D + dims[None, :], out, mask=is_in)
        tl.store(logs_ptr + own_rows, best + tl.log2(weight), mask=heads < R)
    else:
        own_rows = row * (G * R) + group * R + heads
        tl.store(out_ptr + own_rows[:, None] * D + dims[None, :], out.to(out_ptr.dtype.element_ty), mask=is_in)


@triton.jit
def _merge(
    parts_ptr: tl.tensor,
    logs_ptr: tl.tensor,
    out_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """One sequence and one query head a program: the mean of its chunks by their weights."""
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    begin = tl.load(starts_ptr + sequence)
    end = tl.load(starts_ptr + sequence + 1)
    dims = tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_D], dtype=tl.float32)
    weight = 0.0
    best = float("-inf")
    for start in range(begin, end, BLOCK_C):
        chunks = start + tl.arange(0, BLOCK_C)
        is_chunk = chunks < end
        own_rows = chunks.to(tl.int64) * H + head
        logs = tl.load(logs_ptr + own_rows, mask=is_chunk, other=float("-inf"))
        is_in = is_chunk[:, None] & (dims < D)[None, :]
        parts = tl.load(parts_ptr + own_rows[:, None] * D + dims[None, :], mask=is_in, other=0.0)
        better = tl.maximum(best, tl.max(logs, axis=0))
        shares = tl.exp2(logs - better)
        shrink = tl.exp2(best - better)
        total = total * shrink + tl.sum(parts * shares[:, None], axis=0)
        weight = weight * shrink + tl.sum(shares, axis=0)
        best = better
    row = tl.load(rows_ptr + sequence).to(tl.int64)
    out = total / weight
    tl.store(out_ptr + (row * H + head) * D + dims, out.to(out_ptr.dtype.element_ty), mask=dims < D)


@triton.jit
def _write(
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    keys_ptr: tl.tensor,
    values_ptr: tl.tensor,
    key_scales_ptr: tl.tensor,
    value_scales_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    num_rows: tl.tensor,
    k_by_token: tl.tensor,
    k_by_head: tl.tensor,
    v_by_token: tl.tensor,
    v_by_head: tl.tensor,
    keys_by_block: tl.tensor,
    keys_by_token: tl.tensor,
    keys_by_head: tl.tensor,
    values_by_block: tl.tensor,
    values_by_token: tl.tensor,
    values_by_head: tl.tensor,
    G: tl.constexpr,
    D: tl.constexpr,
    N: tl.constexpr,
    FORMAT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, BLOCK_D)
    tokens, heads = rows // G, rows % G
    is_row = rows < num_rows
    is_in = is_row[:, None] & (dims < D)[None, :]
    slots = tl.load(slots_ptr + tokens, mask=is_row, other=0)
    blocks, places = slots // N, slots % N
    k = tl.load(k_ptr + (tokens * k_by_token + heads * k_by_head)[:, None] + dims[None, :], mask=is_in, other=0.0)
    v = tl.load(v_ptr + (tokens * v_by_token + heads * v_by_head)[:, None] + dims[None, :], mask=is_in, other=0.0)
    to_keys = blocks * keys_by_block + places * keys_by_token + heads * keys_by_head
    to_values = blocks * values_by_block + places * values_by_token + heads * values_by_head
    if FORMAT > 0:
        k, k_scales = to_codes(k.to(tl.float32), FORMAT)
        v, v_scales = to_codes(v.to(tl.float32), FORMAT)
        tl.store(key_scales_ptr + slots * G + heads, k_scales, mask=is_row)
        tl.store(value_scales_ptr + slots * G + heads, v_scales, mask=is_row)
    tl.store(keys_ptr + to_keys[:, None] + dims[None, :], k.to(keys_ptr.dtype.element_ty), mask=is_in)
    tl.store(values_ptr + to_values[:, None] + dims[None, :], v.to(values_ptr.dtype.element_ty), mask=is_in)


# --- how they are launched -----------------------------------------------------------------------------------------


def write(
    keys: Pages,
    values: Pages,
    k_TGD: torch.Tensor,
    v_TGD: torch.Tensor,
    slots_T: torch.Tensor,
) -> None:
    """Put new keys and values into their slots, as codes and scales where the pages are of that kind."""
    (keys_BNGD, key_scales, form), (values_BNGD, value_scales, _) = parts_of(keys), parts_of(values)
    num_tokens, groups, size = k_TGD.shape
    block = power_of_two(size)
    rows = max(1, (16384 if INTERPRETED else 1024) // block)
    _write[(triton.cdiv(num_tokens * groups, rows),)](
        k_TGD,
        v_TGD,
        keys_BNGD,
        values_BNGD,
        key_scales,
        value_scales,
        slots_T,
        num_tokens * groups,
        *k_TGD.stride()[:2],
        *v_TGD.stride()[:2],
        *keys_BNGD.stride()[:3],
        *values_BNGD.stride()[:3],
        G=groups,
        D=size,
        N=keys_BNGD.shape[1],
        FORMAT=form,
        BLOCK_D=block,
        ROWS=rows,
        **FUSED,
    )


def candidates(layer: LayerAttention, itemsize: int) -> list[Blocks]:
    """Key blocks that fit; the first one is safe everywhere."""
    if INTERPRETED:
        return [Blocks.of(BLOCK_N=64)]
    width = 64 if power_of_two(layer.head_size) * itemsize <= 256 else 32
    found = [(width, 4, 2), (width, 4, 3), (width, 2, 3), (width * 2, 4, 2), (width // 2, 2, 4), (width, 4, 4)]
    return [Blocks.of(warps, stages, BLOCK_N=keys) for keys, warps, stages in found]


def decode(
    layer: LayerAttention,
    q_THD: torch.Tensor,
    keys: Pages,
    values: Pages,
    out_THD: torch.Tensor,
    query_starts: torch.Tensor,
    table: torch.Tensor,
    chunks: Chunks,
    blocks: Blocks,
) -> None:
    """Attend into the rows of ``out_THD`` that belong to the sequences of ``chunks``."""
    (keys_BNGD, key_scales, form), (values_BNGD, value_scales, _) = parts_of(keys), parts_of(values)
    num_chunks, heads, size = chunks.items.shape[0], layer.num_heads, layer.head_size
    groups = layer.num_kv_heads
    parts = logs = None
    if chunks.is_cut:
        parts = torch.empty((num_chunks, heads, size), dtype=torch.float32, device=q_THD.device)
        logs = torch.empty((num_chunks, heads), dtype=torch.float32, device=q_THD.device)
    block_d = max(16, power_of_two(size))
    _decode[(num_chunks, groups)](
        q_THD,
        keys_BNGD,
        values_BNGD,
        key_scales,
        value_scales,
        out_THD,
        parts,
        logs,
        chunks.items,
        table,
        query_starts,
        *score_constants(layer),
        *q_THD.stride()[:2],
        *keys_BNGD.stride()[:3],
        *values_BNGD.stride()[:3],
        table.stride(0),
        G=groups,
        R=heads // groups,
        D=size,
        N=keys_BNGD.shape[1],
        HAS_CAP=layer.soft_cap is not None,
        FORMAT=form,
        IS_CUT=chunks.is_cut,
        WIDE=INTERPRETED,
        BLOCK_R=max(16, power_of_two(heads // groups)),
        BLOCK_D=block_d,
        **blocks.launch,
    )
    if chunks.is_cut:
        _merge[(chunks.rows.shape[0], heads)](
            parts,
            logs,
            out_THD,
            chunks.starts,
            chunks.rows,
            H=heads,
            D=size,
            BLOCK_C=_CHUNKS_MERGED_TOGETHER,
            BLOCK_D=block_d,
            num_warps=2,
            **FUSED,
        )
