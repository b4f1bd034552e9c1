"""Products of rounded activations with quantized weights: int8 by int8 or by nibbles, float8 by float8.

Integers are summed in integers, float8 in float32; scales of rows, blocks and outputs are applied to these sums.
Gradients are those of the product that rounds nothing.

Shapes: M rows, all leading dims together; I, O features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl

from drivetrain.contracts.kernels import KernelSpec
from drivetrain.kernels.triton.launch import multiplies_float8
from drivetrain.kernels.triton.product_tiles import Product, quantized, scale_and_least, store_tile, tile_of
from drivetrain.kernels.triton.products import (
    FP8,
    FP8_BY_FP8,
    INT8_BY_INT8,
    LinearByGroup,
    LinearByRow,
    multiply_by_row,
)
from drivetrain.kernels.triton.rounding import ROUNDED_BLOCK, to_float8_rows, to_int8_blocks, to_int8_rows
from drivetrain.kernels.triton.tuning import Tuner


@triton.jit(do_not_specialize=["num_rows"])
def _by_block(
    codes_ptr: tl.tensor,
    x_scales_ptr: tl.tensor,
    x_sums_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    mins_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    parts_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_outputs: tl.tensor,
    num_blocks: tl.tensor,
    weight_by_output: tl.tensor,
    scales_by_output: tl.tensor,
    mins_by_output: tl.tensor,
    BLOCKS_IN_GROUP: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_I: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
) -> None:
    """int4 with scale s and minimum m for each group, by int8 with scale t and sum u for each block of 32 inputs: ``sum
    over blocks of s * t * (codes @ nibbles) + m * u``.

    HAS_ZEROS: minima are zero points z, and m is ``-z * s``.
    In a block, codes of even inputs come before those of odd ones: they meet the low nibbles of its 16 bytes, and then
    the high ones.
    """
    BLOCKS: tl.constexpr = BLOCK_I // 32
    tile_m, tile_o = tile_of(tl.program_id(0), num_rows, num_outputs, BLOCK_M, BLOCK_O)
    split = tl.program_id(1)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    outputs = tile_o * BLOCK_O + tl.arange(0, BLOCK_O)
    is_row, is_output = rows < num_rows, outputs < num_outputs
    places = tl.arange(0, 32)
    x_rows = rows.to(tl.int64) * num_blocks
    code_rows = codes_ptr + x_rows[:, None] * 32 + places[None, :]
    weight_rows = weight_ptr + outputs.to(tl.int64)[None, :] * weight_by_output + (places % 16)[:, None]
    shifts = (places // 16 * 4)[:, None].to(tl.uint8)
    scale_rows = scales_ptr + outputs.to(tl.int64) * scales_by_output
    min_rows = mins_ptr + outputs.to(tl.int64) * mins_by_output
    total = tl.zeros([BLOCK_M, BLOCK_O], dtype=tl.float32)
    for start in range(split * BLOCKS, num_blocks, BLOCKS * SPLITS):
        for beside in tl.static_range(BLOCKS):
            block = start + beside
            is_x, is_weight = is_row, is_output
            if not EVEN_I:  # behind the last block there are no rows and no outputs
                is_x = rows < tl.where(block < num_blocks, num_rows, 0)
                is_weight = outputs < tl.where(block < num_blocks, num_outputs, 0)
            group = block // BLOCKS_IN_GROUP
            codes = tl.load(code_rows + block * 32, mask=is_x[:, None], other=0)
            bytes_ = tl.load(weight_rows + block * 16, mask=is_weight[None, :], other=0)
            scale, least = scale_and_least(scale_rows + group, min_rows + group, is_weight, HAS_ZEROS)
            x_scale = tl.load(x_scales_ptr + x_rows + block, mask=is_x, other=0.0)
            x_sum = tl.load(x_sums_ptr + x_rows + block, mask=is_x, other=0.0)
            product = tl.dot(codes, ((bytes_ >> shifts) & 15).to(tl.int8), out_dtype=tl.int32)
            total += product.to(tl.float32) * x_scale[:, None] * scale[None, :] + x_sum[:, None] * least[None, :]
    store_tile(total, rows, outputs, split, bias_ptr, out_ptr, parts_ptr, num_rows, num_outputs, HAS_BIAS, SPLITS)


# --- how they are launched -----------------------------------------------------------------------------------------


class LinearW8A8(Product):
    """``linear_w8a8``."""

    def __init__(self, spec: KernelSpec, tuner: Tuner) -> None:
        super().__init__(spec, tuner)
        self._exact = LinearByRow(replace(spec, operation="linear_int8"), tuner)
        self.transposed = self._exact.transposed

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: Any) -> torch.Tensor:
        return multiply_by_row(self, INT8_BY_INT8, x, weight, scales, bias, to_int8_rows(x))


class LinearFp8A8(Product):
    """``linear_fp8a8``: float8 as it is where the device multiplies it, and elsewhere as float16, which holds it all.

    A device's own sums of float8 are not fine enough for what is expected of float32.
    """

    def __init__(self, spec: KernelSpec, tuner: Tuner) -> None:
        super().__init__(spec, tuner)
        self._is_fine = spec.dtype == "float32"
        self._exact = LinearByRow(replace(spec, operation="linear_fp8"), tuner)

    def __call__(
        self, x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, x_scale: torch.Tensor, bias: Any
    ) -> torch.Tensor:
        if self._is_fine or not multiplies_float8(x.device):
            return multiply_by_row(self, FP8, x, weight, scales, bias, to_float8_rows(x, x_scale, torch.float16))
        codes_MI, x_scales_M = to_float8_rows(x, x_scale)
        rounded = codes_MI.view(torch.uint8), x_scales_M
        return multiply_by_row(self, FP8_BY_FP8, x, weight, scales, bias, rounded)

    def transposed(
        self, grad: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, x_scale: torch.Tensor
    ) -> torch.Tensor:
        """``grad @ (weight * scales)``."""
        return self._exact.transposed(grad, weight, scales)


class LinearInt4A8(Product):
    """``linear_int4_a8``."""

    widest = 128
    """Beside its sums, a tile's product of one block takes as many registers."""

    def __init__(self, spec: KernelSpec, tuner: Tuner) -> None:
        super().__init__(spec, tuner)
        self._blocks_in_group = int(spec.params["group"]) // ROUNDED_BLOCK
        self._exact = LinearByGroup(replace(spec, operation="linear_int4"), tuner)
        self.transposed = self._exact.transposed

    def __call__(
        self, x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, mins: torch.Tensor, bias: Any
    ) -> torch.Tensor:
        weight, scales, mins = weight.contiguous(), scales.contiguous(), mins.contiguous()
        bias = None if bias is None else bias.contiguous()
        codes_MI, x_scales_MB, x_sums_MB = to_int8_blocks(x, even_first=True)

        def launch_on(x_MI: Any, out: Any, parts: Any, grid: tuple[int, int], options: dict[str, int]) -> None:
            _by_block[grid](
                codes_MI,
                x_scales_MB,
                x_sums_MB,
                weight,
                scales,
                mins,
                bias,
                out,
                parts,
                x_MI.shape[0],
                out.shape[1],
                x_scales_MB.shape[1],
                weight.stride(0),
                scales.stride(0),
                mins.stride(0),
                BLOCKS_IN_GROUP=self._blocks_in_group,
                HAS_ZEROS=mins.dtype == torch.uint8,
                HAS_BIAS=bias is not None,
                EVEN_I=x_MI.shape[1] % options["BLOCK_I"] == 0,
                **options,
            )

        return self.run(x, weight.shape[0], bias, launch_on, itemsize=codes_MI.itemsize)


_PRODUCTS = {"linear_w8a8": LinearW8A8, "linear_fp8a8": LinearFp8A8, "linear_int4_a8": LinearInt4A8}


def make_rounded(spec: KernelSpec, tuner: Tuner) -> Callable[..., torch.Tensor]:
    """``linear_w8a8``, ``linear_fp8a8`` or ``linear_int4_a8``."""
    return quantized(spec, _PRODUCTS[spec.operation](spec, tuner))
