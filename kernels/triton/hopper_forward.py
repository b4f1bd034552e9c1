"""The forward of flash attention for Hopper GPUs: packed sequences, causal, without a cache.

Triton's compiler runs products and softmax of a tile one after the other there. Here a warp copies with the tensor
memory accelerator, and two groups of four warps each attend 64 rows: while one takes exponentials, the tensor cores
work for the other. A group starts the scores of the next block before it weighs the values of the last. Source: Shah et
al. 2024, "FlashAttention-3", algorithm 2, without its barriers between the groups, which cost 2 to 8% here.

A program takes tiles from a list until the list ends. Each is 128 tokens of one sequence and one query head. It begins
with the block of keys on the diagonal, the only one with hidden keys, and goes back to the first.

Shapes: T tokens; H query heads; G key/value heads; R = H / G; D head size; P places of logarithms, each sequence's
tokens rounded up to whole tiles.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from drivetrain.kernels.triton.hopper_common import async_load, exp2, load_tile, store_rows, zero_behind


@gluon.jit
def _copy(
    q_map: gl.tensor,
    k_map: gl.tensor,
    v_map: gl.tensor,
    buffers: gl.tuple,
    barriers: gl.tuple,
    tiles_ptr: gl.tensor,
    num_tiles: gl.tensor,
    R: gl.constexpr,
    STAGES: gl.constexpr,
) -> None:
    """Bring queries, keys and values of each tile into shared memory, as soon as there is room."""
    q_buffer, k_buffers, v_buffers = buffers
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    BLOCK_M: gl.constexpr = q_map.block_type.shape[0]
    BLOCK_N: gl.constexpr = k_map.block_type.shape[0]
    D: gl.constexpr = q_map.block_type.shape[1]
    step = 0
    turn = 0
    start, _, first, head, _ = load_tile(tiles_ptr, gl.program_id(0), num_tiles)
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        after = load_tile(tiles_ptr, tile + gl.num_programs(0), num_tiles)
        mbarrier.wait(q_empty, (turn & 1) ^ 1)
        mbarrier.expect(q_full, q_map.block_type.nbytes)
        async_load(q_map, [start + first, head * D], q_full, q_buffer)
        turn += 1  # noqa: SIM113 - the compiler knows no enumerate
        num_blocks = (first + BLOCK_M) // BLOCK_N
        for back in range(num_blocks):
            row = start + (num_blocks - 1 - back) * BLOCK_N
            at = step % STAGES
            phase = (step // STAGES) & 1
            mbarrier.wait(k_empty.index(at), phase ^ 1)
            mbarrier.expect(k_full.index(at), k_map.block_type.nbytes)
            async_load(k_map, [row, head // R * D], k_full.index(at), k_buffers.index(at))
            mbarrier.wait(v_empty.index(at), phase ^ 1)
            mbarrier.expect(v_full.index(at), v_map.block_type.nbytes)
            async_load(v_map, [row, head // R * D], v_full.index(at), v_buffers.index(at))
            step += 1
        start, _, first, head, _ = after


@gluon.jit
def _attend(
    PART: gl.constexpr,
    buffers: gl.tuple,
    barriers: gl.tuple,
    out_ptr: gl.tensor,
    log_ptr: gl.tensor,
    tiles_ptr: gl.tensor,
    num_tiles: gl.tensor,
    num_places: gl.tensor,
    factor: gl.tensor,
    H: gl.constexpr,
    STAGES: gl.constexpr,
) -> None:
    """Attend rows ``64 * PART ..`` of each tile, in four warps."""
    q_buffer, k_buffers, v_buffers = buffers
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    BLOCK_M: gl.constexpr = q_buffer.shape[0]
    BLOCK_N: gl.constexpr = k_buffers.shape[1]
    D: gl.constexpr = q_buffer.shape[1]
    dtype: gl.constexpr = q_buffer.dtype
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    weight_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    out_row_layout: gl.constexpr = gl.SliceLayout(1, out_layout)
    rows = 64 * PART + gl.arange(0, 64, layout=gl.SliceLayout(1, score_layout))
    columns = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, score_layout))
    no_scores = gl.zeros([64, BLOCK_N], gl.float32, score_layout)
    q = q_buffer.slice(64 * PART, 64)
    step = 0
    turn = 0
    start, length, first, head, log_start = load_tile(tiles_ptr, gl.program_id(0), num_tiles)
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        after = load_tile(tiles_ptr, tile + gl.num_programs(0), num_tiles)
        num_blocks = (first + BLOCK_M) // BLOCK_N
        at = step % STAGES
        phase = (step // STAGES) & 1
        mbarrier.wait(q_full, turn & 1)
        mbarrier.wait(k_full.index(at), phase)
        token = warpgroup_mma(q, k_buffers.index(at).permute((1, 0)), no_scores, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, (token,))
        mbarrier.arrive(k_empty.index(at), count=1)
        # Each row sees its own key here, so its best score is finite. Keys behind the sequence's end are hidden too.
        s = gl.where(((num_blocks - 1) * BLOCK_N + columns)[None, :] <= (first + rows)[:, None], s, float("-inf"))
        best = gl.max(s, axis=1) * factor
        p = exp2(s * factor - best[:, None])
        weight = gl.sum(p, axis=1)
        p_half = gl.convert_layout(p.to(dtype), weight_layout)
        total = gl.zeros([64, D], gl.float32, out_layout)
        mbarrier.wait(v_full.index(at), phase)
        if first + BLOCK_M > length:
            # Both groups do this, with the same result.
            zero_behind(v_buffers.index(at), length - (num_blocks - 1) * BLOCK_N, 4)
        for _ in range(1, num_blocks):
            v_at = at
            v_phase = phase
            step += 1
            at = step % STAGES
            phase = (step // STAGES) & 1
            mbarrier.wait(k_full.index(at), phase)
            token = warpgroup_mma(q, k_buffers.index(at).permute((1, 0)), no_scores, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(v_at), v_phase)
            total_token = warpgroup_mma(p_half, v_buffers.index(v_at), total, is_async=True)
            s = warpgroup_mma_wait(1, (token,))
            mbarrier.arrive(k_empty.index(at), count=1)
            better = gl.maximum(best, gl.max(s, axis=1) * factor)
            shrink = exp2(best - better)
            p = exp2(s * factor - better[:, None])
            weight = weight * shrink + gl.sum(p, axis=1)
            best = better
            total, p_half = warpgroup_mma_wait(0, (total_token, p_half))
            mbarrier.arrive(v_empty.index(v_at), count=1)
            total = total * gl.convert_layout(shrink, out_row_layout)[:, None]
            p_half = gl.convert_layout(p.to(dtype), weight_layout)
        mbarrier.arrive(q_empty, count=1)
        mbarrier.wait(v_full.index(at), phase)
        total_token = warpgroup_mma(p_half, v_buffers.index(at), total, is_async=True)
        total, p_half = warpgroup_mma_wait(0, (total_token, p_half))
        mbarrier.arrive(v_empty.index(at), count=1)
        step += 1
        turn += 1  # noqa: SIM113
        out = (total * gl.convert_layout(1.0 / weight, out_row_layout)[:, None]).to(dtype)
        store_rows(out_ptr, out, start, length, first + 64 * PART, head, H, 4)
        gl.store(log_ptr + head.to(gl.int64) * num_places + log_start + first + rows, best + gl.log2(weight))
        start, length, first, head, log_start = after


@gluon.jit(do_not_specialize=["num_tiles"])
def forward(
    q_map: gl.tensor,
    k_map: gl.tensor,
    v_map: gl.tensor,
    out_ptr: gl.tensor,
    log_ptr: gl.tensor,
    tiles_ptr: gl.tensor,
    num_tiles: gl.tensor,
    num_places: gl.tensor,
    factor: gl.tensor,
    H: gl.constexpr,
    R: gl.constexpr,
    STAGES: gl.constexpr,
) -> None:
    """Tiles ``program, program + programs, ...`` of the list. The maps are of [T, heads * D] in blocks of 128 tokens.

    log_ptr: [H, P]; log2 of each row's sum of exponentials, for the backward.
    factor:  what products are multiplied by, times log2(e); not negative.
    """
    BLOCK_N: gl.constexpr = k_map.block_type.shape[0]
    D: gl.constexpr = k_map.block_type.shape[1]
    q_buffer = gl.allocate_shared_memory(q_map.dtype, q_map.block_type.shape, q_map.layout)
    k_buffers = gl.allocate_shared_memory(k_map.dtype, [STAGES, BLOCK_N, D], k_map.layout)
    v_buffers = gl.allocate_shared_memory(v_map.dtype, [STAGES, BLOCK_N, D], v_map.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_empty, count=2)
    for at in gl.static_range(STAGES):
        mbarrier.init(k_full.index(at), count=1)
        mbarrier.init(k_empty.index(at), count=2)
        mbarrier.init(v_full.index(at), count=1)
        mbarrier.init(v_empty.index(at), count=2)
    buffers = (q_buffer, k_buffers, v_buffers)
    barriers = (q_full, q_empty, k_full, k_empty, v_full, v_empty)
    gl.warp_specialize(
        [
            (
                _attend,
                (0, buffers, barriers, out_ptr, log_ptr, tiles_ptr, num_tiles, num_places, factor, H, STAGES),
            ),
            (
                _attend,
                (1, buffers, barriers, out_ptr, log_ptr, tiles_ptr, num_tiles, num_places, factor, H, STAGES),
            ),
            (_copy, (q_map, k_map, v_map, buffers, barriers, tiles_ptr, num_tiles, R, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )
