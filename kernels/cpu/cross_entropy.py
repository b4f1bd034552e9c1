"""A linear layer with the cross-entropy behind it: logits of some rows at a time, never of all.

Where gradients will be asked for, those of a plain sum of the losses are computed at once, while the logits of a chunk
are there: the three products of the plain layer, and none of them twice. A loss that is a sum of its tokens', times any
number, needs no more than that number (backward multiplies by it). Where tokens count differently, the gradient of the
inputs is right row by row, and that of the weight is computed anew.

The product that gives logits is the library's own, the very one that a server's logits come from. Products with the
gradients of logits are torch's.

Shapes: T tokens; E features; V vocabulary; C rows of a chunk.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from drivetrain.contracts.kernels import KernelSpec
from drivetrain.contracts.recipe import IGNORED
from drivetrain.errors import ConfigError
from drivetrain.hardware import read_processor
from drivetrain.kernels.cpu.library import FORMATS, ROW_FORMATS, check
from drivetrain.kernels.cpu.operations import dense, matrix_fields
from drivetrain.operators import define, once_differentiable

_CHUNK_BYTES = 128 << 20
"""Of a chunk's logits. Each chunk reads and writes the weight's gradient once."""


def _fail(what: str, found: object, allowed: object) -> ConfigError:
    return ConfigError(f"linear_cross_entropy: {what}", where="kernels/cpu", found=str(found), allowed=str(allowed))


def _multiplies_bfloat16() -> bool:
    """Whether torch's products of bfloat16 are faster than those of float32 here: where they have instructions."""
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(read_processor().instruction_sets)


def sum_dtype(weight_VE: Tensor) -> torch.dtype:
    """Of the gradient of the sum of the losses: float16 would neither hold it nor its smallest parts."""
    return torch.float32 if weight_VE.dtype is torch.float16 else weight_VE.dtype


class _Sum:
    """The weight's gradient, in the dtype of the products while there is one chunk, in float32 from the second on."""

    def __init__(self) -> None:
        self._total_VE: Tensor | None = None

    def add(self, grad_CV: Tensor, x_CE: Tensor) -> None:
        if self._total_VE is None:
            self._total_VE = grad_CV.T @ x_CE
            return
        self._total_VE = self._total_VE.float()
        if grad_CV.dtype is torch.float32:
            self._total_VE.addmm_(grad_CV.T, x_CE)
        else:
            self._total_VE += grad_CV.T @ x_CE

    def as_dtype(self, weight_VE: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.zeros(weight_VE.shape, dtype=dtype) if self._total_VE is None else self._total_VE.to(dtype)


class LinearLoss:
    """One use: its dtype and its soft cap."""

    def __init__(
        self, library: ctypes.CDLL, dtype: torch.dtype, soft_cap: float, chunk_bytes: int = _CHUNK_BYTES
    ) -> None:
        self._library = library
        self._dtype = dtype
        self._cap = soft_cap
        self._chunk_bytes = chunk_bytes
        self._is_wide = dtype is torch.bfloat16 and not _multiplies_bfloat16()

    def losses(self, x_TE: Tensor, weight_VE: Tensor, targets_T: Tensor) -> Tensor:
        """float32 [T]."""
        return self._forward(x_TE, weight_VE, targets_T)[0]

    def training(
        self, x_TE: Tensor, weight_VE: Tensor, targets_T: Tensor, wants_weight: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Losses, float32 [T], and the gradients of their sum: of x in its dtype, and of the weight in ``sum_dtype``,
        which is empty where nobody ``wants`` it."""
        x_grad_TE = torch.empty(x_TE.shape, dtype=x_TE.dtype)
        weight_sum = _Sum() if wants_weight else None
        losses_T, _ = self._forward(x_TE, weight_VE, targets_T, x_grad_TE, weight_sum)
        if weight_sum is None:
            return losses_T, x_grad_TE, weight_VE.new_empty((0, weight_VE.shape[1]), dtype=sum_dtype(weight_VE))
        return losses_T, x_grad_TE, weight_sum.as_dtype(weight_VE, sum_dtype(weight_VE))

    def gradients(
        self, grad_T: Tensor, x_TE: Tensor, weight_VE: Tensor, targets_T: Tensor, x_sum: Tensor, weight_sum: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Of x and weight, from those of the sum of the losses."""
        x_grad_TE = (x_sum.float() * grad_T[:, None]).to(x_TE.dtype)
        if not weight_sum.numel():
            return x_grad_TE, weight_sum.to(weight_VE.dtype)
        counted = grad_T[targets_T != IGNORED]
        factor = float(counted[0]) if counted.numel() else 0.0
        if bool((counted == factor).all()):
            return x_grad_TE, (weight_sum * factor).to(weight_VE.dtype)
        anew = _Sum()
        self._forward(x_TE, weight_VE, targets_T, None, anew, grad_T.float().contiguous())
        return x_grad_TE, anew.as_dtype(weight_VE, weight_VE.dtype)

    def _forward(
        self,
        x_TE: Tensor,
        weight_VE: Tensor,
        targets_T: Tensor,
        x_grad_TE: Tensor | None = None,
        weight_sum: _Sum | None = None,
        grad_T: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Losses, and the log of the sum of exponentials. Fills in the gradient of x and adds to the weight's, for
        losses that count ``grad_T`` times, or once each."""
        x_TE, weight_VE, targets_T = self._checked(x_TE, weight_VE, targets_T)
        tokens, vocab = x_TE.shape[0], weight_VE.shape[0]
        losses_T, totals_T = (torch.empty(tokens, dtype=torch.float32) for _ in range(2))
        takes_gradient = x_grad_TE is not None or weight_sum is not None
        multiplied_VE = weight_VE.float() if self._is_wide and x_grad_TE is not None else weight_VE
        for rows, logits_CV in self._logits(x_TE, weight_VE):
            places = (logits_CV.data_ptr(), targets_T[rows].data_ptr())
            found = (losses_T[rows].data_ptr(), totals_T[rows].data_ptr())
            sizes, kind = (logits_CV.shape[0], vocab, self._cap), FORMATS[logits_CV.dtype]
            if self._library.dt_token_losses(*places, *sizes, kind, *found) != 0:
                allowed = f"0 to {vocab - 1}, or {IGNORED} for none"
                raise _fail("a target is no token", f"{targets_T.min()} to {targets_T.max()}", allowed)
            if not takes_gradient:
                continue
            grads = None if grad_T is None else grad_T[rows].data_ptr()
            self._library.dt_logit_gradients(*places, found[1], grads, *sizes, kind)
            self._multiply(logits_CV, rows, x_TE, multiplied_VE, x_grad_TE, weight_sum)
        return losses_T, totals_T

    def _multiply(
        self,
        grad_CV: Tensor,
        rows: slice,
        x_TE: Tensor,
        weight_VE: Tensor,
        x_grad_TE: Tensor | None,
        weight_sum: _Sum | None,
    ) -> None:
        """Add what a chunk's gradients of logits give."""
        x_CE = x_TE[rows]
        if self._is_wide:
            grad_CV, x_CE = grad_CV.float(), x_CE.float()
        if x_grad_TE is not None:
            x_grad_TE[rows] = grad_CV @ weight_VE
        if weight_sum is not None:
            weight_sum.add(grad_CV, x_CE)

    def _logits(self, x_TE: Tensor, weight_VE: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Logits of some rows after the others, in the same memory."""
        (tokens, size), vocab = x_TE.shape, weight_VE.shape[0]
        if tokens == 0:
            return
        chunks = -(-tokens // max(1, self._chunk_bytes // (vocab * x_TE.element_size())))
        most = -(-tokens // chunks)  # as many in each: few rows take a product longer than their share
        room_CV = torch.empty((most, vocab), dtype=x_TE.dtype)
        fields, kind = matrix_fields(weight_VE), FORMATS[x_TE.dtype]
        place, out = ctypes.addressof(fields), room_CV.data_ptr()
        for start in range(0, tokens, most):
            count = min(most, tokens - start)
            first = x_TE.data_ptr() + start * size * x_TE.element_size()
            check(self._library.dt_linear(first, count, place, kind, out))
            yield slice(start, start + count), room_CV[:count]

    def _checked(self, x_TE: Tensor, weight_VE: Tensor, targets_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Without gaps; float16 as float32, which overflows later. Raises ConfigError for what does not fit."""
        for tensor in (x_TE, weight_VE):
            if tensor.dtype is not self._dtype or tensor.device.type != "cpu":
                raise _fail("bound for another dtype or device", f"{tensor.dtype} on {tensor.device}", self._dtype)
        shapes = (tuple(x_TE.shape), tuple(weight_VE.shape), tuple(targets_T.shape))
        if (
            [len(shape) for shape in shapes] != [2, 2, 1]
            or shapes[0][1] != shapes[1][1]
            or shapes[0][0] != shapes[2][0]
        ):
            raise _fail("shapes do not fit", shapes, "(T, E), (V, E), (T,)")
        if targets_T.dtype is not torch.int64:
            raise _fail("targets have another dtype", targets_T.dtype, torch.int64)
        if self._dtype is torch.float16:
            x_TE, weight_VE = x_TE.float(), weight_VE.float()
        return dense(x_TE), dense(weight_VE), dense(targets_T)


def make_linear_cross_entropy(spec: KernelSpec, library: ctypes.CDLL) -> Callable[..., Tensor]:
    """``(x [T, E], weight [V, E], targets [T]) -> float32 [T]``."""
    dtype, cap = getattr(torch, spec.dtype), float(spec.params.get("soft_cap", 0.0))
    if dtype not in ROW_FORMATS:
        raise _fail("no kernel for this dtype", dtype, ", ".join(map(str, ROW_FORMATS)))
    namespace = f"drivetrain_cpu_{library.variant}_{spec.dtype}"
    training = _training_operator(namespace, library, dtype)
    plain = LinearLoss(library, dtype, cap)
    losses = define(
        f"{namespace}::linear_cross_entropy",
        "(Tensor x, Tensor weight, Tensor targets, float cap) -> Tensor",
        lambda x, weight, targets, cap: LinearLoss(library, dtype, cap).losses(x, weight, targets),
        fake=lambda x, weight, targets, cap: x.new_empty(x.shape[:1], dtype=torch.float32),
    )

    def linear_cross_entropy(x_TE: Tensor, weight_VE: Tensor, targets_T: Tensor) -> Tensor:
        if torch.is_grad_enabled() and (x_TE.requires_grad or weight_VE.requires_grad):
            losses_T: Tensor = training(x_TE, weight_VE, targets_T, cap, weight_VE.requires_grad)[0]
            return losses_T
        if torch.compiler.is_compiling():
            compiled_T: Tensor = losses(x_TE, weight_VE, targets_T, cap)
            return compiled_T
        return plain.losses(x_TE, weight_VE, targets_T)

    return linear_cross_entropy


def _training_operator(namespace: str, library: ctypes.CDLL, dtype: torch.dtype) -> Any:
    """Losses with the gradients of their sum, and what these become of gradients of the losses."""

    def run(x: Tensor, weight: Tensor, targets: Tensor, cap: float, wants_weight: bool) -> Any:
        return LinearLoss(library, dtype, cap).training(x, weight, targets, wants_weight)

    def fake(x: Tensor, weight: Tensor, targets: Tensor, cap: float, wants_weight: bool) -> Any:
        rows = weight.shape[0] if wants_weight else 0
        losses = x.new_empty(x.shape[:1], dtype=torch.float32)
        return losses, x.new_empty(x.shape), weight.new_empty((rows, weight.shape[1]), dtype=sum_dtype(weight))

    gradients = define(
        f"{namespace}::linear_cross_entropy_gradients",
        "(Tensor grad, Tensor x, Tensor weight, Tensor targets, Tensor x_sum, Tensor weight_sum, float cap) "
        "-> (Tensor, Tensor)",
        lambda *given: LinearLoss(library, dtype, given[-1]).gradients(*given[:-1]),
        fake=lambda grad, x, weight, targets, x_sum, weight_sum, cap: (
            x.new_empty(x.shape),
            weight.new_empty(weight_sum.shape),
        ),
        backward=once_differentiable,
    )

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, weight, targets, ctx.cap, ctx.wants_weight = inputs
        ctx.save_for_backward(x, weight, targets, *output[1:])
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    def backward(ctx: Any, grad: Tensor | None, *others: None) -> Any:
        if grad is None:
            return (None,) * 5
        x_grad, weight_grad = gradients(grad, *ctx.saved_tensors, ctx.cap)
        return x_grad, weight_grad if ctx.wants_weight else None, None, None, None

    return define(
        f"{namespace}::linear_cross_entropy_training",
        "(Tensor x, Tensor weight, Tensor targets, float cap, bool wants_weight) -> (Tensor, Tensor, Tensor)",
        run,
        fake=fake,
        save=save,
        backward=backward,
    )
