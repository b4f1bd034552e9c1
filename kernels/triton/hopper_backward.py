"""The gradients of flash attention for Hopper GPUs: packed sequences, causal, without a cache.

Everything is found in one pass, so that scores are computed once: a program keeps 128 keys and values of one sequence
and one key/value head, goes through the queries that see them, 64 tokens of one query head at a time, and sums the
gradients of its keys and values in registers. What it finds for queries is added to float32 sums in memory, by the
tensor memory accelerator; so the last bits of their gradients depend on the order in which programs come. Source: Shah
et al. 2024, "FlashAttention-3", section 3.1; Dao et al. 2022, "FlashAttention", algorithm 4.

Scores are computed transposed, [keys, queries]: probabilities are then in registers what the product for values takes.
A warp copies, eight warps compute. Products run behind each other while the warps work on what came before: the scores
of a block start while the last block's product for keys is still running.

Shapes: T tokens; H query heads; G key/value heads; R = H / G; D head size; P places of logarithms, each sequence's
tokens rounded up to whole tiles.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from drivetrain.kernels.triton.hopper_common import async_add, async_load, exp2, load_tile, store_rows, zero_behind


@gluon.jit
def _copy(
    maps: gl.tuple,
    buffers: gl.tuple,
    barriers: gl.tuple,
    tile: gl.tuple,
    num_places: gl.tensor,
    R: gl.constexpr,
    STAGES: gl.constexpr,
) -> None:
    """Bring the tile's keys and values into shared memory, then query blocks, each as soon as there is room."""
    q_map, k_map, v_map, grad_map, log_map, mean_map = maps
    k_buffer, v_buffer, q_buffers, grad_buffers, log_buffers, mean_buffers = buffers
    kv_full, q_full, q_empty, grad_full, grad_empty = barriers
    start, length, first, group, log_start = tile
    BLOCK_M: gl.constexpr = q_map.block_type.shape[0]
    D: gl.constexpr = q_map.block_type.shape[1]
    mbarrier.expect(kv_full, k_map.block_type.nbytes + v_map.block_type.nbytes)
    async_load(k_map, [start + first, group * D], kv_full, k_buffer)
    async_load(v_map, [start + first, group * D], kv_full, v_buffer)
    begin = first // BLOCK_M
    end = gl.cdiv(length, BLOCK_M)
    block = begin
    head = group * R
    for step in range((end - begin) * R):
        at = step % STAGES
        phase = (step // STAGES) & 1
        row = start + block * BLOCK_M
        place = head * num_places + log_start + block * BLOCK_M
        mbarrier.wait(q_empty.index(at), phase ^ 1)
        mbarrier.expect(q_full.index(at), q_map.block_type.nbytes + log_map.block_type.nbytes)
        async_load(q_map, [row, head * D], q_full.index(at), q_buffers.index(at))
        async_load(log_map, [place], q_full.index(at), log_buffers.index(at))
        mbarrier.wait(grad_empty.index(at), phase ^ 1)
        mbarrier.expect(grad_full.index(at), grad_map.block_type.nbytes + mean_map.block_type.nbytes)
        async_load(grad_map, [row, head * D], grad_full.index(at), grad_buffers.index(at))
        async_load(mean_map, [place], grad_full.index(at), mean_buffers.index(at))
        head = gl.where(block + 1 == end, head + 1, head)
        block = gl.where(block + 1 == end, begin, block + 1)


@gluon.jit
def _add_gradients(
    q_sums_map: gl.tensor,
    k_grad_ptr: gl.tensor,
    v_grad_ptr: gl.tensor,
    buffers: gl.tuple,
    ds_buffer: gl.shared_memory_descriptor,
    q_sums_buffer: gl.shared_memory_descriptor,
    barriers: gl.tuple,
    tile: gl.tuple,
    scale: gl.tensor,
    factor: gl.tensor,
    G: gl.constexpr,
    R: gl.constexpr,
    STAGES: gl.constexpr,
) -> None:
    """Compute in eight warps."""
    k_buffer, v_buffer, q_buffers, grad_buffers, log_buffers, mean_buffers = buffers
    kv_full, q_full, q_empty, grad_full, grad_empty = barriers
    start, length, first, group, _ = tile
    BLOCK_M: gl.constexpr = q_buffers.shape[1]
    BLOCK_N: gl.constexpr = k_buffer.shape[0]
    D: gl.constexpr = k_buffer.shape[1]
    dtype: gl.constexpr = k_buffer.dtype
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, BLOCK_M, 16])
    kv_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, D, 16])
    q_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, D // 2, 16])
    weight_layout: gl.constexpr = gl.DotOperandLayout(0, kv_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(0, score_layout)
    keys = first + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, score_layout))
    offsets = gl.arange(0, BLOCK_M, layout=row_layout)
    q_offsets = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, q_layout))
    no_scores = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, score_layout)
    no_q_grad = gl.zeros([BLOCK_M, D], gl.float32, q_layout)
    v_grad = gl.zeros([BLOCK_N, D], gl.float32, kv_layout)
    k_token = warpgroup_mma_init(gl.zeros([BLOCK_N, D], gl.float32, kv_layout))
    begin = first // BLOCK_M
    end = gl.cdiv(length, BLOCK_M)
    block = begin
    head = group * R
    # Known to the compiler, or it computes what follows the loop in every step of it.
    gl.assume((end - begin) * R > 0)
    mbarrier.wait(kv_full, 0)
    if first + BLOCK_N > length:
        zero_behind(k_buffer, length - first, 8)
        zero_behind(v_buffer, length - first, 8)
    for step in range((end - begin) * R):
        at = step % STAGES
        phase = (step // STAGES) & 1
        is_cut = (block + 1) * BLOCK_M > length
        mbarrier.wait(q_full.index(at), phase)
        if is_cut:
            zero_behind(q_buffers.index(at), length - block * BLOCK_M, 8)
        s_token = warpgroup_mma(k_buffer, q_buffers.index(at).permute((1, 0)), no_scores, use_acc=False, is_async=True)
        mbarrier.wait(grad_full.index(at), phase)
        if is_cut:
            zero_behind(grad_buffers.index(at), length - block * BLOCK_M, 8)
        dp_token = warpgroup_mma(
            v_buffer, grad_buffers.index(at).permute((1, 0)), no_scores, use_acc=False, is_async=True
        )
        log = log_buffers.index(at).load(row_layout)
        s = warpgroup_mma_wait(1, (s_token,))
        # The last block's product for keys is done too, so its queries are no longer needed.
        mbarrier.arrive(q_empty.index((step + STAGES - 1) % STAGES), count=1, pred=step > 0)
        p = exp2(s * factor - log[None, :])
        if (block * BLOCK_M < first + BLOCK_N) | is_cut:
            rows = block * BLOCK_M + offsets
            p = gl.where((keys[:, None] <= rows[None, :]) & (rows < length)[None, :], p, 0.0)
        p_half = gl.convert_layout(p.to(dtype), weight_layout)
        v_token = warpgroup_mma(p_half, grad_buffers.index(at), v_grad, is_async=True)
        mean = mean_buffers.index(at).load(row_layout)
        dp = warpgroup_mma_wait(1, (dp_token,)) - mean[None, :]
        if is_cut:
            # Its weight is 0 there, which does not undo a value that is NaN.
            dp = gl.where((block * BLOCK_M + offsets < length)[None, :], dp, 0.0)
        ds_buffer.store((p * dp).to(dtype))
        fence_async_shared()
        q_token = warpgroup_mma(ds_buffer.permute((1, 0)), k_buffer, no_q_grad, use_acc=False, is_async=True)
        k_token = warpgroup_mma(ds_buffer, q_buffers.index(at), k_token, is_async=True)
        v_grad, q_grad, p_half = warpgroup_mma_wait(1, (v_token, q_token, p_half))
        mbarrier.arrive(grad_empty.index(at), count=1)
        if is_cut:
            # What is found for rows behind the end is added to another sequence's, and a key of this one may be NaN.
            q_grad = gl.where((block * BLOCK_M + q_offsets < length)[:, None], q_grad, 0.0)
        tma.store_wait(0)
        q_sums_buffer.store(q_grad)
        fence_async_shared()
        async_add(q_sums_map, [start + block * BLOCK_M, head * D], q_sums_buffer)
        head = gl.where(block + 1 == end, head + 1, head)
        block = gl.where(block + 1 == end, begin, block + 1)
    k_grad = warpgroup_mma_wait(0, (k_token,))
    tma.store_wait(0)
    store_rows(v_grad_ptr, v_grad.to(dtype), start, length, first, group, G, 8)
    store_rows(k_grad_ptr, (k_grad * scale).to(dtype), start, length, first, group, G, 8)


@gluon.jit
def backward(
    q_map: gl.tensor,
    k_map: gl.tensor,
    v_map: gl.tensor,
    grad_map: gl.tensor,
    log_map: gl.tensor,
    mean_map: gl.tensor,
    q_sums_map: gl.tensor,
    k_grad_ptr: gl.tensor,
    v_grad_ptr: gl.tensor,
    tiles_ptr: gl.tensor,
    num_places: gl.tensor,
    scale: gl.tensor,
    factor: gl.tensor,
    G: gl.constexpr,
    R: gl.constexpr,
    STAGES: gl.constexpr,
) -> None:
    """One tile a program. Maps of queries and of the output's gradient are of [T, H * D] in blocks of 64 tokens, those
    of keys and values of [T, G * D] in blocks of 128.

    log_map, mean_map: [H * P], in blocks of 64: the forward's logarithms, and ``out . grad`` of each row.
    q_sums_map:        float32 [T, H * D]; zeros before, the gradients of queries divided by ``scale`` after.
    """
    BLOCK_M: gl.constexpr = q_map.block_type.shape[0]
    BLOCK_N: gl.constexpr = k_map.block_type.shape[0]
    D: gl.constexpr = k_map.block_type.shape[1]
    k_buffer = gl.allocate_shared_memory(k_map.dtype, k_map.block_type.shape, k_map.layout)
    v_buffer = gl.allocate_shared_memory(v_map.dtype, v_map.block_type.shape, v_map.layout)
    q_buffers = gl.allocate_shared_memory(q_map.dtype, [STAGES, BLOCK_M, D], q_map.layout)
    grad_buffers = gl.allocate_shared_memory(q_map.dtype, [STAGES, BLOCK_M, D], q_map.layout)
    log_buffers = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], log_map.layout)
    mean_buffers = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], mean_map.layout)
    ds_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, BLOCK_M], q_map.dtype)
    ds_buffer = gl.allocate_shared_memory(q_map.dtype, [BLOCK_N, BLOCK_M], ds_layout)
    q_sums_buffer = gl.allocate_shared_memory(gl.float32, q_sums_map.block_type.shape, q_sums_map.layout)
    kv_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    grad_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    grad_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(kv_full, count=1)
    for at in gl.static_range(STAGES):
        mbarrier.init(q_full.index(at), count=1)
        mbarrier.init(q_empty.index(at), count=1)
        mbarrier.init(grad_full.index(at), count=1)
        mbarrier.init(grad_empty.index(at), count=1)
    tile = load_tile(tiles_ptr, gl.program_id(0), gl.num_programs(0))
    maps = (q_map, k_map, v_map, grad_map, log_map, mean_map)
    buffers = (k_buffer, v_buffer, q_buffers, grad_buffers, log_buffers, mean_buffers)
    barriers = (kv_full, q_full, q_empty, grad_full, grad_empty)
    gl.warp_specialize(
        [
            (
                _add_gradients,
                (
                    q_sums_map, k_grad_ptr, v_grad_ptr, buffers, ds_buffer, q_sums_buffer, barriers, tile, scale,
                    factor, G, R, STAGES,
                ),
            ),
            (_copy, (maps, buffers, barriers, tile, num_places, R, STAGES)),
        ],
        [1],
        [24],
    )  # fmt: skip
