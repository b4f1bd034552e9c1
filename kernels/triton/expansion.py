"""Weights of a few bits written out in full, for products of many rows.

A product that takes codes apart does so once for every tile of rows. From some number of rows on it is faster to do it
once in all, and to let torch's library multiply, though the weight is then written and read in its full size: of 4 bits
nine times the bytes. Where that is depends on shape and device, so it is a candidate beside the others, and timed.
Weights are rounded to the dtype of the activations, which the other kernels never do; so it is for half precision.

Shapes: M rows; O outputs; I inputs; U units, G groups of inputs; K bytes of codes of a unit or a group.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from drivetrain.kernels.triton.gguf_blocks import (
    LAYOUTS,
    codes_of,
    first_input,
    heads_of,
    load,
    scale_and_least_of,
    unit_at,
)
from drivetrain.kernels.triton.launch import INTERPRETED
from drivetrain.kernels.triton.product_tiles import scale_and_least
from drivetrain.kernels.triton.tuning import FUSED

FEWEST_ROWS = 64
"""Below, weights of 4 bits written out in half precision cost more than all that a kernel of their own can lose."""

_TILE = 4096
"""Weights of a program."""


def worth_trying(rows: int, itemsize: int) -> bool:
    """Whether torch's library, with the weight written out, is a candidate for a class of rows."""
    return rows >= FEWEST_ROWS and itemsize == 2 and not INTERPRETED


@triton.jit
def three_bits(low: tl.tensor, high: tl.tensor) -> tl.tensor:
    """Values of three bits side by side in the order of the inputs, along the last dim. low: bytes with the lower two
    bits of four values each; high: bytes with the third bits of eight."""
    thirds = tl.interleave(high & 15, high >> 4)
    first, second = (low & 3) | ((thirds & 1) << 2), ((low >> 2) & 3) | ((thirds & 2) << 1)
    third, fourth = ((low >> 4) & 3) | (thirds & 4), (low >> 6) | ((thirds & 8) >> 1)
    return tl.interleave(tl.interleave(first, third), tl.interleave(second, fourth))


@triton.jit
def _groups(
    low_ptr: tl.tensor,
    high_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    mins_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_outputs: tl.tensor,
    num_groups: tl.tensor,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_G: tl.constexpr,
) -> None:
    """int4 or int3 with a scale and a minimum, or a zero point, for each group. All tensors are dense."""
    outputs = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    groups = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    is_in = (outputs < num_outputs)[:, None, None] & (groups < num_groups)[None, :, None]
    group = outputs.to(tl.int64)[:, None, None] * num_groups + groups[None, :, None]
    if BITS == 4:
        places = tl.arange(0, GROUP // 2)[None, None, :]
        bytes_ = tl.load(low_ptr + group * (GROUP // 2) + places, mask=is_in, other=0)
        values = tl.interleave(bytes_ & 15, bytes_ >> 4)
    else:
        fours, eights = tl.arange(0, GROUP // 4)[None, None, :], tl.arange(0, GROUP // 8)[None, None, :]
        low = tl.load(low_ptr + group * (GROUP // 4) + fours, mask=is_in, other=0)
        values = three_bits(low, tl.load(high_ptr + group * (GROUP // 8) + eights, mask=is_in, other=0))
    scale, least = scale_and_least(scales_ptr + group, mins_ptr + group, is_in, HAS_ZEROS)
    full = values.to(tl.float32) * scale + least
    inputs = tl.arange(0, GROUP)[None, None, :]
    tl.store(out_ptr + group * GROUP + inputs, full.to(out_ptr.dtype.element_ty), mask=is_in)


def groups_in_full(
    values: list[torch.Tensor], scales: torch.Tensor, mins: torch.Tensor, group: int, dtype: torch.dtype
) -> torch.Tensor:
    """Weights of ``linear_int4`` or, of two tensors of bits, ``linear_int3``: [O, I]. All are dense."""
    num_outputs, num_groups = scales.shape
    full_OI = torch.empty((num_outputs, num_groups * group), dtype=dtype, device=scales.device)
    at_once = min(triton.next_power_of_2(num_groups), max(1, _TILE // 8 // group))
    height = max(1, _TILE // (at_once * group))
    _groups[(triton.cdiv(num_outputs, height), triton.cdiv(num_groups, at_once))](
        values[0],
        values[-1],
        scales,
        mins,
        full_OI,
        num_outputs,
        num_groups,
        BITS=4 if len(values) == 1 else 3,
        GROUP=group,
        HAS_ZEROS=mins.dtype == torch.uint8,
        BLOCK_O=height,
        BLOCK_G=at_once,
        **FUSED,
    )
    return full_OI


@triton.jit
def _blocks(
    bytes_ptr: tl.tensor,
    halves_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_outputs: tl.tensor,
    num_units: tl.tensor,
    halves_by_output: tl.tensor,
    TYPE: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
    UNITS: tl.constexpr,
    UNIT_BYTES: tl.constexpr,
    PARTS: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_U: tl.constexpr,
) -> None:
    """Blocks of GGUF files. EVEN: programs have units and outputs everywhere."""
    outputs = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    units = (tl.program_id(1) * BLOCK_U + tl.arange(0, BLOCK_U))[None, :, None]
    is_in = (outputs < num_outputs)[:, None, None] & (units < num_units)
    unit, places = units % UNITS, tl.arange(0, UNIT_BYTES)[None, None, :]
    at = outputs.to(tl.int64)[:, None, None] * halves_by_output + units // UNITS * (BLOCK_BYTES // 2)
    blocks, codes_ptrs = halves_ptr + at, bytes_ptr + 2 * at + places
    low, odd_low, high = unit_at(codes_ptrs, unit, is_in, TYPE, BLOCK_BYTES, EVEN)
    heads = heads_of(blocks, unit, is_in, TYPE, EVEN)
    rows = out_ptr + outputs.to(tl.int64)[:, None, None] * num_units * (UNIT_BYTES * PARTS)
    for PART in tl.static_range(PARTS):
        if (TYPE == 6) | (TYPE == 7):
            high = load(blocks + (TYPE - 5 + PART), is_in, EVEN).to(tl.int32)
        codes = codes_of(odd_low if PART % 2 else low, high, places, unit, PART, 0, TYPE)
        scale, least = scale_and_least_of(blocks, heads, unit, is_in, PART, TYPE, EVEN)
        full = codes * scale
        if (TYPE == 3) | (TYPE == 7) | (TYPE == 12) | (TYPE == 13):
            full += least
        first = first_input(units, PART, TYPE, UNIT_BYTES, PARTS)
        tl.store(rows + first + places, full.to(out_ptr.dtype.element_ty), mask=is_in)


def blocks_in_full(number: int, blocks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Weights of ``linear_gguf``: [O, I]. number: ggml's of the type; blocks: rows without gaps, at even addresses."""
    layout = LAYOUTS[number]
    num_outputs, num_units = blocks.shape[0], blocks.shape[1] // layout.block_bytes * layout.units
    full_OI = torch.empty((num_outputs, num_units * layout.unit_inputs), dtype=dtype, device=blocks.device)
    at_once = max(1, min(triton.next_power_of_2(num_units), 512 // layout.unit_inputs))
    height = max(1, _TILE // (at_once * layout.unit_inputs))
    halves = blocks.view(torch.int16)
    _blocks[(triton.cdiv(num_outputs, height), triton.cdiv(num_units, at_once))](
        blocks,
        halves,
        full_OI,
        num_outputs,
        num_units,
        halves.stride(0),
        TYPE=number,
        **layout.constants,
        EVEN=num_outputs % height == 0 and num_units % at_once == 0,
        BLOCK_O=height,
        BLOCK_U=at_once,
        **FUSED,
    )
    return full_OI
