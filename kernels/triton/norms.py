"""RMS norm, with or without the sum before it, forward and backward.

Each program takes a few rows and reads them once; backward, a program takes many rows one after another and keeps
its part of the weight's gradient in registers. Memory is the bound: E elements in, E out.

Shapes: rows, all leading dims together; E features; P programs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from drivetrain.contracts.kernels import KernelSpec
from drivetrain.kernels.triton.launch import INTERPRETED, as_rows, needs_gradient, num_processors, power_of_two
from drivetrain.kernels.triton.tuning import FUSED, Blocks, Choice, Tuner, rows_class


@triton.jit
def _forward(
    x_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    out_ptr: tl.tensor,
    sum_ptr: tl.tensor,
    root_ptr: tl.tensor,
    num_rows: tl.tensor,
    x_stride: tl.tensor,
    residual_stride: tl.tensor,
    eps: tl.tensor,
    offset: tl.tensor,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    ADDS: tl.constexpr,
    KEEPS_ROOT: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    features = tl.arange(0, BLOCK_E)
    is_row = rows < num_rows
    is_in = is_row[:, None] & (features < E)[None, :]
    x = tl.load(x_ptr + rows[:, None] * x_stride + features[None, :], mask=is_in, other=0.0)
    if ADDS:
        residual = tl.load(residual_ptr + rows[:, None] * residual_stride + features[None, :], mask=is_in, other=0.0)
        # The norm is of the sum as it is kept: rounded once.
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + rows[:, None] * E + features[None, :], x, mask=is_in)
    x = x.to(tl.float32)
    weight = tl.load(weight_ptr + features, mask=features < E, other=0.0).to(tl.float32) + offset
    root = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / E + eps)
    out = x * root[:, None] * weight[None, :]
    tl.store(out_ptr + rows[:, None] * E + features[None, :], out.to(out_ptr.dtype.element_ty), mask=is_in)
    if KEEPS_ROOT:
        tl.store(root_ptr + rows, root, mask=is_row)


@triton.jit
def _backward(
    grad_ptr: tl.tensor,
    grad_sum_ptr: tl.tensor,
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    root_ptr: tl.tensor,
    out_ptr: tl.tensor,
    weight_grads_ptr: tl.tensor,
    num_rows: tl.tensor,
    rows_per_program: tl.tensor,
    grad_stride: tl.tensor,
    grad_sum_stride: tl.tensor,
    x_stride: tl.tensor,
    offset: tl.tensor,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    ADDS: tl.constexpr,
) -> None:
    """With n = x * root: d x = root * (g w - n * mean(g w n)), d w = sum over rows of g n."""
    program = tl.program_id(0)
    features = tl.arange(0, BLOCK_E)
    is_in = features < E
    weight = tl.load(weight_ptr + features, mask=is_in, other=0.0).to(tl.float32) + offset
    weight_grad = tl.zeros([BLOCK_E], dtype=tl.float32)
    first = program.to(tl.int64) * rows_per_program
    for row in range(first, tl.minimum(first + rows_per_program, num_rows)):
        grad = tl.load(grad_ptr + row * grad_stride + features, mask=is_in, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row * x_stride + features, mask=is_in, other=0.0).to(tl.float32)
        root = tl.load(root_ptr + row)
        normed = x * root
        weighted = grad * weight
        out = root * (weighted - normed * (tl.sum(weighted * normed, axis=0) / E))
        if ADDS:
            grad_sum = tl.load(grad_sum_ptr + row * grad_sum_stride + features, mask=is_in, other=0.0)
            out += grad_sum.to(tl.float32)
        tl.store(out_ptr + row * E + features, out.to(out_ptr.dtype.element_ty), mask=is_in)
        weight_grad += grad * normed
    tl.store(weight_grads_ptr + program.to(tl.int64) * E + features, weight_grad, mask=is_in)


def _candidates(block: int) -> list[Blocks]:
    """Rows and warps of a program: about 16 bytes a thread and load."""
    if INTERPRETED:
        return [Blocks.of(ROWS=16)]
    natural = max(1, min(16, block // 512))
    rows = max(1, 2048 // block)
    tried = [(rows, natural), (rows, min(16, natural * 2)), (max(1, rows // 2), natural), (rows * 2, natural * 2)]
    tried += [(1, max(1, natural // 2))]
    return [Blocks.of(num_warps=min(16, warps), ROWS=r) for r, warps in dict.fromkeys(tried)]


class _Norm:
    """The launches of one use."""

    def __init__(self, spec: KernelSpec, tuner: Tuner) -> None:
        self.eps = float(spec.params.get("eps", 1e-6))
        self.offset = float(spec.params.get("weight_offset", 0.0))
        self._choice = Choice(tuner, f"{spec.operation}/{spec.dtype}")

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, keeps_root: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Normed rows, the rows that were normed, and one over their roots."""
        x_RE, size = as_rows(x), x.shape[-1]
        num_rows, block = x_RE.shape[0], power_of_two(size)
        residual_RE = None if residual is None else as_rows(residual)
        out_RE = torch.empty((num_rows, size), dtype=x.dtype, device=x.device)
        sum_RE = None if residual is None else torch.empty_like(out_RE)
        root_R = torch.empty(num_rows, dtype=torch.float32, device=x.device) if keeps_root else None

        def launch(blocks: Blocks) -> None:
            _forward[(triton.cdiv(num_rows, blocks["ROWS"]),)](
                x_RE,
                residual_RE,
                weight,
                out_RE,
                sum_RE,
                root_R,
                num_rows,
                x_RE.stride(0),
                0 if residual_RE is None else residual_RE.stride(0),
                self.eps,
                self.offset,
                E=size,
                BLOCK_E=block,
                ADDS=residual_RE is not None,
                KEEPS_ROOT=keeps_root,
                **blocks.launch,
            )

        if num_rows:
            launch(self._choice((size, rows_class(num_rows)), lambda: _candidates(block), launch))
        return out_RE, x_RE if sum_RE is None else sum_RE, root_R

    def backward(
        self,
        grad: torch.Tensor,
        grad_sum: torch.Tensor | None,
        x_RE: torch.Tensor,
        weight: torch.Tensor,
        root_R: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of what was normed, and of the weight."""
        grad_RE = as_rows(grad)
        grad_sum_RE = None if grad_sum is None else as_rows(grad_sum)
        num_rows, size = x_RE.shape
        block = power_of_two(size)
        programs = max(1, min(num_rows, num_processors(x_RE.device) * 4))
        out_RE = torch.empty((num_rows, size), dtype=x_RE.dtype, device=x_RE.device)
        weight_grads_PE = torch.empty((programs, size), dtype=torch.float32, device=x_RE.device)
        if num_rows == 0:
            return out_RE, torch.zeros_like(weight)
        rows_per_program = triton.cdiv(num_rows, programs)
        _backward[(programs,)](
            grad_RE,
            grad_sum_RE,
            x_RE,
            weight,
            root_R,
            out_RE,
            weight_grads_PE,
            num_rows,
            rows_per_program,
            grad_RE.stride(0),
            0 if grad_sum_RE is None else grad_sum_RE.stride(0),
            x_RE.stride(0),
            self.offset,
            E=size,
            BLOCK_E=block,
            ADDS=grad_sum_RE is not None,
            num_warps=max(1, min(16, block // 512)),
            **FUSED,
        )
        return out_RE, weight_grads_PE.sum(dim=0).to(weight.dtype)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, norm: _Norm, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        out_RE, x_RE, root_R = norm.forward(x, None, weight, keeps_root=True)
        context.norm = norm
        context.save_for_backward(x_RE, weight, root_R)
        return out_RE.view(x.shape)

    @staticmethod
    def backward(context: Any, grad: torch.Tensor) -> Any:
        x_RE, weight, root_R = context.saved_tensors
        x_grad, weight_grad = context.norm.backward(grad, None, x_RE, weight, root_R)
        return None, x_grad.view(grad.shape), weight_grad


class _AddRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, norm: _Norm, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Any:
        out_RE, sum_RE, root_R = norm.forward(x, residual, weight, keeps_root=True)
        context.norm = norm
        context.save_for_backward(sum_RE, weight, root_R)
        return out_RE.view(x.shape), sum_RE.view(x.shape)

    @staticmethod
    def backward(context: Any, grad: torch.Tensor, grad_sum: torch.Tensor) -> Any:
        sum_RE, weight, root_R = context.saved_tensors
        sum_grad, weight_grad = context.norm.backward(grad, grad_sum, sum_RE, weight, root_R)
        sum_grad = sum_grad.view(grad.shape)
        return None, sum_grad, sum_grad, weight_grad


def make_rms_norm(spec: KernelSpec, tuner: Tuner) -> Callable[..., torch.Tensor]:
    norm = _Norm(spec, tuner)

    def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if needs_gradient(x, weight):
            return _RmsNorm.apply(norm, x, weight.contiguous())
        return norm.forward(x, None, weight.contiguous(), keeps_root=False)[0].view(x.shape)

    return rms_norm


def make_add_rms_norm(spec: KernelSpec, tuner: Tuner) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    norm = _Norm(spec, tuner)

    def add_rms_norm(
        x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if needs_gradient(x, residual, weight):
            return _AddRmsNorm.apply(norm, x, residual, weight.contiguous())
        normed_RE, sum_RE, _ = norm.forward(x, residual, weight.contiguous(), keeps_root=False)
        return normed_RE.view(x.shape), sum_RE.view(x.shape)

    return add_rms_norm
