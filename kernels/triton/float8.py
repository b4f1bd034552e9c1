"""float8_e4m3fn by its bits, so that it is the same on every GPU, whether or not it knows float8, and in Triton's
interpreter."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def from_fp8(bits: tl.tensor) -> tl.tensor:
    """float8_e4m3fn, as uint8, to float16, exactly and on any hardware: the exponent's bias is 8 less."""
    wide = bits.to(tl.uint16)
    value = (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True) * 256.0
    return tl.where((wide & 0x7F) == 0x7F, float("nan"), value)


@triton.jit
def fp8_bits(x: tl.tensor) -> tl.tensor:
    """float32 numbers, up to 448 in size, rounded to float8_e4m3fn, ties to even: its bits, in int32."""
    bits = x.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    bits = bits & 0x7FFFFFFF
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960
    # Below 2^-6, multiples of 2^-9, which the addition of 2^14 rounds to.
    small = (bits.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    return sign | tl.where(bits >= 0x3C800000, normal, small)
