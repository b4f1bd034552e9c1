"""Products of some rows by int4 weights on tensor cores, codes straight from registers.

A program multiplies tiles of 128 inputs. Words of 8 codes and rows of x come into shared memory several tiles ahead,
and a thread takes the words that the tensor cores want of it: word q of a group's four, of two outputs. A sum does not
depend on the order of its inputs, so the order is that in which codes can be taken out two at a time: number p and
p + 4 of a word, as halves of a register, become ``1 + n / 16`` by a shift and one logical operation. x is put into the
same order. What the ones add is the sum of a group's inputs, which the minimum is multiplied by anyway: a product by a
matrix of ones gives it. It is written in Gluon (:mod:`drivetrain.kernels.triton.hopper_common`), since Triton would
take the codes through shared memory once more.

The order: input ``2 q + 8 i + 16 j + h`` of the 32 that are multiplied together is code ``i + 2 j + 4 h`` of word q.

Shapes: M rows; O outputs; I inputs and W words of a tile; G groups of a tile.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from drivetrain.kernels.triton.int4_threads import first_of_tile, scale_and_least

# Triton 3.6 has it under another name.
async_load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared


# --- which thread has what: bits of a place that are those of a register, of a thread in its warp, and of a warp ------


@gluon.constexpr_function
def _warps(warps: int, rows: int) -> list[list[int]]:
    """Each warp has as many rows of its own; 0: all have all."""
    return [[rows << bit, 0] for bit in range(warps.bit_length() - 1)]


@gluon.constexpr_function
def _layout_of_words(outputs: int, warps: int) -> gl.constexpr:
    registers, threads = [[0, 4], [0, 8], [8, 0]], [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, threads, _warps(warps, 16), [], [outputs, 16])


@gluon.constexpr_function
def _layout_of_inputs(rows: int, warps: int) -> gl.constexpr:
    more_rows = [[8 << bit, 0] for bit in range((rows // 8).bit_length() - 1)]
    registers = [[0, 1], [0, 2], [0, 4], [0, 32], [0, 64], *more_rows]
    threads = [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, threads, _warps(warps, 0), [], [rows, 128])


@gluon.constexpr_function
def _layout_of_groups(outputs: int, groups: int, warps: int) -> gl.constexpr:
    registers = [*([0, 1 << bit] for bit in range(groups.bit_length() - 1)), [8, 0]]
    threads = [[0, 0], [0, 0], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, threads, _warps(warps, 16), [], [outputs, groups])


@gluon.jit
def _placed(x: gl.tensor, layout: gl.constexpr) -> gl.tensor:
    """The same numbers, of which each thread has those that it needs already."""
    return gl.convert_layout(x, layout, assert_trivial=True)


@gluon.jit
def _fourths(x: gl.tensor) -> gl.tuple:
    """The parts of the last two dims, of two each: 00, 01, 10, 11."""
    even, odd = x.split()
    part_0, part_2 = even.split()
    part_1, part_3 = odd.split()
    return part_0, part_1, part_2, part_3


@gluon.jit
def _columns(x_OG: gl.tensor, layout: gl.constexpr) -> gl.tuple:
    """One for each group of a tile."""
    if x_OG.shape[1] == 4:
        a, b, c, d = _fourths(x_OG.reshape([x_OG.shape[0], 2, 2]))
        return _placed(a, layout), _placed(b, layout), _placed(c, layout), _placed(d, layout)
    elif x_OG.shape[1] == 2:
        a, b = x_OG.split()
        return _placed(a, layout), _placed(b, layout)
    else:
        return (_placed(x_OG.reshape([x_OG.shape[0]]), layout),)


# --- a tile ----------------------------------------------------------------------------------------------------------


@gluon.jit
def _two_codes(words: gl.tensor, NUMBER: gl.constexpr, dtype: gl.constexpr) -> gl.tensor:
    """Codes ``NUMBER`` and ``NUMBER + 4`` of each word as ``1 + n / 16``, in a last dim."""
    SHIFT: gl.constexpr = 4 * NUMBER - 3 if dtype == gl.bfloat16 else 4 * NUMBER - 6
    moved = words << -SHIFT if SHIFT < 0 else words >> SHIFT
    both = (moved & 0x00780078) | 0x3F803F80 if dtype == gl.bfloat16 else (moved & 0x03C003C0) | 0x3C003C00
    first = both.to(gl.int16).to(dtype, bitcast=True)
    second = (both >> 16).to(gl.int16).to(dtype, bitcast=True)
    return gl.join(first, second)


@gluon.jit
def _factors(words: gl.tensor, layout: gl.constexpr, dtype: gl.constexpr) -> gl.tensor:
    """Four words of each output -> 32 numbers, in the order above."""
    j_0 = gl.join(_two_codes(words, 0, dtype), _two_codes(words, 1, dtype))
    j_1 = gl.join(_two_codes(words, 2, dtype), _two_codes(words, 3, dtype))
    all_Oqhij = gl.join(j_0, j_1)
    return _placed(all_Oqhij.permute((0, 4, 3, 1, 2)).reshape([words.shape[0], 32]), layout)


@gluon.jit
def _inputs(x_MI: gl.tensor, layout: gl.constexpr) -> gl.tuple:
    """128 inputs of each row -> four times 32, in the order above, with rows as the second dim."""
    M: gl.constexpr = x_MI.shape[0]
    x_jiqhM22 = x_MI.reshape([M, 2, 2, 4, 2, 2, 2]).permute((5, 6, 3, 4, 0, 1, 2))
    a, b, c, d = _fourths(x_jiqhM22.reshape([32, M, 2, 2]))
    return _placed(a, layout), _placed(b, layout), _placed(c, layout), _placed(d, layout)


@gluon.jit
def _with_tile(
    total_OM: gl.tensor,
    words_OW: gl.tensor,
    x_MI: gl.tensor,
    scale_OG: gl.tensor,
    least_OG: gl.tensor,
    GROUP: gl.constexpr,
    HAS_ZEROS: gl.constexpr,
    layout: gl.constexpr,
) -> gl.tensor:
    """The total and what a tile adds to it. Inputs of 32 are multiplied at a time, and scaled by group."""
    factor_layout: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    BLOCK_O: gl.constexpr = words_OW.shape[0]
    words = _fourths(words_OW.reshape([BLOCK_O, 2, 2, 4]).permute((0, 3, 1, 2)))
    x = _inputs(x_MI, gl.DotOperandLayout(1, layout, 2))
    scale_OG, least_OG = scale_and_least(scale_OG, least_OG, HAS_ZEROS)
    scales = _columns(scale_OG, gl.SliceLayout(1, layout))
    leasts = _columns(least_OG, gl.SliceLayout(1, layout))
    ones = gl.full([BLOCK_O, 32], 1.0, x_MI.dtype, factor_layout)
    nothing = gl.zeros(total_OM.shape, gl.float32, layout)
    products, sums = nothing, nothing
    for part in gl.static_range(4):
        products = mma_v2(_factors(words[part], factor_layout, x_MI.dtype), x[part], products)
        sums = mma_v2(ones, x[part], sums)
        if part == 3 or 32 * (part + 1) % GROUP == 0:
            total_OM += products * scales[32 * part // GROUP][:, None] + sums * leasts[32 * part // GROUP][:, None]
            products, sums = nothing, nothing
    return total_OM


# --- the kernel ------------------------------------------------------------------------------------------------------


@gluon.jit
def _places(
    ptr: gl.tensor,
    first: gl.tensor,
    end: gl.tensor,
    stride: gl.tensor,
    ROWS: gl.constexpr,
    COLUMNS: gl.constexpr,
    layout: gl.constexpr,
) -> gl.tensor:
    """Rows of a matrix, and their first columns. Rows that would lie behind the end are the last over again."""
    rows = gl.minimum(first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout)), end - 1)
    columns = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout))
    return ptr + rows.to(gl.int64)[:, None] * stride + columns[None, :]


@gluon.jit
def _ask(
    weight_buffers: gl.tensor,
    x_buffers: gl.tensor,
    weight_ptrs: gl.tensor,
    x_ptrs: gl.tensor,
    at: gl.tensor,
    tile: gl.tensor,
    is_there: gl.tensor,
) -> None:
    """Let a tile be copied to shared memory, if there is one."""
    async_load(weight_buffers.index(at), weight_ptrs + tile * 16, mask=is_there)
    async_load(x_buffers.index(at), x_ptrs + tile * 128, mask=is_there)
    async_copy.commit_group()


@gluon.jit(do_not_specialize=["num_rows"])
def some_rows(
    x_ptr: gl.tensor,
    weight_ptr: gl.tensor,
    scales_ptr: gl.tensor,
    mins_ptr: gl.tensor,
    bias_ptr: gl.tensor,
    out_ptr: gl.tensor,
    parts_ptr: gl.tensor,
    num_rows: gl.tensor,
    num_outputs: gl.tensor,
    num_inputs: gl.tensor,
    x_stride: gl.tensor,
    weight_stride: gl.tensor,
    scales_stride: gl.tensor,
    mins_stride: gl.tensor,
    GROUP: gl.constexpr,
    HAS_ZEROS: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    SPLITS: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_O: gl.constexpr,
    STAGES: gl.constexpr,
    num_warps: gl.constexpr,
) -> None:
    """``weight`` is read as int32: eight codes. Inputs are whole tiles, and each warp has 16 outputs.

    Rows and outputs that would lie behind the last are not stored.
    """
    gl.static_assert(16 * num_warps == BLOCK_O)
    dtype: gl.constexpr = x_ptr.dtype.element_ty
    G: gl.constexpr = 128 // GROUP if GROUP < 128 else 1
    layout_OG: gl.constexpr = _layout_of_groups(BLOCK_O, G, num_warps)
    layout_OM: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [num_warps, 1], [16, 8])
    copy_OW: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [num_warps, 1], [1, 0])
    copy_MI: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [num_warps, 1], [1, 0])
    first_row, first_output = first_of_tile(num_outputs, BLOCK_M, BLOCK_O)
    split = gl.program_id(1)
    weight_ptrs = _places(weight_ptr, first_output, num_outputs, weight_stride, BLOCK_O, 16, copy_OW)
    x_ptrs = _places(x_ptr, first_row, num_rows, x_stride, BLOCK_M, 128, copy_MI)
    scale_ptrs = _places(scales_ptr, first_output, num_outputs, scales_stride, BLOCK_O, G, layout_OG)
    min_ptrs = _places(mins_ptr, first_output, num_outputs, mins_stride, BLOCK_O, G, layout_OG)

    # Lines of different rows that threads read together lie in different banks.
    by_words: gl.constexpr = gl.SwizzledSharedLayout(4, 2, 4, [1, 0])
    by_inputs: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
    weight_buffers = gl.allocate_shared_memory(gl.int32, [STAGES, BLOCK_O, 16], by_words)
    x_buffers = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, 128], by_inputs)
    count = (num_inputs // 128 - split + SPLITS - 1) // SPLITS
    for turn in gl.static_range(STAGES - 1):
        _ask(weight_buffers, x_buffers, weight_ptrs, x_ptrs, turn, split + turn * SPLITS, turn < count)
    scale, least = gl.load(scale_ptrs + split * 128 // GROUP), gl.load(min_ptrs + split * 128 // GROUP)
    total = gl.zeros([BLOCK_O, BLOCK_M], gl.float32, layout_OM)
    for turn in range(count):
        async_copy.wait_group(STAGES - 2)
        ahead = turn + STAGES - 1
        _ask(weight_buffers, x_buffers, weight_ptrs, x_ptrs, ahead % STAGES, split + ahead * SPLITS, ahead < count)
        group = (split + gl.minimum(turn + 1, count - 1) * SPLITS) * 128 // GROUP
        next_scale, next_least = gl.load(scale_ptrs + group), gl.load(min_ptrs + group)
        words_OW = weight_buffers.index(turn % STAGES).load(_layout_of_words(BLOCK_O, num_warps))
        x_MI = x_buffers.index(turn % STAGES).load(_layout_of_inputs(BLOCK_M, num_warps))
        total = _with_tile(total, words_OW, x_MI, scale, least, GROUP, HAS_ZEROS, layout_OM)
        scale, least = next_scale, next_least

    outputs = first_output + gl.arange(0, BLOCK_O, layout=gl.SliceLayout(1, layout_OM))
    rows = first_row + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, layout_OM))
    is_in = (outputs < num_outputs)[:, None] & (rows < num_rows)[None, :]
    where = rows.to(gl.int64)[None, :] * num_outputs + outputs[:, None]
    if SPLITS > 1:
        gl.store(parts_ptr + split.to(gl.int64) * num_rows * num_outputs + where, total, mask=is_in)
    else:
        if HAS_BIAS:
            total += gl.load(bias_ptr + outputs, mask=outputs < num_outputs, other=0.0).to(gl.float32)[:, None]
        gl.store(out_ptr + where, total.to(out_ptr.dtype.element_ty), mask=is_in)
