"""A linear layer with the cross-entropy behind it: logits of a few rows at a time, never of all.

Forward keeps one number a row, the log of the sum of exponentials; backward computes each chunk of logits again and
turns it, in place, into its gradient. The products are torch's, whose library is the fastest there is for large
square-ish ones; what is between them is one kernel each way. Source of the idea: the recomputation of Chen et al. 2016,
"Training Deep Nets with Sublinear Memory Cost", applied to the widest layer.

Shapes: T tokens; E features; V vocabulary; C rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch.nn import functional

from drivetrain.contracts.kernels import KernelSpec
from drivetrain.kernels.triton.launch import INTERPRETED, power_of_two, tanh
from drivetrain.kernels.triton.operators import NAMESPACE, define
from drivetrain.kernels.triton.tuning import FUSED
from drivetrain.operators import Operator, once_differentiable, visible

_LEAST_CHUNK_ROWS = 128


@triton.jit
def _losses(
    logits_ptr: tl.tensor,
    targets_ptr: tl.tensor,
    loss_ptr: tl.tensor,
    total_ptr: tl.tensor,
    V: tl.tensor,
    cap: tl.tensor,
    HAS_CAP: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One row a program: the loss, and the log of the sum of exponentials."""
    row = tl.program_id(0).to(tl.int64)
    best = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, V, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + row * V + tokens, mask=tokens < V, other=float("-inf")).to(tl.float32)
        if HAS_CAP:
            x = tl.where(tokens < V, cap * tanh(x / cap), float("-inf"))
        better = tl.maximum(best, x)
        safe = tl.where(better == float("-inf"), 0.0, better)
        total = total * tl.exp(best - safe) + tl.exp(x - safe)
        best = better
    peak = tl.max(best, axis=0)
    log_total = peak + tl.log(tl.sum(total * tl.exp(best - peak), axis=0))
    target = tl.load(targets_ptr + row)
    is_counted = target != -100
    chosen = tl.load(logits_ptr + row * V + target, mask=is_counted, other=0.0).to(tl.float32)
    if HAS_CAP:
        chosen = cap * tanh(chosen / cap)
    tl.store(loss_ptr + row, tl.where(is_counted, log_total - chosen, 0.0))
    tl.store(total_ptr + row, log_total)


@triton.jit
def _logit_gradients(
    logits_ptr: tl.tensor,
    targets_ptr: tl.tensor,
    total_ptr: tl.tensor,
    grad_ptr: tl.tensor,
    V: tl.tensor,
    cap: tl.tensor,
    HAS_CAP: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """In place: ``grad * (softmax - one hot)``, times the slope of the soft cap."""
    row = tl.program_id(0).to(tl.int64)
    tokens = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_in = tokens < V
    target = tl.load(targets_ptr + row)
    grad = tl.where(target != -100, tl.load(grad_ptr + row), 0.0)
    x = tl.load(logits_ptr + row * V + tokens, mask=is_in, other=0.0).to(tl.float32)
    if HAS_CAP:
        x = cap * tanh(x / cap)
    out = grad * (tl.exp(x - tl.load(total_ptr + row)) - tl.where(tokens == target, 1.0, 0.0))
    if HAS_CAP:
        out *= 1.0 - (x / cap) * (x / cap)
    tl.store(logits_ptr + row * V + tokens, out.to(logits_ptr.dtype.element_ty), mask=is_in)


def _block(vocab: int) -> int:
    return min(128 if INTERPRETED else 4096, power_of_two(vocab))


# --- how they are launched -----------------------------------------------------------------------------------------


def chunks(num_rows: int, row_bytes: int, chunk_bytes: int) -> list[slice]:
    """Rows whose logits are held together."""
    least = 1 if INTERPRETED else _LEAST_CHUNK_ROWS
    rows = max(least, chunk_bytes // row_bytes)
    return [slice(start, min(start + rows, num_rows)) for start in range(0, num_rows, rows)]


def losses(
    x_TE: torch.Tensor, weight_VE: torch.Tensor, targets_T: torch.Tensor, cap: float, chunk_bytes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses, and the log of the sum of exponentials; both float32 [T]."""
    x_TE, weight_VE, targets_T = x_TE.contiguous(), weight_VE.contiguous(), targets_T.contiguous()
    vocab = weight_VE.shape[0]
    loss_T, total_T = (torch.empty(x_TE.shape[0], dtype=torch.float32, device=x_TE.device) for _ in range(2))
    for rows in chunks(x_TE.shape[0], vocab * x_TE.dtype.itemsize, chunk_bytes):
        logits_CV = functional.linear(x_TE[rows], weight_VE)
        _losses[(logits_CV.shape[0],)](
            logits_CV,
            targets_T[rows],
            loss_T[rows],
            total_T[rows],
            vocab,
            cap,
            HAS_CAP=cap != 0,
            BLOCK=_block(vocab),
            num_warps=8,
            **FUSED,
        )
    return loss_T, total_T


def _backpropagated(
    grad_T: torch.Tensor,
    x_TE: torch.Tensor,
    weight_VE: torch.Tensor,
    targets_T: torch.Tensor,
    total_T: torch.Tensor,
    cap: float,
    chunk_bytes: int,
    *,
    wants_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of the inputs, and of the weight where it ``wants`` one."""
    grad_T, targets_T = grad_T.contiguous(), targets_T.contiguous()
    x_TE, weight_VE = x_TE.contiguous(), weight_VE.contiguous()
    vocab, block = weight_VE.shape[0], _block(weight_VE.shape[0])
    x_grad_TE = torch.empty_like(x_TE)
    parts = chunks(x_TE.shape[0], vocab * x_TE.dtype.itemsize, chunk_bytes)
    # In float32 where several chunks add to it.
    dtype = torch.float32 if len(parts) > 1 else weight_VE.dtype
    weight_grad_VE = torch.zeros(weight_VE.shape, dtype=dtype, device=weight_VE.device) if wants_weight else None
    for rows in parts:
        logits_CV = functional.linear(x_TE[rows], weight_VE)
        _logit_gradients[(logits_CV.shape[0], triton.cdiv(vocab, block))](
            logits_CV,
            targets_T[rows],
            total_T[rows],
            grad_T[rows],
            vocab,
            cap,
            HAS_CAP=cap != 0,
            BLOCK=block,
            num_warps=8,
            **FUSED,
        )
        torch.mm(logits_CV, weight_VE, out=x_grad_TE[rows])
        if weight_grad_VE is not None:
            weight_grad_VE += logits_CV.T @ x_TE[rows]
    return x_grad_TE, None if weight_grad_VE is None else weight_grad_VE.to(weight_VE.dtype)


# --- what a model binds: the plain callable, and the operator that torch sees --------------------------------------


def _input_gradients(*arguments: Any) -> torch.Tensor:
    return _backpropagated(*arguments, wants_weight=False)[0]


def _all_gradients(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    return _backpropagated(*arguments, wants_weight=True)


def _backward_operators() -> tuple[torch._ops.OpOverload, torch._ops.OpOverload]:
    """Gradients of the inputs alone, and of inputs and weight."""
    arguments = "Tensor grad, Tensor x, Tensor weight, Tensor targets, Tensor total, float cap, int chunk_bytes"
    name = f"{NAMESPACE}::linear_cross_entropy_backward"
    of_inputs = define(
        f"{name}_of_inputs",
        f"({arguments}) -> Tensor",
        _input_gradients,
        fake=lambda grad, x, *others: x.new_empty(x.shape),
        backward=once_differentiable,
    )
    of_all = define(
        name,
        f"({arguments}) -> (Tensor, Tensor)",
        _all_gradients,
        fake=lambda grad, x, weight, *others: (x.new_empty(x.shape), weight.new_empty(weight.shape)),
        backward=once_differentiable,
    )
    return of_inputs, of_all


def _fake(x_TE: torch.Tensor, *others: Any) -> tuple[torch.Tensor, torch.Tensor]:
    num_rows = x_TE.shape[0]
    return x_TE.new_empty((num_rows,), dtype=torch.float32), x_TE.new_empty((num_rows,), dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """The log of the sum of exponentials is no result of the operation, and no gradient of it is made up."""
    *tensors, ctx.cap, ctx.chunk_bytes = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[1])


def make_linear_cross_entropy(spec: KernelSpec, chunk_bytes: int) -> Callable[..., torch.Tensor]:
    """chunk_bytes: the most that the logits of a chunk take, but for 128 rows, which are always taken together."""
    cap = float(spec.params.get("soft_cap", 0.0))
    of_inputs, of_all = _backward_operators()

    def backward(ctx: Any, grad_T: torch.Tensor, _: None) -> Any:
        arguments = (grad_T, *ctx.saved_tensors, ctx.cap, ctx.chunk_bytes)
        if ctx.needs_input_grad[1]:
            return (*of_all(*arguments), None, None, None)
        return of_inputs(*arguments), None, None, None, None

    overload = define(
        f"{NAMESPACE}::linear_cross_entropy",
        "(Tensor x, Tensor weight, Tensor targets, float cap, int chunk_bytes) -> (Tensor, Tensor)",
        losses,
        fake=_fake,
        save=_save,
        backward=backward,
    )

    def plain(x_TE: torch.Tensor, weight_VE: torch.Tensor, targets_T: torch.Tensor) -> torch.Tensor:
        return losses(x_TE, weight_VE, targets_T, cap, chunk_bytes)[0]

    return visible(plain, Operator(overload, (cap, chunk_bytes), results=1))
