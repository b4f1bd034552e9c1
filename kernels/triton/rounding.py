"""Activations rounded to int8 or float8, as products of rounded activations take them.

Every number is what the operations of the contract say, bit by bit: scales and quotients are float32 divisions, rounded
to the nearest, and of two as near the even one is taken. What has no finite scale (a NaN or an infinity is in it) gets
the scale NaN, and so do all products with it.

Shapes: M rows, all leading dims together; I inputs; B blocks of 32 inputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from drivetrain.kernels.triton.float8 import fp8_bits, from_fp8
from drivetrain.kernels.triton.launch import as_rows, power_of_two
from drivetrain.kernels.triton.tuning import FUSED

ROUNDED_BLOCK = 32
"""Inputs of a row that have a scale of their own in :func:`to_int8_blocks`."""

_INT8, _FLOAT8, _FLOAT8_IN_HALVES = 1, 2, 3
_ALIGNED = 16
"""Rows of codes begin at a multiple of so many, so that they are read in wide loads however long they are."""

_ROW_IN_REGISTERS, _PART_OF_A_ROW = 16_384, 4096
_NUMBERS_AT_ONCE = 2048


@triton.jit
def _size(x: tl.tensor) -> tl.tensor:
    """Bits of ``abs(x)``, as an integer: the order is that of the numbers, but that a NaN is larger than any."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _scale(largest_size: tl.tensor, largest_code: tl.constexpr) -> tl.tensor:
    """float32 ``largest / largest_code``; NaN where the largest is not finite."""
    is_finite = largest_size < 0x7F800000
    largest = tl.where(is_finite, largest_size, 0).to(tl.float32, bitcast=True)
    return tl.where(is_finite, tl.div_rn(largest, tl.full(largest.shape, largest_code, tl.float32)), float("nan"))


@triton.jit
def _quotients(x: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """``x / scale`` in float32; x itself where that is 0, which is to be rounded to zeros, or no number."""
    size = _size(scale)
    x, divisor = tl.broadcast(x, tl.where((size > 0) & (size < 0x7F800000), scale, 1.0))
    return tl.div_rn(x, divisor)


@triton.jit
def _to_int8(quotients: tl.tensor) -> tl.tensor:
    """The addition rounds to the nearest integer, ties to even, and leaves it in the lowest bits.

    A scale below the least normal number may be rounded so far down that a quotient is more than 127.
    """
    integers = (quotients + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
    return tl.minimum(tl.maximum(integers, -127), 127).to(tl.int8)


@triton.jit
def _to_float8(quotients: tl.tensor) -> tl.tensor:
    """uint8 with the bits of float8_e4m3fn; cut at 448, a NaN stays one."""
    size = _size(quotients)
    cut = tl.minimum(size, 0x43E00000) | (quotients.to(tl.int32, bitcast=True) & -0x80000000)
    return tl.where(size > 0x7F800000, 0x7F, fp8_bits(cut.to(tl.float32, bitcast=True))).to(tl.uint8)


@triton.jit
def _codes(x: tl.tensor, scale: tl.tensor, FORMAT: tl.constexpr) -> tl.tensor:
    quotients = _quotients(x, scale)
    if FORMAT == 1:
        codes = _to_int8(quotients)
    elif FORMAT == 2:
        codes = _to_float8(quotients)
    else:
        codes = from_fp8(_to_float8(quotients))
    return codes


@triton.jit
def _round_row(
    x_ptr: tl.tensor,
    given_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    num_inputs: tl.tensor,
    x_stride: tl.tensor,
    codes_stride: tl.tensor,
    FORMAT: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """A row with one scale; a row that does not fit into registers (not IS_WHOLE) is read twice.

    given: where the scale is that of all rows, unless it is 0.
    """
    row = tl.program_id(0).to(tl.int64)
    x_row, codes_row = x_ptr + row * x_stride, codes_ptr + row * codes_stride
    inputs = tl.arange(0, BLOCK)
    x = tl.load(x_row + inputs, mask=inputs < num_inputs, other=0.0).to(tl.float32)
    sizes = _size(x)
    if not IS_WHOLE:
        for start in range(BLOCK, num_inputs, BLOCK):
            more = tl.load(x_row + start + inputs, mask=start + inputs < num_inputs, other=0.0).to(tl.float32)
            sizes = tl.maximum(sizes, _size(more))
    scale = _scale(tl.max(sizes, axis=0), 127.0 if FORMAT == 1 else 448.0)
    if FORMAT != 1:
        given = tl.load(given_ptr).to(tl.float32)
        scale = tl.where(given == 0.0, scale, tl.where(_size(given) < 0x7F800000, given, float("nan")))
    tl.store(scales_ptr + row, scale)
    tl.store(codes_row + inputs, _codes(x, scale, FORMAT), mask=inputs < num_inputs)
    if not IS_WHOLE:
        for start in range(BLOCK, num_inputs, BLOCK):
            is_in = start + inputs < num_inputs
            more = tl.load(x_row + start + inputs, mask=is_in, other=0.0).to(tl.float32)
            tl.store(codes_row + start + inputs, _codes(more, scale, FORMAT), mask=is_in)


@triton.jit(do_not_specialize=["num_blocks"])
def _round_blocks(
    x_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    num_blocks: tl.tensor,
    blocks_per_row: tl.tensor,
    x_stride: tl.tensor,
    EVEN_FIRST: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    """BLOCKS blocks of 32 inputs, of all rows one after another."""
    blocks = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    places = tl.arange(0, 32)
    inputs = places % 16 * 2 + places // 16 if EVEN_FIRST else places
    is_block = blocks < num_blocks
    starts = blocks // blocks_per_row * x_stride + blocks % blocks_per_row * 32
    x = tl.load(x_ptr + starts[:, None] + inputs[None, :], mask=is_block[:, None], other=0.0).to(tl.float32)
    scales = _scale(tl.max(_size(x), axis=1), 127.0)
    codes = _codes(x, scales[:, None], 1)
    sums = tl.sum(codes.to(tl.int32), axis=1).to(tl.float32) * scales
    tl.store(codes_ptr + blocks[:, None] * 32 + places[None, :], codes, mask=is_block[:, None])
    tl.store(scales_ptr + blocks, scales, mask=is_block)
    tl.store(sums_ptr + blocks, sums, mask=is_block)


# --- how they are launched -----------------------------------------------------------------------------------------


def to_int8_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int8 [M, I] and scales float32 [M] of ``x [..., I]``: a row is nearly ``codes * scale``.

    Rows of codes lie in memory one by one, with gaps between them.
    """
    return _rounded_rows(x, None, torch.int8, _INT8)


def to_float8_rows(
    x: torch.Tensor, x_scale: torch.Tensor, dtype: torch.dtype = torch.float8_e4m3fn
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in float8_e4m3fn; ``x_scale []`` is the scale of every row, or 0.

    dtype: float16 for the same numbers in that dtype, which holds them all.
    """
    if dtype == torch.float16:
        return _rounded_rows(x, x_scale, dtype, _FLOAT8_IN_HALVES)
    codes_MI, scales_M = _rounded_rows(x, x_scale, torch.uint8, _FLOAT8)
    return codes_MI.view(torch.float8_e4m3fn), scales_M


def to_int8_blocks(x: torch.Tensor, *, even_first: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes int8 [M, I], scales float32 [M, B] and sums float32 [M, B] of ``x [..., I]``, each dense; I is a multiple
    of 32. A block of x is nearly ``codes * scale``, and its sum is that of these products.

    even_first: within a block the codes of inputs 0, 2, .. 30 come before those of 1, 3, .. 31.
    """
    x_MI = as_rows(x)
    num_rows, num_inputs = x_MI.shape
    per_row = num_inputs // ROUNDED_BLOCK
    codes_MI = torch.empty((num_rows, num_inputs), dtype=torch.int8, device=x.device)
    scales_MB, sums_MB = torch.empty((2, num_rows, per_row), dtype=torch.float32, device=x.device)
    num_blocks = num_rows * per_row
    if num_blocks:
        at_once = _NUMBERS_AT_ONCE // ROUNDED_BLOCK
        _round_blocks[(triton.cdiv(num_blocks, at_once),)](
            x_MI,
            codes_MI,
            scales_MB,
            sums_MB,
            num_blocks,
            per_row,
            x_MI.stride(0),
            EVEN_FIRST=even_first,
            BLOCKS=at_once,
            num_warps=4,
            **FUSED,
        )
    return codes_MI, scales_MB, sums_MB


def _rounded_rows(
    x: torch.Tensor, x_scale: torch.Tensor | None, dtype: torch.dtype, form: int
) -> tuple[torch.Tensor, torch.Tensor]:
    x_MI = as_rows(x)
    num_rows, num_inputs = x_MI.shape
    width = triton.cdiv(num_inputs, _ALIGNED) * _ALIGNED
    codes_MI = torch.empty((num_rows, width), dtype=dtype, device=x.device)[:, :num_inputs]
    scales_M = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    if num_rows:
        is_whole = num_inputs <= _ROW_IN_REGISTERS
        block = power_of_two(num_inputs) if is_whole else _PART_OF_A_ROW
        _round_row[(num_rows,)](
            x_MI,
            x_scale,
            codes_MI,
            scales_M,
            num_inputs,
            x_MI.stride(0),
            codes_MI.stride(0),
            FORMAT=form,
            IS_WHOLE=is_whole,
            BLOCK=block,
            num_warps=4 if block <= _NUMBERS_AT_ONCE else 8,
            **FUSED,
        )
    return codes_MI, scales_M
