"""Products of a few rows by int4 weights where each thread multiplies the codes that it has loaded.

A thread loads 16 bytes of a weight's row: 32 codes, all of one group, in four words. A code n is taken out of its word
by a shift and one logical operation, which makes it the float ``1 + n / 16``; what that adds to a sum is taken off with
the group's minimum. Weights of the next step are on their way meanwhile, and nothing passes through shared memory but
the sums at the end. It is written in Gluon (:mod:`drivetrain.kernels.triton.hopper_common`), since Triton would hand
weights or inputs over to other threads.

Shapes: M rows; O outputs; W words of 8 codes; U units of 32 codes; P = 4 pairs of inputs of a word.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def first_of_tile(num_outputs: gl.tensor, BLOCK_M: gl.constexpr, BLOCK_O: gl.constexpr) -> gl.tuple:
    """The first row and the first output of a program."""
    tiles_o = gl.cdiv(num_outputs, BLOCK_O)
    return gl.program_id(0) // tiles_o * BLOCK_M, gl.program_id(0) % tiles_o * BLOCK_O


@gluon.jit
def scale_and_least(scale: gl.tensor, least: gl.tensor, HAS_ZEROS: gl.constexpr) -> gl.tuple:
    """What a sum of products by ``1 + n / 16`` and a sum of inputs are multiplied by. HAS_ZEROS: ``least`` are zero
    points z, and stand for ``-z * scale``."""
    scale = scale.to(gl.float32) * 16
    if HAS_ZEROS:
        least = -scale * (1 + least.to(gl.float32) / 16)
    else:
        least = least.to(gl.float32) - scale
    return scale, least


@gluon.jit
def _two_inputs(pair: gl.tensor, IS_BFLOAT16: gl.constexpr) -> gl.tuple:
    """Two numbers of 16 bits that lie in one integer, the lower first, in float32."""
    if IS_BFLOAT16:
        first = (pair << 16).to(gl.float32, bitcast=True)
        second = (pair & -65536).to(gl.float32, bitcast=True)
    else:
        first = pair.to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32)
        second = (pair >> 16).to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32)
    return first, second


@gluon.jit
def _code(words: gl.tensor, NUMBER: gl.constexpr, one: gl.tensor) -> gl.tensor:
    """``1 + n / 16`` for code ``NUMBER`` of each word. ``one`` are the bits of 1.0: as an argument it is in a register,
    so that "and" and "or" are one instruction."""
    SHIFT: gl.constexpr = 4 * NUMBER - 19
    moved = words << -SHIFT if SHIFT < 0 else words >> SHIFT
    return ((moved & 0x00780000) | one).to(gl.float32, bitcast=True)


@gluon.jit
def _sums_of_units(
    x_MWP: gl.tensor, words_OW: gl.tensor, one: gl.tensor, IS_BFLOAT16: gl.constexpr, layout_MOW: gl.constexpr
) -> gl.tuple:
    """Of each 32 inputs: the sums of products [M, O, U], and of the inputs themselves [M, U]."""
    M: gl.constexpr = x_MWP.shape[0]
    W: gl.constexpr = x_MWP.shape[1]
    BLOCK_O: gl.constexpr = words_OW.shape[0]
    even, odd = x_MWP.reshape([M, W, 2, 2]).split()
    pairs_0, pairs_2 = even.split()
    pairs_1, pairs_3 = odd.split()
    pairs = (pairs_0, pairs_1, pairs_2, pairs_3)
    products = gl.zeros([M, BLOCK_O, W], gl.float32, layout_MOW)
    inputs = gl.zeros([M, W], gl.float32, gl.SliceLayout(1, layout_MOW))
    for number in gl.static_range(4):
        both = gl.convert_layout(pairs[number], gl.SliceLayout(1, layout_MOW), assert_trivial=True)
        first, second = _two_inputs(both, IS_BFLOAT16)
        products += first[:, None, :] * _code(words_OW, 2 * number, one)[None, :, :]
        products += second[:, None, :] * _code(words_OW, 2 * number + 1, one)[None, :, :]
        inputs += first + second
    return gl.sum(products.reshape([M, BLOCK_O, W // 4, 4]), axis=3), gl.sum(inputs.reshape([M, W // 4, 4]), axis=2)


@gluon.jit(do_not_specialize=["num_rows", "one"])
def few_rows(
    x_ptr: gl.tensor,
    weight_ptr: gl.tensor,
    scales_ptr: gl.tensor,
    mins_ptr: gl.tensor,
    bias_ptr: gl.tensor,
    out_ptr: gl.tensor,
    num_rows: gl.tensor,
    num_outputs: gl.tensor,
    num_words: gl.tensor,
    x_stride: gl.tensor,
    weight_stride: gl.tensor,
    scales_stride: gl.tensor,
    mins_stride: gl.tensor,
    one: gl.tensor,
    IS_BFLOAT16: gl.constexpr,
    GROUP: gl.constexpr,
    HAS_ZEROS: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    EVEN: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_O: gl.constexpr,
    num_warps: gl.constexpr,
) -> None:
    """``x`` and ``weight`` are read as int32: two inputs, eight codes. EVEN: no step has words behind the end of a row.

    Rows and outputs that would lie behind the last are not stored.
    """
    W: gl.constexpr = 128 * num_warps
    layout_MOW: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 1, 32], [1, 1, num_warps], [2, 1, 0])
    layout_OW: gl.constexpr = gl.SliceLayout(0, layout_MOW)
    layout_MOU: gl.constexpr = gl.BlockedLayout([1, 1, 1], [1, 1, 32], [1, 1, num_warps], [2, 1, 0])
    layout_OU: gl.constexpr = gl.SliceLayout(0, layout_MOU)
    layout_MWP: gl.constexpr = gl.BlockedLayout([1, 4, 4], [1, 32, 1], [1, num_warps, 1], [2, 1, 0])
    layout_MO: gl.constexpr = gl.SliceLayout(2, layout_MOU)
    first_row, first_output = first_of_tile(num_outputs, BLOCK_M, BLOCK_O)

    words = gl.arange(0, W, layout=gl.SliceLayout(0, layout_OW))
    outputs = gl.arange(0, BLOCK_O, layout=gl.SliceLayout(1, layout_OW))
    outputs = gl.minimum(first_output + outputs, num_outputs - 1).to(gl.int64)
    weight_ptrs = weight_ptr + outputs[:, None] * weight_stride + words[None, :]
    units = gl.arange(0, W // 4, layout=gl.SliceLayout(0, layout_OU))
    outputs = gl.arange(0, BLOCK_O, layout=gl.SliceLayout(1, layout_OU))
    outputs = gl.minimum(first_output + outputs, num_outputs - 1).to(gl.int64)
    scale_ptrs = scales_ptr + outputs[:, None] * scales_stride + (units * 32 // GROUP)[None, :]
    min_ptrs = mins_ptr + outputs[:, None] * mins_stride + (units * 32 // GROUP)[None, :]
    rows = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, gl.SliceLayout(2, layout_MWP)))
    rows = gl.minimum(first_row + rows, num_rows - 1).to(gl.int64)
    x_words = gl.arange(0, W, layout=gl.SliceLayout(0, gl.SliceLayout(2, layout_MWP)))
    pairs = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, layout_MWP)))
    x_ptrs = x_ptr + rows[:, None, None] * x_stride + x_words[None, :, None] * 4 + pairs[None, None, :]

    total = gl.zeros([BLOCK_M, BLOCK_O, W // 4], gl.float32, layout_MOU)
    weight = gl.load(weight_ptrs, mask=(words < num_words)[None, :], other=0)
    for start in range(0, num_words, W):
        group = start * 8 // GROUP
        if EVEN:
            scale, least = gl.load(scale_ptrs + group), gl.load(min_ptrs + group)
            x = gl.load(x_ptrs + start * 4)
        else:
            is_unit = (units * 4 < num_words - start)[None, :]
            scale = gl.load(scale_ptrs + group, mask=is_unit, other=0.0)
            least = gl.load(min_ptrs + group, mask=is_unit, other=0)
            x = gl.load(x_ptrs + start * 4, mask=(x_words < num_words - start)[None, :, None], other=0)
        is_there = (words < num_words - start - W)[None, :]
        next_weight = gl.load(weight_ptrs + start + W, mask=is_there, other=0)
        products, inputs = _sums_of_units(x, weight, one, IS_BFLOAT16, layout_MOW)
        products = gl.convert_layout(products, layout_MOU, assert_trivial=True)
        inputs = gl.convert_layout(inputs, gl.SliceLayout(1, layout_MOU), assert_trivial=True)
        scale, least = scale_and_least(scale, least, HAS_ZEROS)
        total += products * scale[None, :, :] + inputs[:, None, :] * least[None, :, :]
        weight = next_weight

    out = gl.sum(total, axis=2)
    rows = first_row + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, layout_MO))
    outputs = first_output + gl.arange(0, BLOCK_O, layout=gl.SliceLayout(0, layout_MO))
    if HAS_BIAS:
        out += gl.load(bias_ptr + outputs, mask=outputs < num_outputs, other=0.0).to(gl.float32)[None, :]
    where = rows.to(gl.int64)[:, None] * num_outputs + outputs[None, :]
    is_in = (rows < num_rows)[:, None] & (outputs < num_outputs)[None, :]
    gl.store(out_ptr + where, out.to(out_ptr.dtype.element_ty), mask=is_in)
