"""Matrix products: with quantized weights, and of gate and up projections with their activation.

Weights are read once, in the stored format; int8, fields of three and four bits and float8 are exact in every dtype
they are multiplied in, and scales are applied to sums, so that no weight is rounded. Many rows may be multiplied by the
weight in full instead, which is (:mod:`drivetrain.kernels.triton.expansion`).

Shapes: M rows, all leading dims together; I, O features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch.nn import functional

from drivetrain.contracts.kernels import KernelSpec
from drivetrain.kernels.triton import expansion, int4_words
from drivetrain.kernels.triton.activations import GELU, SILU, Activation, activated, backward_operator
from drivetrain.kernels.triton.expansion import three_bits
from drivetrain.kernels.triton.float8 import from_fp8
from drivetrain.kernels.triton.launch import INTERPRETED, as_rows, dot, needs_gradient
from drivetrain.kernels.triton.one_row import RowProduct
from drivetrain.kernels.triton.operators import define, name_of
from drivetrain.kernels.triton.product_tiles import (
    LIBRARY,
    Product,
    multiply_by_library,
    quantized,
    scale_and_least,
    store_tile,
    tile_of,
)
from drivetrain.kernels.triton.tuning import Blocks, Tuner
from drivetrain.operators import Operator, visible
from drivetrain.packed import DECODERS

INT8, FP8, INT8_BY_INT8, FP8_BY_FP8, PLAIN = 1, 2, 3, 4, 5
"""What the weights of a product by row are, the last like the activations; in the two before the activations too."""

_FEW_ROWS = 64
"""Up to so many rows the gated product in one launch is faster than two products by torch's library and an activation:
85 us against 91 for 64 rows of an 8B Llama on an H100. Other products of so few are timed beside the library's."""

_WORTH_TIMING_BYTES = 1 << 20


@triton.jit
def _widened(w: tl.tensor, to: tl.constexpr, FORMAT: tl.constexpr) -> tl.tensor:
    """Stored weights as factors of dtype ``to``; by float32, since the interpreter knows no other way to bfloat16."""
    if FORMAT == 5:
        return w
    elif FORMAT == 2:
        return from_fp8(w).to(to)
    else:
        return w.to(tl.float32).to(to)


@triton.jit
def _add_product(total: tl.tensor, x: tl.tensor, w: tl.tensor, FORMAT: tl.constexpr, WIDE: tl.constexpr) -> tl.tensor:
    """``total + x @ w``, in int32 where both are int8.

    Hopper sums products of float8 in fewer than 24 bits: there each sum of 128 is added up in float32.
    """
    if FORMAT == 3:
        total = tl.dot(x, w, total, out_dtype=tl.int32)
    elif FORMAT == 4:
        x, w = x.to(tl.float8e4nv, bitcast=True), w.to(tl.float8e4nv, bitcast=True)
        total = tl.dot(x, w, total, max_num_imprecise_acc=128 if w.shape[0] > 128 else w.shape[0])
    else:
        total += dot(x, _widened(w, x.dtype, FORMAT), WIDE)
    return total


@triton.jit(do_not_specialize=["num_rows"])
def _by_row(
    x_ptr: tl.tensor,
    x_scales_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    parts_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_outputs: tl.tensor,
    num_inputs: tl.tensor,
    x_stride: tl.tensor,
    weight_by_output: tl.tensor,
    weight_by_input: tl.tensor,
    FORMAT: tl.constexpr,
    HAS_X_SCALES: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_I: tl.constexpr,
    WIDE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
) -> None:
    """``x @ (weight * scales).T + bias`` with weights of int8 or float8 and a scale for each output, or plain ones; x
    may have a scale for each row."""
    tile_m, tile_o = tile_of(tl.program_id(0), num_rows, num_outputs, BLOCK_M, BLOCK_O)
    split = tl.program_id(1)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    outputs = tile_o * BLOCK_O + tl.arange(0, BLOCK_O)
    is_row, is_output = rows < num_rows, outputs < num_outputs
    x_rows = x_ptr + rows.to(tl.int64)[:, None] * x_stride
    weight_rows = weight_ptr + outputs.to(tl.int64)[None, :] * weight_by_output
    total = tl.zeros([BLOCK_M, BLOCK_O], dtype=tl.int32 if FORMAT == 3 else tl.float32)
    for start in range(split * BLOCK_I, num_inputs, BLOCK_I * SPLITS):
        inputs = start + tl.arange(0, BLOCK_I)
        if EVEN_I:
            x = tl.load(x_rows + inputs[None, :], mask=is_row[:, None], other=0)
            w = tl.load(weight_rows + inputs[:, None] * weight_by_input, mask=is_output[None, :], other=0)
        else:
            is_input = inputs < num_inputs
            x = tl.load(x_rows + inputs[None, :], mask=is_row[:, None] & is_input[None, :], other=0)
            is_weight = is_input[:, None] & is_output[None, :]
            w = tl.load(weight_rows + inputs[:, None] * weight_by_input, mask=is_weight, other=0)
        total = _add_product(total, x, w, FORMAT, WIDE)
    scaled = total.to(tl.float32)
    if HAS_X_SCALES:
        scaled *= tl.load(x_scales_ptr + rows, mask=is_row, other=0.0)[:, None]
    if HAS_SCALES:
        scaled *= tl.load(scales_ptr + outputs, mask=is_output, other=0.0).to(tl.float32)[None, :]
    store_tile(scaled, rows, outputs, split, bias_ptr, out_ptr, parts_ptr, num_rows, num_outputs, HAS_BIAS, SPLITS)


@triton.jit
def _four_bits(
    x_rows: tl.tensor,
    weight_rows: tl.tensor,
    group: tl.tensor,
    is_row: tl.tensor,
    is_output: tl.tensor,
    GROUP: tl.constexpr,
    WIDE: tl.constexpr,
) -> tl.tensor:
    """A group's inputs: multiplied by its nibbles, and their sums.

    Even and odd inputs are multiplied apart, so that the two nibbles of a byte never change places.
    """
    halves = tl.arange(0, GROUP // 2)
    x_places = x_rows[:, None] + 2 * halves[None, :] + group * GROUP
    even = tl.load(x_places, mask=is_row[:, None], other=0.0)
    odd = tl.load(x_places + 1, mask=is_row[:, None], other=0.0)
    w_places = weight_rows[None, :] + halves[:, None] + group * (GROUP // 2)
    bytes_ = tl.load(w_places, mask=is_output[None, :], other=0)
    product = dot(even, _widened(bytes_ & 15, even.dtype, 0), WIDE)
    product += dot(odd, _widened(bytes_ >> 4, odd.dtype, 0), WIDE)
    return product, tl.sum(even.to(tl.float32), axis=1) + tl.sum(odd.to(tl.float32), axis=1)


@triton.jit
def _three_bits(
    x_rows: tl.tensor,
    low_rows: tl.tensor,
    high_rows: tl.tensor,
    group: tl.tensor,
    is_row: tl.tensor,
    is_output: tl.tensor,
    GROUP: tl.constexpr,
    WIDE: tl.constexpr,
) -> tl.tensor:
    """The same with values of three bits, which are put side by side in the order of the inputs."""
    fours, eights = tl.arange(0, GROUP // 4), tl.arange(0, GROUP // 8)
    x = tl.load(x_rows[:, None] + tl.arange(0, GROUP)[None, :] + group * GROUP, mask=is_row[:, None], other=0.0)
    low_places = low_rows[:, None] + fours[None, :] + group * (GROUP // 4)
    low = tl.load(low_places, mask=is_output[:, None], other=0)
    high_places = high_rows[:, None] + eights[None, :] + group * (GROUP // 8)
    high = tl.load(high_places, mask=is_output[:, None], other=0)
    values = three_bits(low, high)
    return dot(x, _widened(tl.trans(values), x.dtype, 0), WIDE), tl.sum(x.to(tl.float32), axis=1)


@triton.jit(do_not_specialize=["num_rows"])
def _by_group(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    high_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    mins_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    parts_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_outputs: tl.tensor,
    num_inputs: tl.tensor,
    x_stride: tl.tensor,
    weight_by_output: tl.tensor,
    high_by_output: tl.tensor,
    scales_by_output: tl.tensor,
    mins_by_output: tl.tensor,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WIDE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
) -> None:
    """int4 or int3 with scale s and minimum m for each group: ``sum over groups of s * (x @ values) + m * sum(x)``.

    HAS_ZEROS: minima are zero points z, and m is ``-z * s``.
    """
    tile_m, tile_o = tile_of(tl.program_id(0), num_rows, num_outputs, BLOCK_M, BLOCK_O)
    split = tl.program_id(1)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    outputs = tile_o * BLOCK_O + tl.arange(0, BLOCK_O)
    is_row, is_output = rows < num_rows, outputs < num_outputs
    x_rows = x_ptr + rows.to(tl.int64) * x_stride
    weight_rows = weight_ptr + outputs.to(tl.int64) * weight_by_output
    scale_rows = scales_ptr + outputs.to(tl.int64) * scales_by_output
    min_rows = mins_ptr + outputs.to(tl.int64) * mins_by_output
    total = tl.zeros([BLOCK_M, BLOCK_O], dtype=tl.float32)
    for group in range(split, num_inputs // GROUP, SPLITS):
        if BITS == 3:
            high_rows = high_ptr + outputs.to(tl.int64) * high_by_output
            product, sums = _three_bits(x_rows, weight_rows, high_rows, group, is_row, is_output, GROUP, WIDE)
        else:
            product, sums = _four_bits(x_rows, weight_rows, group, is_row, is_output, GROUP, WIDE)
        scale, least = scale_and_least(scale_rows + group, min_rows + group, is_output, HAS_ZEROS)
        total += product * scale[None, :] + sums[:, None] * least[None, :]
    store_tile(total, rows, outputs, split, bias_ptr, out_ptr, parts_ptr, num_rows, num_outputs, HAS_BIAS, SPLITS)


@triton.jit(do_not_specialize=["num_rows"])
def _gated(
    x_ptr: tl.tensor,
    gate_ptr: tl.tensor,
    up_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_outputs: tl.tensor,
    num_inputs: tl.tensor,
    x_stride: tl.tensor,
    gate_stride: tl.tensor,
    up_stride: tl.tensor,
    KIND: tl.constexpr,
    EVEN_I: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
) -> None:
    """``act(x @ gate.T) * (x @ up.T)``: x is read once for both, and the products are never stored."""
    tile_m, tile_o = tile_of(tl.program_id(0), num_rows, num_outputs, BLOCK_M, BLOCK_O)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    outputs = tile_o * BLOCK_O + tl.arange(0, BLOCK_O)
    is_row, is_output = rows < num_rows, outputs < num_outputs
    x_rows = x_ptr + rows.to(tl.int64)[:, None] * x_stride
    gate_rows = gate_ptr + outputs.to(tl.int64)[None, :] * gate_stride
    up_rows = up_ptr + outputs.to(tl.int64)[None, :] * up_stride
    gate_total = tl.zeros([BLOCK_M, BLOCK_O], dtype=tl.float32)
    up_total = tl.zeros([BLOCK_M, BLOCK_O], dtype=tl.float32)
    for start in range(0, num_inputs, BLOCK_I):
        inputs = start + tl.arange(0, BLOCK_I)
        if EVEN_I:
            x = tl.load(x_rows + inputs[None, :], mask=is_row[:, None], other=0.0)
            gate = tl.load(gate_rows + inputs[:, None], mask=is_output[None, :], other=0.0)
            up = tl.load(up_rows + inputs[:, None], mask=is_output[None, :], other=0.0)
        else:
            is_input = inputs < num_inputs
            is_weight = is_input[:, None] & is_output[None, :]
            x = tl.load(x_rows + inputs[None, :], mask=is_row[:, None] & is_input[None, :], other=0.0)
            gate = tl.load(gate_rows + inputs[:, None], mask=is_weight, other=0.0)
            up = tl.load(up_rows + inputs[:, None], mask=is_weight, other=0.0)
        gate_total += dot(x, gate, WIDE)
        up_total += dot(x, up, WIDE)
    out = activated(gate_total, KIND) * up_total
    where = rows.to(tl.int64)[:, None] * num_outputs + outputs[None, :]
    tl.store(out_ptr + where, out.to(out_ptr.dtype.element_ty), mask=is_row[:, None] & is_output[None, :])


# --- how they are launched -----------------------------------------------------------------------------------------


class LinearByRow(Product):
    """``linear_int8`` and ``linear_fp8``."""

    def __init__(self, spec: KernelSpec, tuner: Tuner) -> None:
        super().__init__(spec, tuner)
        self._format = INT8 if spec.operation == "linear_int8" else FP8

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: Any) -> torch.Tensor:
        return multiply_by_row(self, self._format, x, weight, scales, bias)

    def transposed(self, grad: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """``grad @ (weight * scales)``: the scales of what is summed over go to the other factor."""
        scaled = (grad.float() * scales.float()).to(grad.dtype)
        return multiply_by_row(self, self._format, scaled, weight.T, None, None)


def multiply_by_row(
    product: Product,
    form: int,
    x: torch.Tensor,
    weight_OI: torch.Tensor,
    scales_O: torch.Tensor | None,
    bias_O: torch.Tensor | None,
    rounded: tuple[torch.Tensor, torch.Tensor] | None = None,
    **options: Any,
) -> torch.Tensor:
    """Launch a product with weights of int8 or float8, or plain ones.

    rounded: codes [M, I], each row dense, and scales [M] that are multiplied in place of x.
    options: of :meth:`Product.run`.
    """
    weight_OI = weight_OI.view(torch.uint8) if weight_OI.dtype == torch.float8_e4m3fn else weight_OI
    bias_O = None if bias_O is None else bias_O.contiguous()
    scales_O = None if scales_O is None else scales_O.contiguous()
    codes, x_scales_M = (None, None) if rounded is None else rounded

    def launch_on(x_MI: Any, out: Any, parts: Any, grid: tuple[int, int], blocks: dict[str, int]) -> None:
        factors_MI = x_MI if codes is None else codes
        _by_row[grid](
            factors_MI,
            x_scales_M,
            weight_OI,
            scales_O,
            bias_O,
            out,
            parts,
            x_MI.shape[0],
            out.shape[1],
            x_MI.shape[1],
            factors_MI.stride(0),
            weight_OI.stride(0),
            weight_OI.stride(1),
            FORMAT=form,
            HAS_X_SCALES=x_scales_M is not None,
            HAS_SCALES=scales_O is not None,
            HAS_BIAS=bias_O is not None,
            EVEN_I=x_MI.shape[1] % blocks["BLOCK_I"] == 0,
            WIDE=INTERPRETED,
            **blocks,
        )

    itemsize = None if codes is None else codes.dtype.itemsize
    return product.run(x, weight_OI.shape[0], bias_O, launch_on, itemsize=itemsize, **options)


class LinearByGroup(Product):
    """``linear_int4`` and ``linear_int3``."""

    def __init__(self, spec: KernelSpec, tuner: Tuner) -> None:
        super().__init__(spec, tuner)
        self._operation, self._group = spec.operation, int(spec.params["group"])

    def __call__(self, x: torch.Tensor, *packed: Any) -> torch.Tensor:
        *values, scales, mins = (tensor.contiguous() for tensor in packed[:-1])
        low, high = values[0], values[-1]
        bias = None if packed[-1] is None else packed[-1].contiguous()

        def launch_on(x_MI: Any, out: Any, parts: Any, grid: tuple[int, int], options: dict[str, int]) -> None:
            if "WORDS" in options:
                int4_words.launch(x_MI, (low, scales, mins), bias, out, parts, self._group, grid, options)
                return
            _by_group[grid](
                x_MI,
                low,
                high,
                scales,
                mins,
                bias,
                out,
                parts,
                x_MI.shape[0],
                out.shape[1],
                x_MI.shape[1],
                x_MI.stride(0),
                low.stride(0),
                high.stride(0),
                scales.stride(0),
                mins.stride(0),
                BITS=4 if self._operation == "linear_int4" else 3,
                GROUP=self._group,
                HAS_ZEROS=mins.dtype == torch.uint8,
                HAS_BIAS=bias is not None,
                WIDE=INTERPRETED,
                **options,
            )

        def by_library(x_MI: torch.Tensor, out_MO: torch.Tensor) -> None:
            full_OI = expansion.groups_in_full(values, scales, mins, self._group, x_MI.dtype)
            multiply_by_library(x_MI, full_OI, bias, out_MO)

        serving = int4_words.serving(as_rows(x), low) if self._operation == "linear_int4" else int4_words.NOWHERE
        return self.run(x, low.shape[0], bias, launch_on, unused=("BLOCK_I",), library=by_library, variant=serving)

    def candidates(self, rows: int, outputs: int, inputs: int, processors: int, itemsize: int) -> list[Blocks]:
        found = super().candidates(rows, outputs, inputs, processors, itemsize)
        return [*found, LIBRARY] if expansion.worth_trying(rows, itemsize) else found

    def more_candidates(self, variant: int, rows: int, outputs: int, inputs: int, processors: int) -> list[Blocks]:
        return int4_words.candidates(variant, rows, outputs, inputs, processors)

    def transposed(self, grad: torch.Tensor, *packed: torch.Tensor) -> torch.Tensor:
        """``grad @ w``, with the weight unpacked: training through few bits is rare, and needs no kernel of its own."""
        w_OI = DECODERS[self._operation](*packed, torch.float32, {})
        return (grad.float() @ w_OI).to(grad.dtype)


def make_linear_by_row(spec: KernelSpec, tuner: Tuner) -> Callable[..., torch.Tensor]:
    """``linear_int8`` or ``linear_fp8``."""
    return quantized(spec, LinearByRow(spec, tuner))


def make_linear_by_group(spec: KernelSpec, tuner: Tuner) -> Callable[..., torch.Tensor]:
    """``linear_int4`` or ``linear_int3``."""
    return quantized(spec, LinearByGroup(spec, tuner))


class FewRowsProduct(Product):
    """``linear`` of a few rows in half precision: bound by the bytes of the weight. Which is faster, a kernel or
    torch's library, depends on the shape and the device, so it is timed."""

    _TRIED = (
        *((32, 128, 5, 1), (32, 64, 6, 1), (64, 128, 4, 1), (64, 128, 4, 2)),
        *((64, 64, 5, 2), (64, 64, 5, 4), (128, 64, 4, 2)),
    )
    """Outputs and inputs of a tile, how many loads are on their way, and into how many parts the inputs are split."""

    _MOST_PROGRAMS = 8
    """For each processor, where inputs are split."""

    def candidates(self, rows: int, outputs: int, inputs: int, processors: int, itemsize: int) -> list[Blocks]:
        if INTERPRETED:
            return super().candidates(rows, outputs, inputs, processors, itemsize)
        found = [LIBRARY]
        for width, depth, stages, splits in self._TRIED:
            programs = triton.cdiv(outputs, width) * splits
            if splits == 1 or (programs <= self._MOST_PROGRAMS * processors and inputs >= 4 * depth * splits):
                height = max(16, rows)
                found.append(Blocks.of(4, stages, SPLITS=splits, BLOCK_M=height, BLOCK_O=width, BLOCK_I=depth))
        return found

    @staticmethod
    def takes(x: torch.Tensor, weight_OI: torch.Tensor) -> bool:
        is_few = x.shape[-1] < x.numel() <= _FEW_ROWS * x.shape[-1]
        return is_few and x.dtype == weight_OI.dtype and x.dtype.itemsize == 2 and weight_OI.stride(1) == 1

    def __call__(self, x: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> torch.Tensor:
        def by_library(x_MI: torch.Tensor, out_MO: torch.Tensor) -> None:
            multiply_by_library(x_MI, weight_OI, bias_O, out_MO)

        worth_it = weight_OI.nbytes >= _WORTH_TIMING_BYTES
        return multiply_by_row(self, PLAIN, x, weight_OI, None, bias_O, library=by_library, worth_it=worth_it)


def _is_one_row(x: torch.Tensor, weight_OI: torch.Tensor) -> bool:
    return x.numel() == x.shape[-1] > 0 and weight_OI.stride(1) == 1 and x.dtype == weight_OI.dtype


def make_linear(spec: KernelSpec, tuner: Tuner) -> Callable[..., torch.Tensor]:
    """``linear``: one row by a kernel of its own, a few by another or by torch's library, whichever is faster, and the
    others by torch, whose library is the fastest for them, as is its backward. All are operators."""
    product, few_rows = RowProduct(spec, tuner), FewRowsProduct(spec, tuner)

    def multiply(x: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> torch.Tensor:
        return product(x.reshape(-1).contiguous(), weight_OI, bias_O).view(*x.shape[:-1], -1)

    overload = define(
        f"{name_of(spec, tuner)}_row",
        "(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
        multiply,
        fake=lambda x, weight, bias: x.new_empty((*x.shape[:-1], weight.shape[0])),
    )
    multiply_row = visible(multiply, Operator(overload))

    def linear(x: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None) -> torch.Tensor:
        if needs_gradient(x, weight_OI, bias_O):
            return functional.linear(x, weight_OI, bias_O)
        if _is_one_row(x, weight_OI):
            out: torch.Tensor = multiply_row(x, weight_OI, bias_O)
            return out
        if not torch.compiler.is_compiling() and few_rows.takes(x, weight_OI):
            return few_rows(x, weight_OI, bias_O)
        return functional.linear(x, weight_OI, bias_O)

    return linear


class _GatedProduct(Product):
    """``gated_linear``."""

    def __init__(self, spec: KernelSpec, tuner: Tuner) -> None:
        super().__init__(spec, tuner)
        self.kind = GELU if spec.params.get("activation", 0.0) == 1 else SILU
        self._row_product = RowProduct(spec, tuner)
        self.activation = Activation(self.kind, f"{spec.operation}/{spec.dtype}/{self.kind}", tuner)

    def __call__(self, x: torch.Tensor, gate_OI: torch.Tensor, up_OI: torch.Tensor) -> torch.Tensor:
        gate_OI, up_OI = as_rows(gate_OI), as_rows(up_OI)
        if _is_one_row(x, gate_OI):
            row_I = x.reshape(-1).contiguous()
            return self._row_product(row_I, gate_OI, None, up_OI, self.kind).view(*x.shape[:-1], -1)
        if x.numel() > _FEW_ROWS * x.shape[-1]:
            return self.activation.forward(functional.linear(x, gate_OI), functional.linear(x, up_OI))
        return self._in_one_launch(x, gate_OI, up_OI)

    def _in_one_launch(self, x: torch.Tensor, gate_OI: torch.Tensor, up_OI: torch.Tensor) -> torch.Tensor:
        def launch_on(x_MI: Any, out: Any, parts: Any, grid: tuple[int, int], options: dict[str, int]) -> None:
            _gated[grid[:1]](
                x_MI,
                gate_OI,
                up_OI,
                out,
                x_MI.shape[0],
                out.shape[1],
                x_MI.shape[1],
                x_MI.stride(0),
                gate_OI.stride(0),
                up_OI.stride(0),
                KIND=self.kind,
                EVEN_I=x_MI.shape[1] % options["BLOCK_I"] == 0,
                WIDE=INTERPRETED,
                **options,
            )

        return self.run(x, gate_OI.shape[0], None, launch_on, unused=("SPLITS",))


def make_gated_linear(spec: KernelSpec, tuner: Tuner) -> Callable[..., torch.Tensor]:
    product = _GatedProduct(spec, tuner)
    name = f"{name_of(spec, tuner)}_{product.kind}"
    gate_gradients = backward_operator(name, product.activation)

    def gated_linear(x: torch.Tensor, gate_OI: torch.Tensor, up_OI: torch.Tensor) -> torch.Tensor:
        return product(x, gate_OI, up_OI)

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        """Computes the two products again: keeping them would take twice what the output takes."""
        x, gate_OI, up_OI = ctx.saved_tensors
        x_MI, grad_MO = as_rows(x), as_rows(grad)
        gate_MO, up_MO = x_MI @ gate_OI.T, x_MI @ up_OI.T
        gate_grad_MO, up_grad_MO = gate_gradients(grad_MO, gate_MO, up_MO)
        wants_x, wants_gate, wants_up = ctx.needs_input_grad
        return (
            (gate_grad_MO @ gate_OI).add_(up_grad_MO @ up_OI).view(x.shape) if wants_x else None,
            gate_grad_MO.T @ x_MI if wants_gate else None,
            up_grad_MO.T @ x_MI if wants_up else None,
        )

    overload = define(
        name,
        "(Tensor x, Tensor gate, Tensor up) -> Tensor",
        gated_linear,
        fake=lambda x, gate, up: x.new_empty((*x.shape[:-1], gate.shape[0])),
        save=save,
        backward=backward,
    )
    return visible(gated_linear, Operator(overload))
