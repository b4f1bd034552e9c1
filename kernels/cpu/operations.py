"""The operations that work row by row, and plain products: callables for serving, operators for autograd and compile.

Shapes: ``...`` any leading dims; E, I, O features; T tokens; H query heads; G key/value heads; D head size; R rotary
dims; B blocks of the cache; N tokens in a block.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from drivetrain.contracts.kernels import KernelSpec
from drivetrain.errors import ConfigError
from drivetrain.kernels.cpu import gradients
from drivetrain.kernels.cpu.library import FORMATS, check
from drivetrain.operators import Operator, define, visible

Kernel = Callable[..., Any]


_DOES_NOT_TELL = 2
"""Status of ``dt_largest``."""


class MatrixFields(ctypes.Structure):
    """``dt_matrix`` of ``src/decoder.cpp``."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("format", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("scales", "mins", "high", "x_scale")),
        *((name, ctypes.c_int64) for name in ("stride", "group", "scale_format", "rounding", "has_zeros")),
    )


def dense(tensor: Tensor) -> Tensor:
    """The same values with rows side by side in memory."""
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def _fail(what: str, found: object, allowed: object) -> ConfigError:
    return ConfigError(what, where="kernels/cpu", found=str(found), allowed=str(allowed))


class Rows:
    """The library's functions, called with tensors that are checked first: a wrong shape must not become a wrong read.

    One for each dtype that activations and weights have. namespace: of its operators.
    """

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        self._library = library
        self._dtype = dtype
        self._format = FORMATS[dtype]
        self.namespace = f"drivetrain_cpu_{library.variant}_{str(dtype).removeprefix('torch.')}"

    def _dense(self, tensor: Tensor, shape: tuple[int | None, ...] | torch.Size | None = None) -> Tensor:
        """``tensor`` without gaps. Raises ConfigError for another dtype, device or shape (None is any size)."""
        if tensor.dtype is not self._dtype or tensor.device.type != "cpu":
            raise _fail("bound for another dtype or device", f"{tensor.dtype} on {tensor.device}", self._dtype)
        if shape is not None:
            fits = len(shape) == tensor.dim() and all(
                wanted is None or wanted == size for wanted, size in zip(shape, tensor.shape, strict=True)
            )
            if not fits:
                raise _fail("an argument has the wrong shape", tuple(tensor.shape), tuple(shape))
        return dense(tensor)

    def rms_norm(self, x: Tensor, weight_E: Tensor, eps: float, offset: float) -> Tensor:
        x = self._dense(x)
        size = x.shape[-1]
        weight_E = self._dense(weight_E, (size,))
        out = torch.empty_like(x)
        self._library.dt_rms_norm(
            x.data_ptr(),
            None,
            weight_E.data_ptr(),
            eps,
            offset,
            x.numel() // size,
            size,
            self._format,
            out.data_ptr(),
            None,
        )
        return out

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight_E: Tensor, eps: float, offset: float
    ) -> tuple[Tensor, Tensor]:
        x = self._dense(x)
        size = x.shape[-1]
        residual, weight_E = self._dense(residual, x.shape), self._dense(weight_E, (size,))
        out, summed = torch.empty_like(x), torch.empty_like(x)
        self._library.dt_rms_norm(
            x.data_ptr(),
            residual.data_ptr(),
            weight_E.data_ptr(),
            eps,
            offset,
            x.numel() // size,
            size,
            self._format,
            out.data_ptr(),
            summed.data_ptr(),
        )
        return out, summed

    def rope(self, q_THD: Tensor, k_TGD: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> tuple[Tensor, Tensor]:
        q_THD = self._dense(q_THD, (None, None, None))
        tokens, _, size = q_THD.shape
        k_TGD = self._dense(k_TGD, (tokens, None, size))
        cos_TR, sin_TR = dense(cos_TR.float()), dense(sin_TR.float())
        rotary = cos_TR.shape[-1]
        if cos_TR.shape != sin_TR.shape or cos_TR.shape != (tokens, rotary) or rotary > size or rotary % 2:
            raise _fail("cos and sin do not fit", tuple(cos_TR.shape), f"({tokens}, an even number up to {size})")
        return self._rotated(q_THD, cos_TR, sin_TR), self._rotated(k_TGD, cos_TR, sin_TR)

    def _rotated(self, x_THD: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
        out = torch.empty_like(x_THD)
        angles = (cos_TR.data_ptr(), sin_TR.data_ptr())
        self._library.dt_rotate(x_THD.data_ptr(), *angles, *x_THD.shape, cos_TR.shape[-1], self._format, out.data_ptr())
        return out

    def gated(self, gate: Tensor, up: Tensor, activation: int) -> Tensor:
        gate = self._dense(gate)
        up = self._dense(up, gate.shape)
        out = torch.empty_like(gate)
        size = gate.shape[-1]
        self._library.dt_gated(
            gate.data_ptr(), up.data_ptr(), gate.numel() // size, size, activation, self._format, out.data_ptr()
        )
        return out

    def linear(self, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        x = self._dense(x)
        weight_OI = self._dense(weight_OI, (None, x.shape[-1]))
        if bias_O is not None:
            bias_O = self._dense(bias_O, (weight_OI.shape[0],)).float()
        out = x.new_empty((*x.shape[:-1], weight_OI.shape[0]))
        if out.numel():
            fields = matrix_fields(weight_OI, bias_O)
            place = ctypes.addressof(fields)
            rows = x.numel() // x.shape[-1]
            check(self._library.dt_linear(x.data_ptr(), rows, place, self._format, out.data_ptr()))
        return out

    def largest(
        self, x_NI: Tensor, weight: MatrixFields, codes: MatrixFields, radii_O: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """Each row's largest product with the weight, and the first of these; None where a row does not tell.

        codes: the weight in int8; radii_O: float32, how far outputs by them are off at most, for an x of length 1.
        """
        x_NI = self._dense(x_NI, (None, weight.cols))
        best_N, index_N = torch.empty(len(x_NI)), torch.empty(len(x_NI), dtype=torch.int64)
        if len(x_NI):
            places = (ctypes.addressof(weight), ctypes.addressof(codes), radii_O.data_ptr())
            found = (best_N.data_ptr(), index_N.data_ptr())
            status = self._library.dt_largest(x_NI.data_ptr(), len(x_NI), *places, *found)
            if status == _DOES_NOT_TELL:
                return None
            check(status)
        return best_N.to(self._dtype), index_N

    def gated_linear(self, x: Tensor, gate_OI: Tensor, up_OI: Tensor, activation: int) -> Tensor:
        x = self._dense(x)
        gate_OI = self._dense(gate_OI, (None, x.shape[-1]))
        up_OI = self._dense(up_OI, gate_OI.shape)
        out = x.new_empty((*x.shape[:-1], gate_OI.shape[0]))
        if out.numel():
            gate, up = matrix_fields(gate_OI), matrix_fields(up_OI)
            status = self._library.dt_gated_linear(
                x.data_ptr(),
                x.numel() // x.shape[-1],
                ctypes.addressof(gate),
                ctypes.addressof(up),
                activation,
                self._format,
                out.data_ptr(),
            )
            check(status)
        return out

    def sample(
        self,
        logits_SV: Tensor,
        temperature_S: Tensor,
        top_k_S: Tensor,
        top_p_S: Tensor,
        min_p_S: Tensor,
        draws_S: Tensor,
    ) -> Tensor:
        scores_SV = self._dense(logits_SV, (None, None)).float()
        rows, size = scores_SV.shape
        settings = [
            dense(setting.to(dtype))
            for setting, dtype in (
                (temperature_S, torch.float32),
                (top_k_S, torch.int64),
                (top_p_S, torch.float32),
                (min_p_S, torch.float32),
                (draws_S, torch.float64),
            )
        ]
        if any(setting.shape != (rows,) for setting in settings):
            raise _fail("a setting has the wrong shape", [tuple(s.shape) for s in settings], (rows,))
        token_S = torch.empty(rows, dtype=torch.int64)
        if rows:
            places = (setting.data_ptr() for setting in settings)
            self._library.dt_sample(scores_SV.data_ptr(), rows, size, *places, token_S.data_ptr())
        return token_S


def matrix_fields(weight_OI: Tensor, bias_O: Tensor | None = None) -> MatrixFields:
    """Pointers to a dense weight and to a float32 bias, which the caller keeps alive."""
    return MatrixFields(
        weight_OI.data_ptr(),
        None if bias_O is None else bias_O.data_ptr(),
        weight_OI.shape[0],
        weight_OI.shape[1],
        FORMATS[weight_OI.dtype],
    )


# --- what a model binds: the plain callable, and the operator that torch sees --------------------------------------


def _save(count: int) -> Callable[..., None]:
    """Keeps the first ``count`` inputs, which are tensors, and the constants behind them."""

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:count])
        ctx.constants = inputs[count:]

    return save


def _operator(rows: Rows, name: str, schema: str, run: Kernel, fake: Kernel, count: int, backward: Kernel) -> Any:
    return define(f"{rows.namespace}::{name}", schema, run, fake=fake, save=_save(count), backward=backward)


def _rows(spec: KernelSpec, library: ctypes.CDLL) -> Rows:
    return Rows(library, getattr(torch, spec.dtype))


def _norm_constants(spec: KernelSpec) -> tuple[float, float]:
    return float(spec.params.get("eps", 1e-6)), float(spec.params.get("weight_offset", 0.0))


def make_rms_norm(spec: KernelSpec, library: ctypes.CDLL) -> Kernel:
    """``(x [..., E], weight [E]) -> [..., E]``."""
    rows = _rows(spec, library)
    eps, offset = _norm_constants(spec)

    def backward(ctx: Any, grad: Tensor) -> Any:
        return (*gradients.rms_norm(grad, *ctx.saved_tensors, *ctx.constants), None, None)

    operator = _operator(
        rows,
        "rms_norm",
        "(Tensor x, Tensor weight, float eps, float offset) -> Tensor",
        rows.rms_norm,
        lambda x, weight, eps, offset: x.new_empty(x.shape),
        2,
        backward,
    )
    return visible(lambda x, weight: rows.rms_norm(x, weight, eps, offset), Operator(operator, (eps, offset)))


def make_add_rms_norm(spec: KernelSpec, library: ctypes.CDLL) -> Kernel:
    """``(x [..., E], residual [..., E], weight [E]) -> (normed, summed)``."""
    rows = _rows(spec, library)
    eps, offset = _norm_constants(spec)

    def backward(ctx: Any, grad_normed: Tensor, grad_summed: Tensor) -> Any:
        x, residual, weight_E = ctx.saved_tensors
        grad_x, grad_weight = gradients.rms_norm(grad_normed, x + residual, weight_E, *ctx.constants)
        grad_x = grad_x + grad_summed
        return grad_x, grad_x, grad_weight, None, None

    operator = _operator(
        rows,
        "add_rms_norm",
        "(Tensor x, Tensor residual, Tensor weight, float eps, float offset) -> (Tensor, Tensor)",
        rows.add_rms_norm,
        lambda x, residual, weight, eps, offset: (x.new_empty(x.shape), x.new_empty(x.shape)),
        3,
        backward,
    )
    return visible(
        lambda x, residual, weight: rows.add_rms_norm(x, residual, weight, eps, offset),
        Operator(operator, (eps, offset)),
    )


def make_rope(spec: KernelSpec, library: ctypes.CDLL) -> Kernel:
    """``(q [T, H, D], k [T, G, D], cos [T, R], sin [T, R]) -> (q, k)``; angles of any floating dtype."""
    rows = _rows(spec, library)

    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> Any:
        _, _, cos_TR, sin_TR = ctx.saved_tensors
        return gradients.rotate(grad_q, cos_TR, sin_TR), gradients.rotate(grad_k, cos_TR, sin_TR), None, None

    operator = _operator(
        rows,
        "rope",
        "(Tensor q, Tensor k, Tensor cos, Tensor sin) -> (Tensor, Tensor)",
        rows.rope,
        lambda q, k, cos, sin: (q.new_empty(q.shape), k.new_empty(k.shape)),
        4,
        backward,
    )
    return visible(rows.rope, Operator(operator))


def make_gated(spec: KernelSpec, library: ctypes.CDLL) -> Kernel:
    """``(gate [..., E], up [..., E]) -> [..., E]`` for silu_mul and gelu_tanh_mul."""
    rows = _rows(spec, library)
    activation = 0 if spec.operation == "silu_mul" else 1

    def backward(ctx: Any, grad: Tensor) -> Any:
        return (*gradients.gated(grad, *ctx.saved_tensors, *ctx.constants), None)

    operator = _operator(
        rows,
        "gated",
        "(Tensor gate, Tensor up, int activation) -> Tensor",
        rows.gated,
        lambda gate, up, activation: gate.new_empty(gate.shape),
        2,
        backward,
    )
    return visible(lambda gate, up: rows.gated(gate, up, activation), Operator(operator, (activation,)))


def make_linear(spec: KernelSpec, library: ctypes.CDLL) -> Kernel:
    """``(x [..., I], weight [O, I], bias [O] | None) -> [..., O]``; the weight is read where it lies."""
    rows = _rows(spec, library)

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(inputs[0], inputs[1])
        ctx.has_bias = inputs[2] is not None

    def backward(ctx: Any, grad: Tensor) -> Any:
        grad_bias = grad.flatten(0, -2).sum(dim=0) if ctx.has_bias else None
        return (*gradients.linear(grad, *ctx.saved_tensors), grad_bias)

    operator = define(
        f"{rows.namespace}::linear",
        "(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
        rows.linear,
        fake=lambda x, weight, bias: x.new_empty((*x.shape[:-1], weight.shape[0])),
        save=save,
        backward=backward,
    )

    def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
        return rows.linear(x, weight_OI, bias_O)

    bound = visible(linear, Operator(operator))
    if library.dt_has_screen():
        from drivetrain.kernels.cpu.largest import largest_of

        bound.largest_of = lambda weight_OI: largest_of(rows, weight_OI)  # type: ignore[attr-defined]
    return bound


def make_gated_linear(spec: KernelSpec, library: ctypes.CDLL) -> Kernel:
    """``(x [..., I], gate [O, I], up [O, I]) -> [..., O]``, with the activation inside the product's own loop."""
    rows = _rows(spec, library)
    activation = spec.params.get("activation", 0.0)
    if activation not in (0.0, 1.0):
        raise _fail("no such activation", activation, "0 (silu) or 1 (gelu, tanh approximation)")
    kind = int(activation)

    def backward(ctx: Any, grad: Tensor) -> Any:
        return (*gradients.gated_linear(grad, *ctx.saved_tensors, *ctx.constants), None)

    operator = _operator(
        rows,
        "gated_linear",
        "(Tensor x, Tensor gate, Tensor up, int activation) -> Tensor",
        rows.gated_linear,
        lambda x, gate, up, activation: x.new_empty((*x.shape[:-1], gate.shape[0])),
        3,
        backward,
    )
    return visible(lambda x, gate, up: rows.gated_linear(x, gate, up, kind), Operator(operator, (kind,)))


def make_sample(spec: KernelSpec, library: ctypes.CDLL) -> Kernel:
    """``(logits [S, V], temperature [S], top_k [S], top_p [S], min_p [S], draws [S]) -> int64 [S]``."""
    rows = _rows(spec, library)

    operator = define(
        f"{rows.namespace}::sample",
        "(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor draws) -> Tensor",
        rows.sample,
        fake=lambda logits, *settings: logits.new_empty((logits.shape[0],), dtype=torch.int64),
    )
    return visible(rows.sample, Operator(operator))
