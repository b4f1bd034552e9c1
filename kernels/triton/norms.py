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
from drivetrain.kernels.triton.launch import INTERPRETED, as_rows, num_processors, power_of_two
from drivetrain.kernels.triton.operators import NAMESPACE, define, name_of
from drivetrain.kernels.triton.tuning import FUSED, Blocks, Choice, Tuner, rows_class
from drivetrain.operators import Operator, once_differentiable, visible


@triton.jit(do_not_specialize=["num_rows"])
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


@triton.jit(do_not_specialize=["num_rows", "rows_per_program"])
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


def _constants(spec: KernelSpec) -> tuple[float, float]:
    """eps, and what is added to weights."""
    return float(spec.params.get("eps", 1e-6)), float(spec.params.get("weight_offset", 0.0))


class _Norm:
    """The launches of one use, forward."""

    def __init__(self, spec: KernelSpec, tuner: Tuner) -> None:
        self._choice = Choice(tuner, f"{spec.operation}/{spec.dtype}")

    def __call__(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
        offset: float,
        *,
        keeps_root: bool,
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
                eps,
                offset,
                E=size,
                BLOCK_E=block,
                ADDS=residual_RE is not None,
                KEEPS_ROOT=keeps_root,
                **blocks.launch,
            )

        if num_rows:
            launch(self._choice((size, rows_class(num_rows)), lambda: _candidates(block), launch))
        return out_RE, x_RE if sum_RE is None else sum_RE, root_R


def _backpropagated(
    grad: torch.Tensor,
    grad_sum: torch.Tensor | None,
    x_RE: torch.Tensor,
    weight: torch.Tensor,
    root_R: torch.Tensor,
    offset: float,
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
        offset,
        E=size,
        BLOCK_E=block,
        ADDS=grad_sum_RE is not None,
        num_warps=max(1, min(16, block // 512)),
        **FUSED,
    )
    return out_RE, weight_grads_PE.sum(dim=0).to(weight.dtype)


# --- what a model binds: the plain callable, and the operator that torch sees --------------------------------------


def _norm_backward(
    grad: torch.Tensor,
    grad_sum: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    root: torch.Tensor,
    offset: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    x_grad_RE, weight_grad = _backpropagated(grad, grad_sum, as_rows(x), weight.contiguous(), root, offset)
    return x_grad_RE.view(x.shape), weight_grad


def _backward_operator() -> torch._ops.OpOverload:
    return define(
        f"{NAMESPACE}::norm_backward",
        "(Tensor grad, Tensor? grad_sum, Tensor x, Tensor weight, Tensor root, float offset) -> (Tensor, Tensor)",
        _norm_backward,
        fake=lambda grad, grad_sum, x, weight, root, offset: (x.new_empty(x.shape), weight.new_empty(weight.shape)),
        backward=once_differentiable,
    )


def _keep(ctx: Any, normed: torch.Tensor, weight: torch.Tensor, root: torch.Tensor, offset: float) -> None:
    """The root is no result of the operation, and no gradient of it is made up."""
    ctx.mark_non_differentiable(root)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(normed, weight, root)
    ctx.offset = offset


def _fake_root(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty((x.numel() // x.shape[-1],), dtype=torch.float32)


def make_rms_norm(spec: KernelSpec, tuner: Tuner) -> Callable[..., torch.Tensor]:
    norm = _Norm(spec, tuner)
    eps, offset = _constants(spec)
    norm_backward = _backward_operator()

    def rms_norm(
        x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        out_RE, _, root_R = norm(x, None, weight.contiguous(), eps, offset, keeps_root=True)
        return out_RE.view(x.shape), root_R

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _keep(ctx, inputs[0], inputs[1], output[1], inputs[3])

    def backward(ctx: Any, grad: torch.Tensor, _: None) -> Any:
        return (*norm_backward(grad, None, *ctx.saved_tensors, ctx.offset), None, None)

    overload = define(
        name_of(spec, tuner),
        "(Tensor x, Tensor weight, float eps, float offset) -> (Tensor, Tensor)",
        rms_norm,
        fake=lambda x, weight, eps, offset: (x.new_empty(x.shape), _fake_root(x)),
        save=save,
        backward=backward,
    )

    def plain(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return norm(x, None, weight.contiguous(), eps, offset, keeps_root=False)[0].view(x.shape)

    return visible(plain, Operator(overload, (eps, offset), results=1))


def make_add_rms_norm(spec: KernelSpec, tuner: Tuner) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    norm = _Norm(spec, tuner)
    eps, offset = _constants(spec)
    norm_backward = _backward_operator()

    def add_rms_norm(
        x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, offset: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        normed_RE, sum_RE, root_R = norm(x, residual, weight.contiguous(), eps, offset, keeps_root=True)
        return normed_RE.view(x.shape), sum_RE.view(x.shape), root_R

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _keep(ctx, output[1], inputs[2], output[2], inputs[4])

    def backward(ctx: Any, grad: torch.Tensor | None, grad_sum: torch.Tensor | None, _: None) -> Any:
        summed, weight, root = ctx.saved_tensors
        grad = torch.zeros_like(summed) if grad is None else grad
        x_grad, weight_grad = norm_backward(grad, grad_sum, summed, weight, root, ctx.offset)
        return x_grad, x_grad, weight_grad, None, None

    overload = define(
        name_of(spec, tuner),
        "(Tensor x, Tensor residual, Tensor weight, float eps, float offset) -> (Tensor, Tensor, Tensor)",
        add_rms_norm,
        fake=lambda x, residual, weight, eps, offset: (x.new_empty(x.shape), x.new_empty(x.shape), _fake_root(x)),
        save=save,
        backward=backward,
    )

    def plain(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        normed_RE, sum_RE, _ = norm(x, residual, weight.contiguous(), eps, offset, keeps_root=False)
        return normed_RE.view(x.shape), sum_RE.view(x.shape)

    return visible(plain, Operator(overload, (eps, offset), results=2))
