"""Matrix products: with quantized weights, and of gate and up projections with their activation.

Few rows are bound by the bytes of the weight: they are read once, in the stored format, and where the outputs make
fewer programs than the device has processors, the inputs are split too (SPLITS) and the parts summed afterwards, in a
fixed order. Sums are float32 throughout; int8, nibbles and float8 are exact in every dtype they are multiplied in, and
scales are applied to sums, so that no weight is ever rounded.

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
from drivetrain.kernels.triton import one_row
from drivetrain.kernels.triton.activations import GELU, SILU, Activation, activated
from drivetrain.kernels.triton.float8 import from_fp8
from drivetrain.kernels.triton.launch import INTERPRETED, as_rows, dot, needs_gradient, num_processors, power_of_two
from drivetrain.kernels.triton.tuning import FUSED, Blocks, Choice, Tuner, rows_class
from drivetrain.packed.decode import mins_of

INT8, FP8 = 1, 2

_FEW_ROWS = 64
"""Up to so many rows the gated product in one launch is faster than two products by torch's library and an activation:
86 us against 92 for 64 rows of an 8B Llama on an H100."""


@triton.jit
def _widened(w: tl.tensor, to: tl.constexpr, FORMAT: tl.constexpr) -> tl.tensor:
    """Stored weights as factors of dtype ``to``; by float32, since the interpreter knows no other way to bfloat16."""
    if FORMAT == 2:
        return from_fp8(w).to(to)
    else:
        return w.to(tl.float32).to(to)


@triton.jit
def _tile(
    program: tl.tensor, num_rows: tl.tensor, num_outputs: tl.tensor, BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr
) -> tl.tensor:
    """Row and column of the program's tile; programs beside each other share tiles of the weight in the cache."""
    tiles_m, tiles_o = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(num_outputs, BLOCK_O)
    per_group = 8 * tiles_o
    first = program // per_group * 8
    height = tl.minimum(tiles_m - first, 8)
    return first + program % per_group % height, program % per_group // height


@triton.jit
def _by_row(
    x_ptr: tl.tensor,
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
    HAS_SCALES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_I: tl.constexpr,
    WIDE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
) -> None:
    """``x @ (weight * scales).T + bias`` with weights of int8 or float8 and a scale for each output."""
    tile_m, tile_o = _tile(tl.program_id(0), num_rows, num_outputs, BLOCK_M, BLOCK_O)
    split = tl.program_id(1)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    outputs = tile_o * BLOCK_O + tl.arange(0, BLOCK_O)
    is_row, is_output = rows < num_rows, outputs < num_outputs
    x_rows = x_ptr + rows.to(tl.int64)[:, None] * x_stride
    weight_rows = weight_ptr + outputs.to(tl.int64)[None, :] * weight_by_output
    total = tl.zeros([BLOCK_M, BLOCK_O], dtype=tl.float32)
    for start in range(split * BLOCK_I, num_inputs, BLOCK_I * SPLITS):
        inputs = start + tl.arange(0, BLOCK_I)
        if EVEN_I:
            x = tl.load(x_rows + inputs[None, :], mask=is_row[:, None], other=0.0)
            w = tl.load(weight_rows + inputs[:, None] * weight_by_input, mask=is_output[None, :], other=0)
        else:
            is_input = inputs < num_inputs
            x = tl.load(x_rows + inputs[None, :], mask=is_row[:, None] & is_input[None, :], other=0.0)
            is_weight = is_input[:, None] & is_output[None, :]
            w = tl.load(weight_rows + inputs[:, None] * weight_by_input, mask=is_weight, other=0)
        total += dot(x, _widened(w, x.dtype, FORMAT), WIDE)
    if HAS_SCALES:
        total *= tl.load(scales_ptr + outputs, mask=is_output, other=0.0).to(tl.float32)[None, :]
    where = rows.to(tl.int64)[:, None] * num_outputs + outputs[None, :]
    is_in = is_row[:, None] & is_output[None, :]
    if SPLITS > 1:
        tl.store(parts_ptr + split.to(tl.int64) * num_rows * num_outputs + where, total, mask=is_in)
    else:
        if HAS_BIAS:
            total += tl.load(bias_ptr + outputs, mask=is_output, other=0.0).to(tl.float32)[None, :]
        tl.store(out_ptr + where, total.to(out_ptr.dtype.element_ty), mask=is_in)


@triton.jit
def _by_group(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
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
    scales_by_output: tl.tensor,
    mins_by_output: tl.tensor,
    GROUP: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WIDE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
) -> None:
    """int4 with scale s and minimum m for each group: ``sum over groups of s * (x @ nibbles) + m * sum(x)``.

    HAS_ZEROS: minima are zero points z, and m is ``-z * s``.
    Even and odd inputs of a group are multiplied apart, so that the two nibbles of a byte never change places.
    """
    HALF: tl.constexpr = GROUP // 2
    tile_m, tile_o = _tile(tl.program_id(0), num_rows, num_outputs, BLOCK_M, BLOCK_O)
    split = tl.program_id(1)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    outputs = tile_o * BLOCK_O + tl.arange(0, BLOCK_O)
    is_row, is_output = rows < num_rows, outputs < num_outputs
    halves = tl.arange(0, HALF)
    x_rows = x_ptr + rows.to(tl.int64)[:, None] * x_stride + 2 * halves[None, :]
    weight_rows = weight_ptr + outputs.to(tl.int64)[None, :] * weight_by_output + halves[:, None]
    scale_rows = scales_ptr + outputs.to(tl.int64) * scales_by_output
    min_rows = mins_ptr + outputs.to(tl.int64) * mins_by_output
    total = tl.zeros([BLOCK_M, BLOCK_O], dtype=tl.float32)
    for group in range(split, num_inputs // GROUP, SPLITS):
        even = tl.load(x_rows + group * GROUP, mask=is_row[:, None], other=0.0)
        odd = tl.load(x_rows + group * GROUP + 1, mask=is_row[:, None], other=0.0)
        bytes_ = tl.load(weight_rows + group * HALF, mask=is_output[None, :], other=0)
        scale = tl.load(scale_rows + group, mask=is_output, other=0.0).to(tl.float32)
        if HAS_ZEROS:
            least = -tl.load(min_rows + group, mask=is_output, other=0).to(tl.float32) * scale
        else:
            least = tl.load(min_rows + group, mask=is_output, other=0.0).to(tl.float32)
        product = dot(even, _widened(bytes_ & 15, even.dtype, 0), WIDE)
        product += dot(odd, _widened(bytes_ >> 4, odd.dtype, 0), WIDE)
        sums = tl.sum(even.to(tl.float32), axis=1) + tl.sum(odd.to(tl.float32), axis=1)
        total += product * scale[None, :] + sums[:, None] * least[None, :]
    where = rows.to(tl.int64)[:, None] * num_outputs + outputs[None, :]
    is_in = is_row[:, None] & is_output[None, :]
    if SPLITS > 1:
        tl.store(parts_ptr + split.to(tl.int64) * num_rows * num_outputs + where, total, mask=is_in)
    else:
        if HAS_BIAS:
            total += tl.load(bias_ptr + outputs, mask=is_output, other=0.0).to(tl.float32)[None, :]
        tl.store(out_ptr + where, total.to(out_ptr.dtype.element_ty), mask=is_in)


@triton.jit
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
    tile_m, tile_o = _tile(tl.program_id(0), num_rows, num_outputs, BLOCK_M, BLOCK_O)
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


@triton.jit
def _sum_parts(
    parts_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    size: tl.tensor,
    num_outputs: tl.tensor,
    HAS_BIAS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    where = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_in = where < size
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(parts_ptr + split * size + where, mask=is_in, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + where % num_outputs, mask=is_in, other=0.0).to(tl.float32)
    tl.store(out_ptr + where, total.to(out_ptr.dtype.element_ty), mask=is_in)


# --- how they are launched -----------------------------------------------------------------------------------------


def _candidates(rows: int, outputs: int, inputs: int, processors: int, itemsize: int) -> list[Blocks]:
    """Tiles for a product; the first is safe everywhere. Few rows: many bytes in flight, and splits until every
    processor has work."""
    if INTERPRETED:
        return [Blocks.of(SPLITS=2 if inputs >= 96 else 1, BLOCK_M=16, BLOCK_O=16, BLOCK_I=64)]
    if rows <= 64:
        height = max(16, power_of_two(rows))
        found = []
        for width, depth, warps, stages in ((32, 256, 4, 4), (64, 128, 4, 4), (32, 128, 4, 5), (128, 64, 4, 4)):
            programs = triton.cdiv(outputs, width) * triton.cdiv(rows, height)
            splits = 1
            while splits < 8 and programs * splits < processors and inputs >= depth * splits * 4:
                splits *= 2
            depth = min(depth, 512 // itemsize // 2)
            found.append(Blocks.of(warps, stages, SPLITS=splits, BLOCK_M=height, BLOCK_O=width, BLOCK_I=depth))
        return list(dict.fromkeys(found))
    depth = 64 if itemsize == 2 else 32
    return [
        Blocks.of(4, 2, SPLITS=1, BLOCK_M=64, BLOCK_O=64, BLOCK_I=depth),
        Blocks.of(8, 3, SPLITS=1, BLOCK_M=128, BLOCK_O=128, BLOCK_I=depth),
        Blocks.of(8, 3, SPLITS=1, BLOCK_M=128, BLOCK_O=256, BLOCK_I=depth),
        Blocks.of(4, 4, SPLITS=1, BLOCK_M=64, BLOCK_O=128, BLOCK_I=depth),
        Blocks.of(4, 3, SPLITS=1, BLOCK_M=128, BLOCK_O=64, BLOCK_I=depth),
    ]


class _Product:
    """What the launches of one use have in common."""

    def __init__(self, spec: KernelSpec, tuner: Tuner) -> None:
        self._choice = Choice(tuner, f"{spec.operation}/{spec.dtype}/{spec.params.get('group', 0):g}")

    def run(
        self,
        x: torch.Tensor,
        num_outputs: int,
        bias: torch.Tensor | None,
        launch_on: Callable[..., None],
        unused: tuple[str, ...] = (),
    ) -> torch.Tensor:
        """Allocate, choose blocks, launch, and sum parts where the inputs were split.

        launch_on: called with rows, output, parts, grid and the keyword arguments of the launch.
        """
        x_MI = as_rows(x)
        num_rows, num_inputs = x_MI.shape
        out_MO = torch.empty((num_rows, num_outputs), dtype=x.dtype, device=x.device)
        if num_rows == 0:
            return out_MO.view(*x.shape[:-1], num_outputs)

        def launch(blocks: Blocks) -> None:
            splits = 1 if "SPLITS" in unused else blocks["SPLITS"]
            shape = (splits, num_rows, num_outputs)
            parts = torch.empty(shape, dtype=torch.float32, device=x.device) if splits > 1 else None
            tiles = triton.cdiv(num_rows, blocks["BLOCK_M"]) * triton.cdiv(num_outputs, blocks["BLOCK_O"])
            options = {name: value for name, value in blocks.launch.items() if name not in unused}
            launch_on(x_MI, out_MO, parts, (tiles, splits), options)
            if parts is not None:
                size = out_MO.numel()
                _sum_parts[(triton.cdiv(size, 1024),)](
                    parts,
                    bias,
                    out_MO,
                    size,
                    num_outputs,
                    HAS_BIAS=bias is not None,
                    SPLITS=splits,
                    BLOCK=1024,
                    **FUSED,
                )

        rows = rows_class(num_rows)

        def candidates() -> list[Blocks]:
            return _candidates(rows, num_outputs, num_inputs, num_processors(x.device), x.dtype.itemsize)

        launch(self._choice((num_outputs, num_inputs, rows), candidates, launch))
        return out_MO.view(*x.shape[:-1], num_outputs)


class _LinearByRow(_Product):
    """``linear_int8`` and ``linear_fp8``."""

    def __init__(self, spec: KernelSpec, tuner: Tuner) -> None:
        super().__init__(spec, tuner)
        self._format = INT8 if spec.operation == "linear_int8" else FP8

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: Any) -> torch.Tensor:
        return self._multiply(x, weight, scales, bias)

    def transposed(self, grad: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """``grad @ (weight * scales)``: the scales of what is summed over go to the other factor."""
        return self._multiply((grad.float() * scales.float()).to(grad.dtype), weight.T, None, None)

    def _multiply(
        self, x: torch.Tensor, weight_OI: torch.Tensor, scales: torch.Tensor | None, bias: torch.Tensor | None
    ) -> torch.Tensor:
        stored = weight_OI.view(torch.uint8) if self._format == FP8 else weight_OI
        bias = None if bias is None else bias.contiguous()
        scales = None if scales is None else scales.contiguous()

        def launch_on(x_MI: Any, out: Any, parts: Any, grid: tuple[int, int], options: dict[str, int]) -> None:
            _by_row[grid](
                x_MI,
                stored,
                scales,
                bias,
                out,
                parts,
                x_MI.shape[0],
                out.shape[1],
                x_MI.shape[1],
                x_MI.stride(0),
                stored.stride(0),
                stored.stride(1),
                FORMAT=self._format,
                HAS_SCALES=scales is not None,
                HAS_BIAS=bias is not None,
                EVEN_I=x_MI.shape[1] % options["BLOCK_I"] == 0,
                WIDE=INTERPRETED,
                **options,
            )

        return self.run(x, weight_OI.shape[0], bias, launch_on)


class _LinearInt4(_Product):
    """``linear_int4``."""

    def __init__(self, spec: KernelSpec, tuner: Tuner) -> None:
        super().__init__(spec, tuner)
        self._group = int(spec.params["group"])

    def __call__(
        self, x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, mins: torch.Tensor, bias: Any
    ) -> torch.Tensor:
        weight, scales, mins = weight.contiguous(), scales.contiguous(), mins.contiguous()
        bias = None if bias is None else bias.contiguous()

        def launch_on(x_MI: Any, out: Any, parts: Any, grid: tuple[int, int], options: dict[str, int]) -> None:
            _by_group[grid](
                x_MI,
                weight,
                scales,
                mins,
                bias,
                out,
                parts,
                x_MI.shape[0],
                out.shape[1],
                x_MI.shape[1],
                x_MI.stride(0),
                weight.stride(0),
                scales.stride(0),
                mins.stride(0),
                GROUP=self._group,
                HAS_ZEROS=mins.dtype == torch.uint8,
                HAS_BIAS=bias is not None,
                WIDE=INTERPRETED,
                **options,
            )

        return self.run(x, weight.shape[0], bias, launch_on, unused=("BLOCK_I",))

    def transposed(
        self, grad: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, mins: torch.Tensor
    ) -> torch.Tensor:
        """``grad @ w``, with the weight unpacked: training through int4 is rare, and needs no kernel of its own."""
        nibbles = torch.stack((weight & 15, weight >> 4), dim=-1).flatten(1).unflatten(1, (-1, self._group))
        least_ON = mins_of(scales, mins, torch.float32)
        w_OI = (nibbles * scales.float().unsqueeze(2) + least_ON.unsqueeze(2)).flatten(1)
        return (grad.float() @ w_OI).to(grad.dtype)


class _Quantized(torch.autograd.Function):
    """Differentiable in its input only."""

    @staticmethod
    def forward(context: Any, product: Any, x: torch.Tensor, bias: Any, *weights: torch.Tensor) -> torch.Tensor:
        context.product = product
        context.save_for_backward(*weights)
        return product(x, *weights, bias)

    @staticmethod
    def backward(context: Any, grad: torch.Tensor) -> Any:
        weights = context.saved_tensors
        return None, context.product.transposed(grad, *weights), None, *(None for _ in weights)


def _is_one_row(x: torch.Tensor, weight_OI: torch.Tensor) -> bool:
    return x.numel() == x.shape[-1] > 0 and weight_OI.stride(1) == 1 and x.dtype == weight_OI.dtype


def make_linear(spec: KernelSpec) -> Callable[..., torch.Tensor]:
    """``linear``: one row by a kernel of its own, and the others by torch, whose library is the fastest for them."""

    def linear(x: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None) -> torch.Tensor:
        if _is_one_row(x, weight_OI) and not needs_gradient(x, weight_OI, bias_O):
            return one_row.multiply(x.reshape(-1).contiguous(), weight_OI, bias_O).view(*x.shape[:-1], -1)
        return functional.linear(x, weight_OI, bias_O)

    return linear


def make_linear_by_row(spec: KernelSpec, tuner: Tuner) -> Callable[..., torch.Tensor]:
    """``linear_int8`` or ``linear_fp8``."""
    product = _LinearByRow(spec, tuner)

    def linear_by_row(
        x: torch.Tensor, weight_OI: torch.Tensor, scales_O: torch.Tensor, bias_O: torch.Tensor | None = None
    ) -> torch.Tensor:
        if needs_gradient(x):
            return _Quantized.apply(product, x, bias_O, weight_OI, scales_O)
        return product(x, weight_OI, scales_O, bias_O)

    return linear_by_row


def make_linear_int4(spec: KernelSpec, tuner: Tuner) -> Callable[..., torch.Tensor]:
    product = _LinearInt4(spec, tuner)

    def linear_int4(
        x: torch.Tensor,
        weight: torch.Tensor,
        scales: torch.Tensor,
        mins: torch.Tensor,
        bias_O: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if needs_gradient(x):
            return _Quantized.apply(product, x, bias_O, weight, scales, mins)
        return product(x, weight, scales, mins, bias_O)

    return linear_int4


class _GatedProduct(_Product):
    """``gated_linear``."""

    def __init__(self, spec: KernelSpec, tuner: Tuner) -> None:
        super().__init__(spec, tuner)
        self.kind = GELU if spec.params.get("activation", 0.0) == 1 else SILU
        self.activation = Activation(self.kind, f"{spec.operation}/{spec.dtype}/{self.kind}", tuner)

    def __call__(self, x: torch.Tensor, gate_OI: torch.Tensor, up_OI: torch.Tensor) -> torch.Tensor:
        gate_OI, up_OI = as_rows(gate_OI), as_rows(up_OI)
        if _is_one_row(x, gate_OI):
            row_I = x.reshape(-1).contiguous()
            return one_row.multiply(row_I, gate_OI, None, up_OI, self.kind).view(*x.shape[:-1], -1)
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


class _GatedLinear(torch.autograd.Function):
    """Backward computes the two products again: keeping them would take twice what the output takes."""

    @staticmethod
    def forward(
        context: Any, product: _GatedProduct, x: torch.Tensor, gate_OI: torch.Tensor, up_OI: torch.Tensor
    ) -> torch.Tensor:
        context.product = product
        context.save_for_backward(x, gate_OI, up_OI)
        return product(x, gate_OI, up_OI)

    @staticmethod
    def backward(context: Any, grad: torch.Tensor) -> Any:
        x, gate_OI, up_OI = context.saved_tensors
        x_MI, grad_MO = as_rows(x), as_rows(grad)
        gate_MO, up_MO = x_MI @ gate_OI.T, x_MI @ up_OI.T
        gate_grad_MO, up_grad_MO = context.product.activation.backward(grad_MO, gate_MO, up_MO)
        _, wants_x, wants_gate, wants_up = context.needs_input_grad
        return (
            None,
            (gate_grad_MO @ gate_OI).add_(up_grad_MO @ up_OI).view(x.shape) if wants_x else None,
            gate_grad_MO.T @ x_MI if wants_gate else None,
            up_grad_MO.T @ x_MI if wants_up else None,
        )


def make_gated_linear(spec: KernelSpec, tuner: Tuner) -> Callable[..., torch.Tensor]:
    product = _GatedProduct(spec, tuner)

    def gated_linear(x: torch.Tensor, gate_OI: torch.Tensor, up_OI: torch.Tensor) -> torch.Tensor:
        if needs_gradient(x, gate_OI, up_OI):
            return _GatedLinear.apply(product, x, gate_OI, up_OI)
        return product(x, gate_OI, up_OI)

    return gated_linear
