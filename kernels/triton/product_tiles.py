"""What all matrix products share: tiles of the output, inputs that are split over programs, and how they are launched.

Few rows are bound by the bytes of the weight: where the outputs make fewer programs than the device has processors,
the inputs are split too (SPLITS) and the parts summed afterwards, in a fixed order. Sums are float32.

Shapes: M rows, all leading dims together; I, O features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from drivetrain.contracts.kernels import OPERATIONS, KernelSpec
from drivetrain.kernels.triton.launch import INTERPRETED, as_rows, num_processors, power_of_two
from drivetrain.kernels.triton.operators import define, name_of
from drivetrain.kernels.triton.tuning import FUSED, Blocks, Choice, Tuner, rows_class
from drivetrain.operators import Operator, once_differentiable, visible


@triton.jit
def tile_of(
    program: tl.tensor, num_rows: tl.tensor, num_outputs: tl.tensor, BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr
) -> tl.tensor:
    """Row and column of the program's tile; programs beside each other share tiles of the weight in the cache."""
    tiles_m, tiles_o = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(num_outputs, BLOCK_O)
    per_group = 8 * tiles_o
    first = program // per_group * 8
    height = tl.minimum(tiles_m - first, 8)
    return first + program % per_group % height, program % per_group // height


@triton.jit
def scale_and_least(
    scales: tl.tensor, mins: tl.tensor, is_output: tl.tensor, HAS_ZEROS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """A group's scale s and minimum for each output. HAS_ZEROS: minima are zero points z, and stand for ``-z * s``."""
    scale = tl.load(scales, mask=is_output, other=0.0).to(tl.float32)
    if HAS_ZEROS:
        least = -tl.load(mins, mask=is_output, other=0).to(tl.float32) * scale
    else:
        least = tl.load(mins, mask=is_output, other=0.0).to(tl.float32)
    return scale, least


@triton.jit
def store_tile(
    total: tl.tensor,
    rows: tl.tensor,
    outputs: tl.tensor,
    split: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    parts_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_outputs: tl.tensor,
    HAS_BIAS: tl.constexpr,
    SPLITS: tl.constexpr,
) -> None:
    """Keep a tile's float32 sums: as the output, with the bias, or as one of several parts of it."""
    is_row, is_output = rows < num_rows, outputs < num_outputs
    where = rows.to(tl.int64)[:, None] * num_outputs + outputs[None, :]
    is_in = is_row[:, None] & is_output[None, :]
    if SPLITS > 1:
        tl.store(parts_ptr + split.to(tl.int64) * num_rows * num_outputs + where, total, mask=is_in)
    else:
        if HAS_BIAS:
            total += tl.load(bias_ptr + outputs, mask=is_output, other=0.0).to(tl.float32)[None, :]
        tl.store(out_ptr + where, total.to(out_ptr.dtype.element_ty), mask=is_in)


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
    depth = 128 // itemsize
    return [
        Blocks.of(4, 2, SPLITS=1, BLOCK_M=64, BLOCK_O=64, BLOCK_I=depth),
        Blocks.of(8, 3, SPLITS=1, BLOCK_M=128, BLOCK_O=128, BLOCK_I=depth),
        Blocks.of(8, 3, SPLITS=1, BLOCK_M=128, BLOCK_O=256, BLOCK_I=depth),
        Blocks.of(4, 4, SPLITS=1, BLOCK_M=64, BLOCK_O=128, BLOCK_I=depth),
        Blocks.of(4, 3, SPLITS=1, BLOCK_M=128, BLOCK_O=64, BLOCK_I=depth),
    ]


LIBRARY = Blocks.of(LIBRARY=1)
"""A candidate: by torch's library, with none of these tiles."""


def multiply_by_library(
    x_MI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None, out_MO: torch.Tensor
) -> None:
    """``x @ weight.T + bias`` by torch's library, into ``out_MO``."""
    if bias_O is None:
        torch.mm(x_MI, weight_OI.T, out=out_MO)
    else:
        torch.addmm(bias_O.to(x_MI.dtype), x_MI, weight_OI.T, out=out_MO)


class Product:
    """What the launches of one use have in common.

    widest: outputs of a tile, at most.
    """

    widest = 256

    def __init__(self, spec: KernelSpec, tuner: Tuner) -> None:
        self.tuner = tuner
        self._choice = Choice(tuner, f"{spec.operation}/{spec.dtype}/{spec.params.get('group', 0):g}")

    def candidates(self, rows: int, outputs: int, inputs: int, processors: int, itemsize: int) -> list[Blocks]:
        """Tiles for a class of rows; the first is safe everywhere."""
        found = _candidates(rows, outputs, inputs, processors, itemsize)
        return [blocks for blocks in found if blocks["BLOCK_O"] <= self.widest]

    def more_candidates(self, variant: int, rows: int, outputs: int, inputs: int, processors: int) -> list[Blocks]:
        """Those that not every use of this shape can take."""
        return []

    def run(
        self,
        x: torch.Tensor,
        num_outputs: int,
        bias: torch.Tensor | None,
        launch_on: Callable[..., None],
        unused: tuple[str, ...] = (),
        itemsize: int | None = None,
        library: Callable[[torch.Tensor, torch.Tensor], object] | None = None,
        worth_it: bool = True,
        variant: int = 0,
    ) -> torch.Tensor:
        """Allocate, choose blocks, launch, and sum parts where the inputs were split.

        launch_on: called with rows, output, parts, grid and the keyword arguments of the launch.
        itemsize:  bytes of a number that is multiplied, where it is not one of x.
        library:   called with rows and output where LIBRARY is chosen.
        worth_it:  whether this use is large enough to measure by.
        variant:   what :meth:`more_candidates` depends on; what is chosen for one does not hold for another.
        """
        x_MI = as_rows(x)
        num_rows, num_inputs = x_MI.shape
        out_MO = torch.empty((num_rows, num_outputs), dtype=x.dtype, device=x.device)
        if num_rows == 0:
            return out_MO.view(*x.shape[:-1], num_outputs)

        def launch(blocks: Blocks) -> None:
            if blocks == LIBRARY:
                assert library is not None
                library(x_MI, out_MO)
                return
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
            processors = num_processors(x.device)
            found = self.candidates(rows, num_outputs, num_inputs, processors, itemsize or x.dtype.itemsize)
            return found + self.more_candidates(variant, rows, num_outputs, num_inputs, processors)

        shape = (num_outputs, num_inputs, rows, variant) if variant else (num_outputs, num_inputs, rows)
        launch(self._choice(shape, candidates, launch, worth_it, out_MO))
        return out_MO.view(*x.shape[:-1], num_outputs)


def quantized(spec: KernelSpec, product: Any) -> Callable[..., torch.Tensor]:
    """The callable of a product by packed weights, with the operation's signature; differentiable in its input only.

    product: called with x, the weight arguments and the bias; ``product.transposed(grad, *weights)`` is the gradient
             of x. It may depend on the spec's operation, dtype and params.
    """
    names = tuple(OPERATIONS[spec.operation].arguments)[1:-1]
    count, name = len(names), name_of(spec, product.tuner, *sorted(spec.params))
    packed = ", ".join(f"Tensor {argument}" for argument in names)

    def linear(x: torch.Tensor, *packed: torch.Tensor | None) -> torch.Tensor:
        weights, bias_O = packed[:count], packed[count] if len(packed) > count else None
        out: torch.Tensor = product(x, *weights, bias_O)
        return out

    def transposed(grad: torch.Tensor, *arguments: Any) -> torch.Tensor:
        out: torch.Tensor = product.transposed(grad, *arguments[:count])
        return out

    gradient = define(
        f"{name}_backward",
        f"(Tensor grad, {packed}, SymInt inputs) -> Tensor",
        transposed,
        fake=lambda grad, *arguments: grad.new_empty((*grad.shape[:-1], arguments[-1])),
        backward=once_differentiable,
    )

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[1 : 1 + count])
        ctx.inputs = inputs[0].shape[-1]

    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return (gradient(grad, *ctx.saved_tensors, ctx.inputs), *(None for _ in range(count + 1)))

    overload = define(
        name,
        f"(Tensor x, {packed}, Tensor? bias=None) -> Tensor",
        linear,
        fake=lambda x, weight, *others: x.new_empty((*x.shape[:-1], weight.shape[0])),
        save=save,
        backward=backward,
    )
    return visible(linear, Operator(overload))
