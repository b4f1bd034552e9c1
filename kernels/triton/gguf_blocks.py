"""How blocks of GGUF files lie in memory, and how kernels read them.

A block is gone through in *units* of 16 or 32 bytes of codes, each byte of which has a code of every *part*: a part is
a run of inputs that share a scale. Of Q4_0, a block is one unit with two parts: the low nibbles of its 16 bytes are
the codes of inputs 0 to 15, the high ones those of 16 to 31.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from drivetrain.packed.gguf import BLOCK_TYPES


@dataclass(frozen=True)
class Layout:
    """How kernels go through the blocks of one type.

    units:      in a block.
    unit_bytes: bytes of codes that a unit has, each with a code of every part. (Of Q6_K, whose codes lie in two places,
                bytes of upper bits.)
    parts:      runs of ``unit_bytes`` inputs.
    """

    block_bytes: int
    units: int
    unit_bytes: int
    parts: int

    @property
    def unit_inputs(self) -> int:
        return self.unit_bytes * self.parts

    @property
    def alignment(self) -> int:
        """The largest power of two up to 16 that divides every address of codes."""
        return min(16, self.block_bytes & -self.block_bytes)

    @property
    def constants(self) -> dict[str, int]:
        """What kernels are compiled for."""
        return {
            "BLOCK_BYTES": self.block_bytes,
            "UNITS": self.units,
            "UNIT_BYTES": self.unit_bytes,
            "PARTS": self.parts,
        }


_UNITS = {2: (1, 16, 2), 3: (1, 16, 2), 6: (1, 16, 2), 7: (1, 16, 2), 8: (1, 32, 1),
          12: (4, 32, 2), 13: (4, 32, 2), 14: (4, 16, 4)}  # fmt: skip

LAYOUTS = {number: Layout(BLOCK_TYPES[number].num_bytes, *numbers) for number, numbers in _UNITS.items()}
"""ggml's number of a type -> its layout."""


# --- what blocks hold ------------------------------------------------------------------------------------------------
# TYPE is ggml's number: 2 Q4_0, 3 Q4_1, 6 Q5_0, 7 Q5_1, 8 Q8_0, 12 Q4_K, 13 Q5_K, 14 Q6_K. ``unit`` counts in a block.


@triton.jit
def low_at(unit: tl.tensor, PART: tl.constexpr, TYPE: tl.constexpr, BLOCK_BYTES: tl.constexpr) -> tl.tensor:
    """The byte of a block at which a unit's codes start, or their lower four bits."""
    if TYPE == 14:
        return unit // 2 * 64 + unit % 2 * 16 + PART % 2 * 32
    elif TYPE == 8:
        return unit * 32 + 2
    elif TYPE > 8:
        return unit * 32 + (BLOCK_BYTES - 128)
    else:
        return unit * 16 + (BLOCK_BYTES - 16)


@triton.jit
def high_at(unit: tl.tensor, TYPE: tl.constexpr) -> tl.tensor:
    """The byte at which a unit's upper bits start, where each byte of codes has a byte of them."""
    if TYPE == 14:
        return unit // 2 * 32 + unit % 2 * 16 + 128
    else:
        return unit * 0 + 16


@triton.jit
def first_input(
    units: tl.tensor, PART: tl.constexpr, TYPE: tl.constexpr, UNIT_BYTES: tl.constexpr, PARTS: tl.constexpr
) -> tl.tensor:
    """The first input of a part of units of a row."""
    if TYPE == 14:
        return units // 2 * 128 + units % 2 * 16 + PART * 32
    else:
        return units * (UNIT_BYTES * PARTS) + PART * UNIT_BYTES


@triton.jit
def load(ptrs: tl.tensor, is_in: tl.tensor, EVEN: tl.constexpr) -> tl.tensor:
    """Zeros where nothing is; EVEN: something is everywhere."""
    if EVEN:
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, mask=is_in, other=0)


@triton.jit
def half(words: tl.tensor) -> tl.tensor:
    return words.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def heads_of(
    blocks: tl.tensor, unit: tl.tensor, is_unit: tl.tensor, TYPE: tl.constexpr, EVEN: tl.constexpr
) -> tuple[tl.tensor, ...]:
    """What scales and minima of a unit are made of: two float16, and the three pairs of bytes that hold those of Q4_K
    and Q5_K. blocks: where blocks start, as pointers to int16."""
    d = half(load(blocks + (104 if TYPE == 14 else 0), is_unit, EVEN))
    least, first, second, third = d, unit, unit, unit
    if (TYPE == 3) | (TYPE == 7) | (TYPE == 12) | (TYPE == 13):
        least = half(load(blocks + 1, is_unit, EVEN))
    if (TYPE == 12) | (TYPE == 13):
        first = load(blocks + unit + 2, is_unit, EVEN).to(tl.int32)
        second = load(blocks + unit + 4, is_unit, EVEN).to(tl.int32)
        third = load(blocks + unit, is_unit, EVEN).to(tl.int32)  # of the first two units it is not used
    return d, least, first, second, third


@triton.jit
def scale_and_least_of(
    blocks: tl.tensor,
    heads: tl.tensor,
    unit: tl.tensor,
    is_unit: tl.tensor,
    PART: tl.constexpr,
    TYPE: tl.constexpr,
    EVEN: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Of a part of a unit: what its codes are multiplied by, as :func:`codes_of` gives them, and what is added."""
    d, least, first, second, third = heads
    scale = d
    if (TYPE == 12) | (TYPE == 13):
        one, other, upper = first >> 8 * PART, second >> 8 * PART, third >> 8 * PART
        scale = d * tl.where(unit < 2, one & 63, (other & 15) | ((upper >> 2) & 48)).to(tl.float32)
        least = -least * tl.where(unit < 2, other & 63, ((other >> 4) & 15) | ((one >> 2) & 48)).to(tl.float32)
    elif TYPE == 14:
        pair = load(blocks + (96 + PART) + unit // 2 * 4, is_unit, EVEN).to(tl.int32)
        scale = d * ((pair << (24 - unit % 2 * 8)) >> 24).to(tl.float32)
    if (PART > 0) & (TYPE < 14) | (PART > 1):
        scale = scale * 0.0625
    return scale, least


@triton.jit
def in_a_float(low: tl.tensor, TYPE: tl.constexpr) -> tl.tensor:
    """Bytes, or pairs of them, in the lowest bits of the float32 2^23; int8 as unsigned, 128 more."""
    bits = (low.to(tl.int32) & 0xFFFF) | 0x4B000000
    if TYPE == 8:
        bits = bits ^ 0x8080
    return bits


@triton.jit
def codes_of(
    low: tl.tensor,
    high: tl.tensor,
    byte: tl.tensor,
    unit: tl.tensor,
    PART: tl.constexpr,
    SECOND: tl.constexpr,
    TYPE: tl.constexpr,
) -> tl.tensor:
    """Codes as float32: exact, signed where the type has no minima, and times a power of two: they stay where they are
    in their byte or pair of bytes.

    An integer below 2^23 in the lowest bits of 2^23 is a sum in float32: subtracting takes what is not wanted away,
    without a conversion, of which GPUs make few at a time.

    low:    as :func:`in_a_float` gives them.
    byte:   its number in the unit, or that of the first of a pair.
    SECOND: 8 for the second byte of a pair, else 0.
    """
    AT: tl.constexpr = SECOND + 4 * (PART // 2 if TYPE == 14 else PART)
    middle = 0
    if TYPE == 8:
        bits = low & (-0x1000000 | (255 << SECOND))
        middle = 128 << SECOND
    else:
        bits = low & (-0x1000000 | (15 << AT))
        if TYPE == 2:
            middle = 8 << AT
        elif (TYPE == 6) | (TYPE == 7):
            bits |= ((high >> (byte + SECOND // 8)) & 1) << (AT + 4)
            middle = (16 << AT) if TYPE == 6 else 0
        elif TYPE == 13:
            bits |= (((high >> unit * 2) >> (SECOND + PART)) & 1) << (AT + 4)
        elif TYPE == 14:
            bits |= ((high >> (SECOND + 2 * PART)) & 3) << (AT + 4)
            middle = 32 << AT
    return bits.to(tl.float32, bitcast=True) - (8388608.0 + middle)


@triton.jit
def unit_at(
    codes_ptrs: tl.tensor,
    unit: tl.tensor,
    is_in: tl.tensor,
    TYPE: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
    EVEN: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The bytes of units whose threads have a byte each: of the even parts, as :func:`in_a_float` gives them, of the
    odd ones where they lie apart, and upper bits. codes_ptrs: the block's start, by byte."""
    low = in_a_float(load(codes_ptrs + low_at(unit, 0, TYPE, BLOCK_BYTES), is_in, EVEN), TYPE)
    odd_low, high = low, low
    if TYPE == 14:
        odd_low = in_a_float(load(codes_ptrs + low_at(unit, 1, TYPE, BLOCK_BYTES), is_in, EVEN), TYPE)
    if TYPE >= 13:
        high = load(codes_ptrs + high_at(unit, TYPE), is_in, EVEN).to(tl.int32)
    return low, odd_low, high
