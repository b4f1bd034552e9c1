"""Attention of one new token a sequence over a paged cache, and the write of new keys and values into it.

Memory is the bound: every key and value is read once. A sequence's keys are cut into as many chunks as it takes to
give every processor work; each chunk and key/value head is one program, and of a sequence's programs the one that is
done last merges what the others found, by the logarithms of their weights. Source: Dao et al. 2023, "Flash-Decoding for
long-context inference".

Chunks are listed on the device, once a step, from the lengths that lie there: the host only knows how many there may
be, programs beyond the list leave at once, and a step that was recorded can be replayed with other lengths.

Shapes: T tokens of a step; S sequences; H query heads; G key/value heads; R = H / G; P the power of two that is not
less than R; D head size; B blocks of the cache; N tokens in a block; C chunks that there is room for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from drivetrain.contracts.attention import AttentionBatch, LayerAttention
from drivetrain.kernels.triton.codes import from_codes, load_scales, parts_of, to_codes
from drivetrain.kernels.triton.flash import LayerLaunch, cap_scores, score_constants
from drivetrain.kernels.triton.launch import INTERPRETED, dot, num_processors, power_of_two
from drivetrain.kernels.triton.tuning import FUSED, Blocks
from drivetrain.pages import Pages

CHUNK_STEP = 64
"""Chunks are multiples of so many keys: all key blocks that are tried divide it."""

ITEM = 8
"""int32 numbers in the list for each chunk; a power of two, so that one load of a sector has all of them."""

_PROGRAMS_PER_PROCESSOR, _MOST_PROGRAMS_PER_PROCESSOR = 2, 3
_MANY_KEYS = 32_768
"""From so many keys in a step on, few sequences are cut into more chunks: two programs for each processor of an H200
compute no faster than 78% of what its memory gives. All have to run at once."""

_MERGED_NUMBERS = 8192
_REHEARSED_SEQUENCES, _REHEARSED_KEYS = 16, 65536


@dataclass(frozen=True)
class Chunks:
    """How the keys of a step's decodes are cut. Only the device knows how many chunks there are.

    items:     int32 [C, ITEM]: row of the step, sequence, first key, one past the last key, the first chunk of the
               sequence, how many it has.
    num_items: int32 [1].
    done:      int32 [S, G]: how many chunks of a sequence are done; zeros before a layer and behind it.
    """

    items: torch.Tensor
    num_items: torch.Tensor
    done: torch.Tensor


@triton.jit
def _num_keys(
    sequences: tl.tensor,
    num_sequences: tl.tensor,
    query_starts_ptr: tl.tensor,
    kv_lengths_ptr: tl.tensor,
    WINDOW: tl.constexpr,
) -> tl.tensor:
    """How many keys each sequence sees with its one new token, none where it has several; its length; its row."""
    is_in = sequences < num_sequences
    starts = tl.load(query_starts_ptr + sequences, mask=is_in, other=0)
    ends = tl.load(query_starts_ptr + sequences + 1, mask=is_in, other=0)
    lengths = tl.load(kv_lengths_ptr + sequences, mask=is_in, other=0).to(tl.int32)
    seen = lengths
    if WINDOW > 0:
        seen = tl.minimum(lengths, WINDOW)
    return tl.where(ends - starts == 1, seen, 0), lengths, starts


@triton.jit(do_not_specialize=["num_sequences", "wanted", "most"])
def _list(
    query_starts_ptr: tl.tensor,
    kv_lengths_ptr: tl.tensor,
    items_ptr: tl.tensor,
    num_items_ptr: tl.tensor,
    done_ptr: tl.tensor,
    num_sequences: tl.tensor,
    wanted: tl.tensor,
    most: tl.tensor,
    WINDOW: tl.constexpr,
    MANY: tl.constexpr,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
    G: tl.constexpr,
    FIELDS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,
) -> None:
    """The chunks of BLOCK_S sequences a program. CHUNK is the size of each; 0 makes about ``wanted`` of them in all, or
    as many as ``most`` of MANY keys, those of a sequence alike."""
    program = tl.program_id(0)
    size = CHUNK
    if CHUNK == 0:
        total = 0
        decodes = 0
        for first in range(0, num_sequences, BLOCK_S):
            others = first + tl.arange(0, BLOCK_S)
            seen, _, _ = _num_keys(others, num_sequences, query_starts_ptr, kv_lengths_ptr, WINDOW)
            total += tl.sum(seen, axis=0)
            decodes += tl.sum((seen > 0).to(tl.int32), axis=0)
        steps = tl.maximum(1, tl.cdiv(total, wanted * STEP))
        if (total >= MANY) & (decodes < most):
            # Between what would do if all chunks were whole, and what does though each sequence's last one is not.
            fewest = tl.cdiv(total, most * STEP)
            enough = tl.cdiv(total, (most - decodes) * STEP)
            while fewest < enough:
                tried = (fewest + enough) // 2
                chunks = 0
                for first in range(0, num_sequences, BLOCK_S):
                    others = first + tl.arange(0, BLOCK_S)
                    seen, _, _ = _num_keys(others, num_sequences, query_starts_ptr, kv_lengths_ptr, WINDOW)
                    chunks += tl.sum(tl.cdiv(seen, tried * STEP), axis=0)
                if chunks <= most:
                    enough = tried
                else:
                    fewest = tried + 1
            steps = tl.minimum(steps, enough)
        size = steps * STEP
    before = 0
    for first in range(0, program * BLOCK_S, BLOCK_S):
        others = first + tl.arange(0, BLOCK_S)
        seen, _, _ = _num_keys(others, num_sequences, query_starts_ptr, kv_lengths_ptr, WINDOW)
        before += tl.sum(tl.cdiv(seen, size), axis=0)
    sequences = program * BLOCK_S + tl.arange(0, BLOCK_S)
    seen, lengths, rows = _num_keys(sequences, num_sequences, query_starts_ptr, kv_lengths_ptr, WINDOW)
    counts = tl.cdiv(seen, size)
    firsts = before + tl.cumsum(counts, axis=0) - counts
    if CHUNK == 0:
        shares = tl.cdiv(seen, tl.maximum(counts, 1) * STEP) * STEP  # alike, and as many as before
    else:
        shares = tl.zeros([BLOCK_S], dtype=tl.int32) + size
    for start in range(0, tl.max(counts, axis=0), BLOCK_C):
        chunks = (start + tl.arange(0, BLOCK_C))[None, :]
        is_chunk = chunks < counts[:, None]
        begins = (lengths - seen)[:, None] + chunks * shares[:, None]
        item = items_ptr + (firsts[:, None] + chunks) * FIELDS
        nothing = chunks * 0
        tl.store(item, rows[:, None] + nothing, mask=is_chunk)
        tl.store(item + 1, sequences[:, None] + nothing, mask=is_chunk)
        tl.store(item + 2, begins, mask=is_chunk)
        tl.store(item + 3, tl.minimum(begins + shares[:, None], lengths[:, None]), mask=is_chunk)
        tl.store(item + 4, firsts[:, None] + nothing, mask=is_chunk)
        tl.store(item + 5, counts[:, None] + nothing, mask=is_chunk)
    groups = tl.arange(0, BLOCK_G)[None, :]
    is_in = (sequences < num_sequences)[:, None] & (groups < G)
    tl.store(done_ptr + sequences[:, None] * G + groups, (sequences[:, None] + groups) * 0, mask=is_in)
    if program == tl.num_programs(0) - 1:
        tl.store(num_items_ptr, before + tl.sum(counts, axis=0))


@triton.jit
def _add_keys(
    total: tl.tensor,
    best: tl.tensor,
    weight: tl.tensor,
    q: tl.tensor,
    keys: tl.tensor,
    blocks: tl.tensor,
    end: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    k_scales_ptr: tl.tensor,
    v_scales_ptr: tl.tensor,
    factor: tl.tensor,
    cap: tl.tensor,
    k_by_block: tl.tensor,
    k_by_token: tl.tensor,
    v_by_block: tl.tensor,
    v_by_token: tl.tensor,
    G: tl.constexpr,
    D: tl.constexpr,
    N: tl.constexpr,
    HAS_CAP: tl.constexpr,
    FORMAT: tl.constexpr,
    IS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tl.tensor:
    """Add one tile of keys, which lie in ``blocks``, to the running sums. IS_LAST: some are not there."""
    dims = tl.arange(0, BLOCK_D)
    is_key = keys < end
    wide_blocks = blocks.to(tl.int64)
    k_rows = k_ptr + wide_blocks * k_by_block + keys % N * k_by_token
    v_rows = v_ptr + wide_blocks * v_by_block + keys % N * v_by_token
    if IS_LAST:
        # What lies in places that are not used yet may be anything, NaN too, which not even a weight of 0 undoes.
        k = tl.load(k_rows[None, :] + dims[:, None], mask=is_key[None, :] & (dims < D)[:, None], other=0)
        v = tl.load(v_rows[:, None] + dims[None, :], mask=is_key[:, None] & (dims < D)[None, :], other=0)
    elif D < BLOCK_D:
        k = tl.load(k_rows[None, :] + dims[:, None], mask=(dims < D)[:, None], other=0)
        v = tl.load(v_rows[:, None] + dims[None, :], mask=(dims < D)[None, :], other=0)
    else:
        k = tl.load(k_rows[None, :] + dims[:, None])
        v = tl.load(v_rows[:, None] + dims[None, :])
    if FORMAT > 0:
        places = (wide_blocks * N + keys % N) * G
        k = from_codes(k, FORMAT).to(q.dtype)
        v = from_codes(v, FORMAT).to(q.dtype)
        raw = dot(q, k, WIDE) * load_scales(k_scales_ptr, places, is_key, FORMAT)[None, :]
    else:
        raw = dot(q, k, WIDE)
    s = cap_scores(raw * factor, cap, HAS_CAP)
    if IS_LAST:
        s = tl.where(is_key[None, :], s, float("-inf"))
    better = tl.maximum(best, tl.max(s, axis=1))
    safe = tl.where(better == float("-inf"), 0.0, better)  # no score is a number
    p = tl.exp2(s - safe[:, None])
    shrink = tl.exp2(best - safe)
    weight = weight * shrink + tl.sum(p, axis=1)
    if FORMAT > 0:
        p = p * load_scales(v_scales_ptr, places, is_key, FORMAT)[None, :]
    total = total * shrink[:, None] + dot(p.to(v.dtype), v, WIDE)
    return total, better, weight


@triton.jit(do_not_specialize=["table_width"])
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
    num_items_ptr: tl.tensor,
    done_ptr: tl.tensor,
    table_ptr: tl.tensor,
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
    P: tl.constexpr,
    D: tl.constexpr,
    N: tl.constexpr,
    HAS_CAP: tl.constexpr,
    FORMAT: tl.constexpr,
    WIDE: tl.constexpr,
    FIELDS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """One chunk and one key/value head a program."""
    item = tl.program_id(0) // G
    group = tl.program_id(0) % G
    num_items = tl.load(num_items_ptr)  # not waited for before the item, which lies in memory of the list in any case
    row = tl.load(items_ptr + item * FIELDS).to(tl.int64)
    sequence = tl.load(items_ptr + item * FIELDS + 1)
    begin = tl.load(items_ptr + item * FIELDS + 2)
    end = tl.load(items_ptr + item * FIELDS + 3)
    first_item = tl.load(items_ptr + item * FIELDS + 4)
    count = tl.load(items_ptr + item * FIELDS + 5)
    if item >= num_items:
        return
    heads = tl.arange(0, BLOCK_R)
    dims = tl.arange(0, BLOCK_D)
    is_in = (heads < R)[:, None] & (dims < D)[None, :]
    q_rows = q_ptr + row * q_by_token + (group * R + heads) * q_by_head
    q = tl.load(q_rows[:, None] + dims[None, :], mask=is_in, other=0.0)
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
    keys = begin + tl.arange(0, BLOCK_N)
    blocks = tl.load(table_row + keys // N, mask=keys < end, other=0)
    whole = begin + (end - begin) // BLOCK_N * BLOCK_N
    for start in range(begin, whole, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        # The next keys' blocks are asked for already, so that no load of keys waits for one of blocks.
        next_blocks = tl.load(table_row + (keys + BLOCK_N) // N, mask=keys + BLOCK_N < end, other=0)
        total, best, weight = _add_keys(
            total, best, weight, q, keys, blocks, end, k_group, v_group, k_scales, v_scales,
            factor, cap, k_by_block, k_by_token, v_by_block, v_by_token,
            G, D, N, HAS_CAP, FORMAT, False, WIDE, BLOCK_D,
        )  # fmt: skip
        blocks = next_blocks
    if whole < end:
        total, best, weight = _add_keys(
            total, best, weight, q, whole + tl.arange(0, BLOCK_N), blocks, end, k_group, v_group, k_scales, v_scales,
            factor, cap, k_by_block, k_by_token, v_by_block, v_by_token,
            G, D, N, HAS_CAP, FORMAT, True, WIDE, BLOCK_D,
        )  # fmt: skip
    out = total / weight[:, None]
    if count == 1:
        out_rows = out_ptr + (row * (G * R) + group * R + heads) * D
        tl.store(out_rows[:, None] + dims[None, :], out.to(out_ptr.dtype.element_ty), mask=is_in)
    else:
        part = (item.to(tl.int64) * G + group) * P + heads
        tl.store(parts_ptr + part[:, None] * BLOCK_D + dims[None, :], out, mask=(heads < R)[:, None])
        tl.store(logs_ptr + part, best + tl.log2(weight), mask=heads < R)
        tl.debug_barrier()  # all threads have stored before one of them says so
        done = done_ptr + sequence * G + group
        if tl.atomic_add(done, 1, sem="acq_rel") == count - 1:
            tl.store(done, 0)
            _merge(parts_ptr, logs_ptr, out_ptr, row, group, first_item, count, G, R, P, D, BLOCK_C, BLOCK_D)


@triton.jit
def _merge(
    parts_ptr: tl.tensor,
    logs_ptr: tl.tensor,
    out_ptr: tl.tensor,
    row: tl.tensor,
    group: tl.tensor,
    first_item: tl.tensor,
    count: tl.tensor,
    G: tl.constexpr,
    R: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """The mean of a sequence's chunks by their weights. What other programs stored is read from the shared cache."""
    heads = tl.arange(0, P)
    dims = tl.arange(0, BLOCK_D)
    total = tl.zeros([P, BLOCK_D], dtype=tl.float32)
    best = tl.full([P], float("-inf"), dtype=tl.float32)
    weight = tl.zeros([P], dtype=tl.float32)
    for start in range(0, count, BLOCK_C):
        chunks = start + tl.arange(0, BLOCK_C)
        is_in = (chunks < count)[:, None] & (heads < R)[None, :]
        own = ((first_item + chunks).to(tl.int64) * G + group)[:, None] * P + heads[None, :]
        logs = tl.load(logs_ptr + own, mask=is_in, other=float("-inf"), cache_modifier=".cg")
        logs = tl.where((heads < R)[None, :], logs, 0.0)
        places = own[:, :, None] * BLOCK_D + dims[None, None, :]
        parts = tl.load(parts_ptr + places, mask=is_in[:, :, None], other=0.0, cache_modifier=".cg")
        better = tl.maximum(best, tl.max(logs, axis=0))
        safe = tl.where(better == float("-inf"), 0.0, better)  # no chunk has numbers
        shares = tl.exp2(logs - safe[None, :])
        shrink = tl.exp2(best - safe)
        total = total * shrink[:, None] + tl.sum(parts * shares[:, :, None], axis=0)
        weight = weight * shrink + tl.sum(shares, axis=0)
        best = better
    out = total / weight[:, None]
    out_rows = out_ptr + (row * (G * R) + group * R + heads) * D
    is_in = (heads < R)[:, None] & (dims < D)[None, :]
    tl.store(out_rows[:, None] + dims[None, :], out.to(out_ptr.dtype.element_ty), mask=is_in)


@triton.jit(do_not_specialize=["num_rows"])
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


def write_candidates(size: int) -> list[Blocks]:
    """Rows, each a head of a token, that a program writes; the first one loads 16 bytes a thread."""
    tried = [(16384, 4)] if INTERPRETED else [(1024, 4), (2048, 4), (2048, 8), (4096, 8), (512, 2)]
    block = power_of_two(size)
    return [Blocks.of(num_warps=warps, ROWS=max(1, numbers // block)) for numbers, warps in tried]


def write(
    keys: Pages,
    values: Pages,
    k_TGD: torch.Tensor,
    v_TGD: torch.Tensor,
    slots_T: torch.Tensor,
    blocks: Blocks | None = None,
) -> None:
    """Put new keys and values into their slots, as codes and scales where the pages are of that kind."""
    (keys_BNGD, key_scales, form), (values_BNGD, value_scales, _) = parts_of(keys), parts_of(values)
    num_tokens, groups, size = k_TGD.shape
    blocks = blocks or write_candidates(size)[0]
    _write[(triton.cdiv(num_tokens * groups, blocks["ROWS"]),)](
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
        BLOCK_D=power_of_two(size),
        **blocks.launch,
    )


def cut(
    batch: AttentionBatch, window: int | None, num_kv_heads: int, longest: int, chunk_size: int | None = None
) -> Chunks:
    """List the chunks of all sequences that have one new token. Of the batch's lengths the host reads their number.

    longest:    keys that a sequence may have, as far as its table goes.
    chunk_size: keys of each chunk; None divides all of them over the device.
    """
    device, count = batch.query_starts.device, batch.num_sequences
    processors = num_processors(device)
    wanted = triton.cdiv(processors * _PROGRAMS_PER_PROCESSOR, num_kv_heads)
    most = processors * _MOST_PROGRAMS_PER_PROCESSOR // num_kv_heads
    longest = longest if window is None else min(longest, window)
    room = count * triton.cdiv(longest, chunk_size or CHUNK_STEP)
    if chunk_size is None:
        room = min(room, max(count + wanted, most))
    memory = torch.empty(ITEM * (room + 1) + count * num_kv_heads, dtype=torch.int32, device=device)
    items, num_items, done = memory.split((ITEM * room, ITEM, count * num_kv_heads))
    block = min(256, max(16, power_of_two(count)))
    _list[(triton.cdiv(count, block),)](
        batch.query_starts,
        batch.kv_lengths,
        items,
        num_items,
        done,
        count,
        wanted,
        most,
        WINDOW=window or 0,
        MANY=_MANY_KEYS,
        CHUNK=chunk_size or 0,
        STEP=CHUNK_STEP,
        G=num_kv_heads,
        FIELDS=ITEM,
        BLOCK_S=block,
        BLOCK_C=2048 // block,
        BLOCK_G=power_of_two(num_kv_heads),
        num_warps=4,
        **FUSED,
    )
    return Chunks(items.view(-1, ITEM), num_items[:1], done.view(count, num_kv_heads))


def candidates(layer: LayerAttention, itemsize: int) -> list[Blocks]:
    """Key blocks that fit; the first one is safe everywhere."""
    if INTERPRETED:
        return [Blocks.of(BLOCK_N=64)]
    width = 32 if power_of_two(layer.head_size) * itemsize <= 256 else 16
    found = [(width, 2, 3), (width, 2, 4), (width * 2, 2, 2), (width * 2, 4, 3), (width * 2, 4, 4)]
    return [Blocks.of(warps, stages, BLOCK_N=keys) for keys, warps, stages in found]


class Rehearsal:
    """Decodes over what a cache holds, to time blocks by. Nothing is written but a result that nobody reads.

    What a step would read says little: it may be short, and in a step that is recorded the host does not know how long.
    """

    def __init__(self, layer: LayerAttention, q_THD: torch.Tensor, keys: Pages, values: Pages) -> None:
        self._layer, self._q_THD, self._keys, self._values = layer, q_THD, keys, values
        self._decode: tuple[torch.Tensor, torch.Tensor, torch.Tensor, Chunks] | None = None

    def __call__(self, blocks: Blocks) -> None:
        if self._decode is None:
            self._decode = self._made()
        q_SHD, out_SHD, table, chunks = self._decode
        launch = Decode(self._layer, q_SHD, self._keys, self._values, table, chunks, blocks)
        launch(q_SHD, self._keys, self._values, out_SHD)

    def _made(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Chunks]:
        count, device = _REHEARSED_SEQUENCES, self._q_THD.device
        num_blocks, block_size = parts_of(self._keys)[0].shape[:2]
        width = min(num_blocks, triton.cdiv(_REHEARSED_KEYS, block_size)) // count
        table = torch.arange(count * width, dtype=torch.int32, device=device).view(count, width)
        starts = torch.arange(count + 1, dtype=torch.int32, device=device)
        longest = width * block_size
        lengths = torch.full((count,), longest, dtype=torch.int32, device=device)
        chunks = cut(AttentionBatch([1] * count, [], starts, lengths), None, self._layer.num_kv_heads, longest)
        q_SHD = self._q_THD[:1].expand(count, -1, -1)
        return q_SHD, torch.empty(q_SHD.shape, dtype=q_SHD.dtype, device=device), table, chunks


class Decode(LayerLaunch):
    """One new token a sequence. Layers share the memory of their chunks' results, one after another."""

    def __init__(
        self,
        layer: LayerAttention,
        q_THD: torch.Tensor,
        keys: Pages,
        values: Pages,
        table: torch.Tensor,
        chunks: Chunks,
        blocks: Blocks,
    ) -> None:
        """Of queries, keys and values only types and strides are used; other layers' have the same."""
        (keys_BNGD, _, form), (values_BNGD, _, _) = parts_of(keys), parts_of(values)
        room, groups, size = chunks.items.shape[0], layer.num_kv_heads, layer.head_size
        shared = layer.num_heads // groups
        padded, block_d = power_of_two(shared), max(16, power_of_two(size))
        num_parts = room * groups * padded
        memory = torch.empty(num_parts * (block_d + 1), dtype=torch.float32, device=q_THD.device)
        parts, logs = memory.split((num_parts * block_d, num_parts))
        common = (
            parts,
            logs,
            chunks.items,
            chunks.num_items,
            chunks.done,
            table,
            *score_constants(layer),
            *q_THD.stride()[:2],
            *keys_BNGD.stride()[:3],
            *values_BNGD.stride()[:3],
            table.stride(0),
        )
        constants = {
            "G": groups,
            "R": shared,
            "P": padded,
            "D": size,
            "N": keys_BNGD.shape[1],
            "HAS_CAP": layer.soft_cap is not None,
            "FORMAT": form,
            "WIDE": INTERPRETED,
            "FIELDS": ITEM,
            "BLOCK_R": max(16, padded),
            "BLOCK_D": block_d,
            "BLOCK_C": max(1, _MERGED_NUMBERS // (padded * block_d)),
            **blocks.launch,
        }
        super().__init__(_decode[(room * groups,)], common, constants)
