"""Products of one row, as decoding one sequence makes them: bound by the bytes of the weight, read once.

One output a program: its weights come in loads of 16 bytes a thread, are multiplied in float32, and summed at the end.
With a gate, a program reads its output's rows of both weights, and the products are never stored. docs/log.md has the
measurement beside cuBLAS.

Shapes: I, O features.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from drivetrain.contracts.kernels import KernelSpec
from drivetrain.kernels.triton.activations import activated
from drivetrain.kernels.triton.launch import INTERPRETED, power_of_two
from drivetrain.kernels.triton.tuning import Blocks, Choice, Tuner

_TRIED = ((4096, 512), (2048, 256), (2048, 512))
"""Inputs that a program goes through at a time, and how many of them a warp has: 256 are a load of 16 bytes a thread
where numbers take two."""

_LEAST_EVEN = 1024
"""Inputs at a time for which masks are done without."""

_WORTH_TIMING_BYTES = 1 << 20

PLAIN = -1
"""The activation of a product without a gate."""


@triton.jit
def _load_row(x_ptr: tl.tensor, inputs: tl.tensor, num_inputs: tl.tensor, EVEN: tl.constexpr) -> tl.tensor:
    """x as a row of float32, [1, inputs]."""
    if EVEN:
        return tl.load(x_ptr + inputs).to(tl.float32)[None, :]
    else:
        return tl.load(x_ptr + inputs, mask=inputs < num_inputs, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _load_weights(
    rows: tl.tensor, inputs: tl.tensor, num_inputs: tl.tensor, is_output: tl.tensor, EVEN: tl.constexpr
) -> tl.tensor:
    """Weights in float32, [outputs, inputs]; none is read twice."""
    if EVEN:
        return tl.load(rows, eviction_policy="evict_first").to(tl.float32)
    else:
        is_in = is_output[:, None] & (inputs < num_inputs)[None, :]
        return tl.load(rows, mask=is_in, other=0.0).to(tl.float32)


@triton.jit
def _product(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    up_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_outputs: tl.tensor,
    num_inputs: tl.tensor,
    weight_stride: tl.tensor,
    up_stride: tl.tensor,
    KIND: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
) -> None:
    """KIND is -1 for ``x @ weight.T + bias``, else that of the activation in ``act(x @ weight.T) * (x @ up.T)``.

    EVEN: blocks divide both dims, so that nothing is masked.
    """
    outputs = tl.program_id(0).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    inputs = tl.arange(0, BLOCK_I)
    is_output = outputs < num_outputs
    weight_rows = weight_ptr + outputs[:, None] * weight_stride + inputs[None, :]
    up_rows = up_ptr + outputs[:, None] * up_stride + inputs[None, :]
    weight = _load_weights(weight_rows, inputs, num_inputs, is_output, EVEN)
    if KIND >= 0:
        up = _load_weights(up_rows, inputs, num_inputs, is_output, EVEN)
    x = _load_row(x_ptr, inputs, num_inputs, EVEN)
    total = x * weight
    if KIND >= 0:
        up_total = x * up
    for start in range(BLOCK_I, num_inputs, BLOCK_I):
        x = _load_row(x_ptr, start + inputs, num_inputs, EVEN)
        total += x * _load_weights(weight_rows + start, start + inputs, num_inputs, is_output, EVEN)
        if KIND >= 0:
            up_total += x * _load_weights(up_rows + start, start + inputs, num_inputs, is_output, EVEN)
    out = tl.sum(total, axis=1)
    if HAS_BIAS:
        out += tl.load(bias_ptr + outputs, mask=is_output, other=0.0).to(tl.float32)
    if KIND >= 0:
        out = activated(out, KIND) * tl.sum(up_total, axis=1)
    tl.store(out_ptr + outputs, out.to(out_ptr.dtype.element_ty), mask=is_output)


def _candidates(num_outputs: int, num_inputs: int) -> list[Blocks]:
    """Steps that divide the inputs where it can be, so that nothing is masked."""
    even = num_inputs & -num_inputs
    most = even if even >= _LEAST_EVEN else power_of_two(num_inputs)
    if INTERPRETED:
        return [Blocks.of(BLOCK_O=min(32, power_of_two(num_outputs)), BLOCK_I=min(2048, most))]
    found = ((min(inputs, most), of_warp) for inputs, of_warp in _TRIED)
    return [
        Blocks.of(max(1, inputs // of_warp), 3, BLOCK_O=1, BLOCK_I=inputs) for inputs, of_warp in dict.fromkeys(found)
    ]


class RowProduct:
    """The launches of one use."""

    def __init__(self, spec: KernelSpec, tuner: Tuner) -> None:
        self._choice = Choice(tuner, f"{spec.operation}/{spec.dtype}/row")

    def __call__(
        self,
        x_I: torch.Tensor,
        weight_OI: torch.Tensor,
        bias_O: torch.Tensor | None,
        up_OI: torch.Tensor | None = None,
        kind: int = PLAIN,
    ) -> torch.Tensor:
        """[O] from dense [I] and weights with dense rows; with ``up_OI``, gated by the activation ``kind``."""
        num_outputs, num_inputs = weight_OI.shape
        out_O = torch.empty(num_outputs, dtype=x_I.dtype, device=x_I.device)

        def launch(blocks: Blocks) -> None:
            _product[(triton.cdiv(num_outputs, blocks["BLOCK_O"]),)](
                x_I,
                weight_OI,
                weight_OI if up_OI is None else up_OI,
                bias_O,
                out_O,
                num_outputs,
                num_inputs,
                weight_OI.stride(0),
                0 if up_OI is None else up_OI.stride(0),
                KIND=kind,
                HAS_BIAS=bias_O is not None,
                EVEN=num_inputs % blocks["BLOCK_I"] == 0 and num_outputs % blocks["BLOCK_O"] == 0,
                **blocks.launch,
            )

        worth_it = num_outputs * num_inputs * weight_OI.itemsize >= _WORTH_TIMING_BYTES
        shape = (num_outputs, num_inputs)
        launch(self._choice(shape, lambda: _candidates(num_outputs, num_inputs), launch, worth_it))
        return out_O
