"""Keys and values as int8 or fp8 (e4m3) with a scale for each token and head: the layout ``PAGED_SCALED``.

Bits are put together by hand, so that this is the same on every GPU, whether or not it knows fp8, and in the
interpreter. The codes are those that ``drivetrain.pages`` writes, but where a number lies in the middle between two and
the last bit of a quotient or a product decides.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from drivetrain.contracts.attention import ScaledPages
from drivetrain.kernels.triton.float8 import fp8_bits

PLAIN, INT8, FP8 = 0, 1, 2
"""What the kernels are compiled for: keys and values as they are, or codes."""


@triton.jit
def from_codes(codes: tl.tensor, FORMAT: tl.constexpr) -> tl.tensor:
    """int8 as numbers. fp8, loaded as bytes, as half precision divided by 256: sign, exponent and mantissa are moved to
    their places there, and the biases of the exponents are 7 and 15."""
    if FORMAT == 1:
        numbers = codes.to(tl.float32)
    else:
        wide = codes.to(tl.int16)
        numbers = (((wide << 8) >> 1) & -16385).to(tl.float16, bitcast=True)
    return numbers


@triton.jit
def load_scales(scales_ptr: tl.tensor, tokens: tl.tensor, is_key: tl.tensor, FORMAT: tl.constexpr) -> tl.tensor:
    """What products with codes are multiplied by. tokens: places in a layer's scales."""
    scales = tl.load(scales_ptr + tokens, mask=is_key, other=0.0)
    if FORMAT == 2:
        scales = scales * 256.0
    return scales


@triton.jit
def to_codes(rows: tl.tensor, FORMAT: tl.constexpr) -> tl.tensor:
    """Codes of float32 rows, and the rows' scales; zeros behind the end of a row change nothing.

    The largest number is found among bits, where a NaN is larger than any.
    """
    largest_code = 127.0 if FORMAT == 1 else 448.0
    bits = rows.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    most = tl.maximum(tl.max(bits, axis=1), 0x0D800000)  # at least 2^-100
    largest = most.to(tl.float32, bitcast=True)
    is_finite = most < 0x7F800000
    # An infinity times 0 would be an invalid operation, which the interpreter reports.
    x = rows * tl.where(is_finite, largest_code / largest, float("nan"))[:, None]
    scales = tl.where(is_finite, largest / largest_code, float("nan"))
    if FORMAT == 1:
        # The addition rounds to the nearest integer, ties to even, and leaves it in the lowest bits.
        codes = (x + 12582912.0).to(tl.int32, bitcast=True)
    else:
        codes = fp8_bits(x)
    return codes & 0xFF, scales


def parts_of(pages: torch.Tensor | ScaledPages) -> tuple[torch.Tensor, torch.Tensor | None, int]:
    """A layer's keys or values as kernels take them, their scales, and the format."""
    if not isinstance(pages, ScaledPages):
        return pages, None, PLAIN
    if pages.codes.dtype == torch.int8:
        return pages.codes, pages.scales, INT8
    return pages.codes.view(torch.uint8), pages.scales, FP8
