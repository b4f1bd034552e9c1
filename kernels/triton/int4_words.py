"""Products of up to 64 rows by int4 weights on NVIDIA GPUs: where kernels in Gluon serve, and how they are launched.

They read a weight in words of eight codes, which never change places between threads. They are candidates beside the
kernel for all GPUs (:mod:`drivetrain.kernels.triton.products`): which is the fastest is measured.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton

from drivetrain.kernels.triton.launch import has_gluon
from drivetrain.kernels.triton.tuning import FUSED, Blocks

NOWHERE, BY_THREADS, ALSO_BY_TENSOR_CORES = 0, 1, 2
"""Which of the two kernels serve."""

_MOST_ROWS = 64
_ONE = 0x3F800000
"""The bits of 1.0."""

_TILE_INPUTS = 128
_MOST_SPLITS = 8
_STAGES = (4, 6)


@functools.cache
def _copies_to_shared_memory(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


def serving(x_MI: torch.Tensor, weight: torch.Tensor) -> int:
    """Which of the kernels can read these activations and this dense weight: as words, and by copies of 16 bytes."""
    inputs = x_MI.shape[1]
    if x_MI.shape[0] > _MOST_ROWS or x_MI.dtype.itemsize != 2 or inputs % 32 or not has_gluon(x_MI.device):
        return NOWHERE
    x_place, weight_place = x_MI.data_ptr(), weight.data_ptr()
    if x_place % 4 or x_MI.stride(0) % 2 or weight_place % 4:
        return NOWHERE
    # Copies are as wide as Triton knows addresses to be multiples, and of a stride it knows only whether 16 divides it.
    are_tiles = inputs % _TILE_INPUTS == 0 and x_MI.stride(0) % 16 == 0
    can_be_copied = are_tiles and x_place % 16 == weight_place % 16 == 0 and _copies_to_shared_memory(x_MI.device)
    return ALSO_BY_TENSOR_CORES if can_be_copied else BY_THREADS


def candidates(served: int, rows: int, outputs: int, inputs: int, processors: int) -> list[Blocks]:
    """Ways to launch them for a class of rows. ``served``: what :func:`serving` found."""
    if served == NOWHERE or rows > _MOST_ROWS:
        return []
    found = []
    if rows <= 4:
        pairs = ((4, 1), (8, 1), (4, 2), (2, 4)) if rows == 1 else ((4, 1), (2, 2))
        found += [Blocks.of(warps, WORDS=BY_THREADS, SPLITS=1, BLOCK_M=rows, BLOCK_O=wide) for wide, warps in pairs]
    if rows > 1 and served == ALSO_BY_TENSOR_CORES:
        height = min(32, max(8, rows))
        for warps in (4, 8):
            programs, splits = triton.cdiv(outputs, 16 * warps) * triton.cdiv(rows, height), 1
            while splits < _MOST_SPLITS and programs * splits < processors and inputs >= 4 * _TILE_INPUTS * splits:
                splits *= 2
            shape = {"SPLITS": splits, "BLOCK_M": height, "BLOCK_O": 16 * warps}
            found += [Blocks.of(warps, stages, WORDS=ALSO_BY_TENSOR_CORES, **shape) for stages in _STAGES]
    return found


def launch(
    x_MI: torch.Tensor,
    packed: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    bias: torch.Tensor | None,
    out: torch.Tensor,
    parts: torch.Tensor | None,
    group: int,
    grid: tuple[int, int],
    blocks: dict[str, Any],
) -> None:
    """Launch one of the kernels. ``packed``: weight, scales and minima, all dense; the others are those of
    :meth:`drivetrain.kernels.triton.product_tiles.Product.run`."""
    weight, scales, mins = packed
    words = weight.view(torch.int32)
    num_rows, num_inputs = x_MI.shape
    shared = {"GROUP": group, "HAS_ZEROS": mins.dtype == torch.uint8, "HAS_BIAS": bias is not None, **FUSED}
    shared |= {name: blocks[name] for name in ("BLOCK_M", "BLOCK_O", "num_warps")}
    if blocks["WORDS"] == ALSO_BY_TENSOR_CORES:
        from drivetrain.kernels.triton.int4_tiles import some_rows

        some_rows[grid](
            x_MI,
            words,
            scales,
            mins,
            bias,
            out,
            parts,
            num_rows,
            out.shape[1],
            num_inputs,
            x_MI.stride(0),
            words.stride(0),
            scales.stride(0),
            mins.stride(0),
            SPLITS=blocks["SPLITS"],
            STAGES=blocks["num_stages"],
            **shared,
        )
        return
    from drivetrain.kernels.triton.int4_threads import few_rows

    pairs = x_MI.view(torch.int32)
    few_rows[grid[:1]](
        pairs,
        words,
        scales,
        mins,
        bias,
        out,
        num_rows,
        out.shape[1],
        num_inputs // 8,
        pairs.stride(0),
        words.stride(0),
        scales.stride(0),
        mins.stride(0),
        _ONE,
        IS_BFLOAT16=x_MI.dtype == torch.bfloat16,
        EVEN=num_inputs % (1024 * blocks["num_warps"]) == 0,
        **shared,
    )
