"""The operations that work row by row, and plain products: C++ forward, gradients by the reference's formula.

Shapes: ``...`` any leading dims; E, I, O features; T tokens; H query heads; G key/value heads; D head size; R
rotary dims.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, cast

import torch

from drivetrain.contracts.kernels import KernelSpec
from drivetrain.kernels.cpu.library import FORMATS, check
from drivetrain.kernels.reference import pointwise, products

Kernel = Callable[..., Any]


class MatrixFields(ctypes.Structure):
    """``dt_matrix`` of ``src/decoder.cpp``."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("format", ctypes.c_int64),
    )


class _WithFormula(torch.autograd.Function):
    """A kernel forward, and backward through a formula of torch's own operations on the same inputs."""

    @staticmethod
    def forward(ctx: Any, kernel: Kernel, formula: Kernel, *inputs: torch.Tensor | None) -> Any:
        ctx.formula = formula
        ctx.is_tensor = [value is not None for value in inputs]
        ctx.save_for_backward(*(value for value in inputs if value is not None))
        return kernel(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        saved = iter(ctx.saved_tensors)
        inputs = [next(saved) if is_tensor else None for is_tensor in ctx.is_tensor]
        needs = ctx.needs_input_grad[2:]
        with torch.enable_grad():
            copies = [
                value if value is None else value.detach().requires_grad_(needed)
                for value, needed in zip(inputs, needs, strict=True)
            ]
            outputs = ctx.formula(*copies)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        wanted = [copy for copy, needed in zip(copies, needs, strict=True) if needed and copy is not None]
        found = iter(torch.autograd.grad(outputs, wanted, gradients, allow_unused=True))
        return (None, None, *(next(found) if needed else None for needed in needs))


def differentiable(kernel: Kernel, formula: Kernel) -> Kernel:
    """``kernel`` as it is where no gradient is asked for, and with gradients by ``formula`` elsewhere."""

    def call(*inputs: torch.Tensor | None) -> Any:
        if torch.is_grad_enabled() and any(value is not None and value.requires_grad for value in inputs):
            return _WithFormula.apply(kernel, formula, *inputs)
        return kernel(*inputs)

    return call


def dense(tensor: torch.Tensor) -> torch.Tensor:
    """The same values with rows side by side in memory."""
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def make_rms_norm(spec: KernelSpec, library: ctypes.CDLL) -> Kernel:
    """``(x [..., E], weight [E]) -> [..., E]``."""
    eps, offset = float(spec.params.get("eps", 1e-6)), float(spec.params.get("weight_offset", 0.0))
    kind = FORMATS[getattr(torch, spec.dtype)]

    def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        x, weight = dense(x), dense(weight)
        out = torch.empty_like(x)
        size = x.shape[-1]
        rows = x.numel() // size
        library.dt_rms_norm(x.data_ptr(), None, weight.data_ptr(), eps, offset, rows, size, kind, out.data_ptr(), None)
        return out

    return differentiable(rms_norm, pointwise.make_rms_norm(spec))


def make_add_rms_norm(spec: KernelSpec, library: ctypes.CDLL) -> Kernel:
    """``(x [..., E], residual [..., E], weight [E]) -> (normed, summed)``."""
    eps, offset = float(spec.params.get("eps", 1e-6)), float(spec.params.get("weight_offset", 0.0))
    kind = FORMATS[getattr(torch, spec.dtype)]

    def add_rms_norm(
        x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x, residual, weight = dense(x), dense(residual), dense(weight)
        out, summed = torch.empty_like(x), torch.empty_like(x)
        size = x.shape[-1]
        library.dt_rms_norm(
            x.data_ptr(),
            residual.data_ptr(),
            weight.data_ptr(),
            eps,
            offset,
            x.numel() // size,
            size,
            kind,
            out.data_ptr(),
            summed.data_ptr(),
        )
        return out, summed

    return differentiable(add_rms_norm, pointwise.make_add_rms_norm(spec))


def make_rope(spec: KernelSpec, library: ctypes.CDLL) -> Kernel:
    """``(q [T, H, D], k [T, G, D], cos [T, R], sin [T, R]) -> (q, k)``; angles of any floating dtype."""
    kind = FORMATS[getattr(torch, spec.dtype)]

    def rotated(x_THD: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor) -> torch.Tensor:
        x_THD = dense(x_THD)
        out = torch.empty_like(x_THD)
        tokens, heads, size = x_THD.shape
        library.dt_rotate(
            x_THD.data_ptr(),
            cos_TR.data_ptr(),
            sin_TR.data_ptr(),
            tokens,
            heads,
            size,
            cos_TR.shape[-1],
            kind,
            out.data_ptr(),
        )
        return out

    def rope(
        q_THD: torch.Tensor, k_TGD: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        cos_TR, sin_TR = dense(cos_TR.float()), dense(sin_TR.float())
        return rotated(q_THD, cos_TR, sin_TR), rotated(k_TGD, cos_TR, sin_TR)

    return differentiable(rope, pointwise.rope)


def make_gated(spec: KernelSpec, library: ctypes.CDLL) -> Kernel:
    """``(gate [..., E], up [..., E]) -> [..., E]`` for silu_mul and gelu_tanh_mul."""
    kind = FORMATS[getattr(torch, spec.dtype)]
    activation = 0 if spec.operation == "silu_mul" else 1

    def gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        gate, up = dense(gate), dense(up)
        out = torch.empty_like(gate)
        size = gate.shape[-1]
        library.dt_gated(gate.data_ptr(), up.data_ptr(), gate.numel() // size, size, activation, kind, out.data_ptr())
        return out

    return differentiable(gated, pointwise.gelu_tanh_mul if activation else pointwise.silu_mul)


def matrix_fields(weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None) -> MatrixFields:
    """Pointers to a dense weight and to a float32 bias, which the caller keeps alive."""
    return MatrixFields(
        weight_OI.data_ptr(),
        None if bias_O is None else bias_O.data_ptr(),
        weight_OI.shape[0],
        weight_OI.shape[1],
        FORMATS[weight_OI.dtype],
    )


def make_linear(spec: KernelSpec, library: ctypes.CDLL) -> Kernel:
    """``(x [..., I], weight [O, I], bias [O] | None) -> [..., O]``; the weight is read where it lies."""
    kind = FORMATS[getattr(torch, spec.dtype)]

    def linear(x: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None) -> torch.Tensor:
        x, weight_OI = dense(x), dense(weight_OI)
        bias_O = None if bias_O is None else dense(bias_O.float())
        out = x.new_empty((*x.shape[:-1], weight_OI.shape[0]))
        fields = matrix_fields(weight_OI, bias_O)
        rows = x.numel() // x.shape[-1]
        if rows:
            status = library.dt_linear(x.data_ptr(), rows, ctypes.addressof(fields), kind, out.data_ptr())
            check(status)
        return out

    return differentiable(linear, torch.nn.functional.linear)


def make_gated_linear(spec: KernelSpec, library: ctypes.CDLL) -> Kernel:
    """``(x [..., I], gate [O, I], up [O, I]) -> [..., O]``, with the activation inside the product's own loop."""
    formula = products.make_gated_linear(spec)  # raises for an activation that there is not
    activation = int(spec.params.get("activation", 0))
    kind = FORMATS[getattr(torch, spec.dtype)]

    def gated_linear(x: torch.Tensor, gate_OI: torch.Tensor, up_OI: torch.Tensor) -> torch.Tensor:
        x, gate_OI, up_OI = dense(x), dense(gate_OI), dense(up_OI)
        out = x.new_empty((*x.shape[:-1], gate_OI.shape[0]))
        gate, up = matrix_fields(gate_OI), matrix_fields(up_OI)
        rows = x.numel() // x.shape[-1]
        if rows:
            status = library.dt_gated_linear(
                x.data_ptr(),
                rows,
                ctypes.addressof(gate),
                ctypes.addressof(up),
                activation,
                kind,
                out.data_ptr(),
            )
            check(status)
        return out

    return differentiable(gated_linear, cast(Kernel, formula))
