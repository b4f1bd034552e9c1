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

from drivetrain.kernels.triton.activations import activated
from drivetrain.kernels.triton.launch import INTERPRETED, power_of_two
from drivetrain.kernels.triton.tuning import FUSED

_BLOCK = 2048
_ELEMENTS_OF_A_WARP = 256
"""16 bytes a thread where numbers take two."""

PLAIN = -1
"""The activation of a product without a gate."""


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
    total = tl.zeros([BLOCK_O, BLOCK_I], dtype=tl.float32)
    up_total = tl.zeros([BLOCK_O, BLOCK_I], dtype=tl.float32)
    for start in range(0, num_inputs, BLOCK_I):
        if EVEN:
            x = tl.load(x_ptr + start + inputs).to(tl.float32)
            total += x[None, :] * tl.load(weight_rows + start, eviction_policy="evict_first").to(tl.float32)
            if KIND >= 0:
                up_total += x[None, :] * tl.load(up_rows + start, eviction_policy="evict_first").to(tl.float32)
        else:
            is_input = start + inputs < num_inputs
            is_in = is_output[:, None] & is_input[None, :]
            x = tl.load(x_ptr + start + inputs, mask=is_input, other=0.0).to(tl.float32)
            total += x[None, :] * tl.load(weight_rows + start, mask=is_in, other=0.0).to(tl.float32)
            if KIND >= 0:
                up_total += x[None, :] * tl.load(up_rows + start, mask=is_in, other=0.0).to(tl.float32)
    out = tl.sum(total, axis=1)
    if HAS_BIAS:
        out += tl.load(bias_ptr + outputs, mask=is_output, other=0.0).to(tl.float32)
    if KIND >= 0:
        out = activated(out, KIND) * tl.sum(up_total, axis=1)
    tl.store(out_ptr + outputs, out.to(out_ptr.dtype.element_ty), mask=is_output)


def multiply(
    x_I: torch.Tensor,
    weight_OI: torch.Tensor,
    bias_O: torch.Tensor | None,
    up_OI: torch.Tensor | None = None,
    kind: int = PLAIN,
) -> torch.Tensor:
    """[O] from dense [I] and weights with dense rows; with ``up_OI``, gated by the activation ``kind``."""
    num_outputs, num_inputs = weight_OI.shape
    out_O = torch.empty(num_outputs, dtype=x_I.dtype, device=x_I.device)
    depth = min(_BLOCK, power_of_two(num_inputs))
    width = min(32, power_of_two(num_outputs)) if INTERPRETED else 1
    _product[(triton.cdiv(num_outputs, width),)](
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
        EVEN=num_inputs % depth == 0 and num_outputs % width == 0,
        BLOCK_O=width,
        BLOCK_I=depth,
        num_warps=max(1, depth // _ELEMENTS_OF_A_WARP),
        **FUSED,
    )
    return out_O
