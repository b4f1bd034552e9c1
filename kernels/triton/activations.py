"""``silu(gate) * up`` and ``gelu(gate) * up``, forward and backward: one pass, computed in float32 and rounded once.

gelu's tanh approximation is written as ``x * sigmoid(2 u)``, which is the same as ``x / 2 * (1 + tanh(u))`` and loses
nothing where the tanh is near -1. Source: Hendrycks & Gimpel 2016, section 2.

Shapes: rows, all leading dims together; E features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from drivetrain.contracts.kernels import KernelSpec
from drivetrain.kernels.triton.launch import INTERPRETED, as_rows, sigmoid
from drivetrain.kernels.triton.operators import define, name_of
from drivetrain.kernels.triton.tuning import Blocks, Choice, Tuner, rows_class
from drivetrain.operators import Operator, once_differentiable, visible

SILU, GELU = 0, 1


@triton.jit
def activated(x: tl.tensor, KIND: tl.constexpr) -> tl.tensor:
    """The activation of ``x`` in float32."""
    if KIND == 0:
        return x * sigmoid(x)
    else:
        return x * sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def slope(x: tl.tensor, KIND: tl.constexpr) -> tl.tensor:
    """The derivative of the activation at ``x``: s + x s (1 - s) u', with s the sigmoid of u."""
    if KIND == 0:
        s = sigmoid(x)
        return s * (1.0 + x * (1.0 - s))
    else:
        s = sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        return s * (1.0 + x * (1.0 - s) * 1.5957691216057308 * (1.0 + 3.0 * 0.044715 * x * x))


@triton.jit(do_not_specialize=["blocks_per_row"])
def _forward(
    gate_ptr: tl.tensor,
    up_ptr: tl.tensor,
    out_ptr: tl.tensor,
    size: tl.tensor,
    blocks_per_row: tl.tensor,
    gate_stride: tl.tensor,
    up_stride: tl.tensor,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = (tl.program_id(0) // blocks_per_row).to(tl.int64)
    features = (tl.program_id(0) % blocks_per_row).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_in = features < size
    gate = tl.load(gate_ptr + row * gate_stride + features, mask=is_in, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + features, mask=is_in, other=0.0).to(tl.float32)
    out = activated(gate, KIND) * up
    tl.store(out_ptr + row * size + features, out.to(out_ptr.dtype.element_ty), mask=is_in)


@triton.jit(do_not_specialize=["blocks_per_row"])
def _backward(
    grad_ptr: tl.tensor,
    gate_ptr: tl.tensor,
    up_ptr: tl.tensor,
    gate_grad_ptr: tl.tensor,
    up_grad_ptr: tl.tensor,
    size: tl.tensor,
    blocks_per_row: tl.tensor,
    grad_stride: tl.tensor,
    gate_stride: tl.tensor,
    up_stride: tl.tensor,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = (tl.program_id(0) // blocks_per_row).to(tl.int64)
    features = (tl.program_id(0) % blocks_per_row).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_in = features < size
    grad = tl.load(grad_ptr + row * grad_stride + features, mask=is_in, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + features, mask=is_in, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + features, mask=is_in, other=0.0).to(tl.float32)
    to = gate_grad_ptr.dtype.element_ty
    tl.store(gate_grad_ptr + row * size + features, (grad * up * slope(gate, KIND)).to(to), mask=is_in)
    tl.store(up_grad_ptr + row * size + features, (grad * activated(gate, KIND)).to(to), mask=is_in)


def _candidates() -> list[Blocks]:
    if INTERPRETED:
        return [Blocks.of(BLOCK=1024)]
    return [
        Blocks.of(num_warps=4, BLOCK=1024),
        Blocks.of(num_warps=4, BLOCK=2048),
        Blocks.of(num_warps=8, BLOCK=4096),
        Blocks.of(num_warps=8, BLOCK=2048),
        Blocks.of(num_warps=2, BLOCK=512),
    ]


def _flattened(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """As rows; as one long row where all are dense, so that no program is left with a part of a row."""
    if all(x.is_contiguous() for x in tensors):
        return [x.view(1, -1) for x in tensors]
    return [as_rows(x) for x in tensors]


class Activation:
    """The launches of one use."""

    def __init__(self, kind: int, name: str, tuner: Tuner) -> None:
        self.kind = kind
        self._forward, self._backward = Choice(tuner, name), Choice(tuner, f"{name}/backward")

    def forward(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        gate_RE, up_RE = _flattened(gate, up)
        num_rows, size = gate_RE.shape
        out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)

        def launch(blocks: Blocks) -> None:
            per_row = triton.cdiv(size, blocks["BLOCK"])
            strides = (gate_RE.stride(0), up_RE.stride(0))
            _forward[(per_row * num_rows,)](
                gate_RE, up_RE, out, size, per_row, *strides, KIND=self.kind, **blocks.launch
            )

        if out.numel():
            launch(self._forward((rows_class(out.numel()),), _candidates, launch))
        return out

    def backward(self, grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        grad_RE, gate_RE, up_RE = _flattened(grad, gate, up)
        num_rows, size = gate_RE.shape
        gate_grad, up_grad = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))

        def launch(blocks: Blocks) -> None:
            per_row = triton.cdiv(size, blocks["BLOCK"])
            _backward[(per_row * num_rows,)](
                grad_RE,
                gate_RE,
                up_RE,
                gate_grad,
                up_grad,
                size,
                per_row,
                grad_RE.stride(0),
                gate_RE.stride(0),
                up_RE.stride(0),
                KIND=self.kind,
                **blocks.launch,
            )

        if gate.numel():
            launch(self._backward((rows_class(gate.numel()),), _candidates, launch))
        return gate_grad, up_grad


# --- what a model binds: the plain callable, and the operator that torch sees --------------------------------------


def backward_operator(name: str, activation: Activation) -> torch._ops.OpOverload:
    """Gradients of gate and up, of the operator ``name``."""
    return define(
        f"{name}_backward",
        "(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor)",
        activation.backward,
        fake=lambda grad, gate, up: (gate.new_empty(gate.shape), gate.new_empty(gate.shape)),
        backward=once_differentiable,
    )


def make_gated_activation(spec: KernelSpec, tuner: Tuner) -> Callable[..., torch.Tensor]:
    """``silu_mul`` or ``gelu_tanh_mul``."""
    kind = SILU if spec.operation == "silu_mul" else GELU
    activation = Activation(kind, f"{spec.operation}/{spec.dtype}", tuner)
    name = name_of(spec, tuner)
    gradients = backward_operator(name, activation)

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return gradients(grad, *ctx.saved_tensors)

    overload = define(
        name,
        "(Tensor gate, Tensor up) -> Tensor",
        activation.forward,
        fake=lambda gate, up: gate.new_empty(gate.shape),
        save=save,
        backward=backward,
    )
    return visible(activation.forward, Operator(overload))
