"""Matrix products in plain torch: with a gate, with the loss behind them, and with quantized weights.

Shapes: ``...`` any leading dims; I, O features of a linear layer; T tokens; E features; V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch.nn import functional

from drivetrain.contracts.kernels import OPERATIONS, KernelSpec
from drivetrain.errors import ConfigError
from drivetrain.kernels.reference.pointwise import gelu_tanh_mul, silu_mul
from drivetrain.packed import DECODERS

IGNORED_TARGET = -100
"""A position with this target has no loss."""

_ACTIVATIONS = (silu_mul, gelu_tanh_mul)

_LARGEST_INT8, _LARGEST_FLOAT8 = 127, 448
_ROUNDED_BLOCK = 32
"""Inputs that have a scale of their own in ``linear_gguf_a8`` and ``linear_int4_a8``."""


def make_gated_linear(spec: KernelSpec) -> Callable[..., torch.Tensor]:
    """``(x [..., I], gate [O, I], up [O, I]) -> [..., O]``: two products, each rounded, and the gated activation."""
    number = spec.params.get("activation", 0.0)
    if number not in range(len(_ACTIVATIONS)):
        raise ConfigError(
            "no such activation",
            where="kernels/reference: gated_linear",
            found=number,
            allowed="0 (silu) or 1 (gelu, tanh approximation)",
        )
    activation = _ACTIVATIONS[int(number)]

    def gated_linear(x: torch.Tensor, gate_OI: torch.Tensor, up_OI: torch.Tensor) -> torch.Tensor:
        return activation(functional.linear(x, gate_OI), functional.linear(x, up_OI))

    return gated_linear


def make_linear_cross_entropy(spec: KernelSpec) -> Callable[..., torch.Tensor]:
    """``(x [T, E], weight [V, E], targets [T]) -> [T]``, from logits as ``linear`` gives them: what a model without
    fusion computes, so that a trainer's scores equal a server's."""
    cap = float(spec.params.get("soft_cap", 0.0))

    def linear_cross_entropy(x_TE: torch.Tensor, weight_VE: torch.Tensor, targets_T: torch.Tensor) -> torch.Tensor:
        logits_TV = functional.linear(x_TE, weight_VE)
        logits_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
        if cap:
            logits_TV = torch.tanh(logits_TV / cap) * cap
        return functional.cross_entropy(logits_TV, targets_T, ignore_index=IGNORED_TARGET, reduction="none")

    return linear_cross_entropy


def make_decoded(spec: KernelSpec) -> Callable[..., torch.Tensor]:
    """``(x [..., I], packed weights, bias) -> [..., O]`` by the weights that they stand for; in float32 or wider,
    rounded once."""
    decoder, params = DECODERS[spec.operation], dict(spec.params)

    def linear(x: torch.Tensor, *packed: torch.Tensor | None) -> torch.Tensor:
        weights, bias_O = _without_bias(spec.operation, packed)
        wide = torch.promote_types(x.dtype, torch.float32)
        return _product(x.to(wide), decoder(*weights, wide, params), bias_O).to(x.dtype)

    return linear


def make_rounded(spec: KernelSpec) -> Callable[..., torch.Tensor]:
    """The same, with activations that are rounded first as the operation says."""
    decoder, params, operation = DECODERS[spec.operation], dict(spec.params), spec.operation

    def linear(x: torch.Tensor, *packed: torch.Tensor | None) -> torch.Tensor:
        weights, bias_O = _without_bias(operation, packed)
        wide = torch.promote_types(x.dtype, torch.float32)
        exact = x.to(wide)
        with torch.no_grad():
            if operation == "linear_fp8a8":
                rounded = _as_float8(exact, weights[2].to(wide))
            elif operation in ("linear_gguf_a8", "linear_int4_a8"):
                rounded = _as_int8(exact.unflatten(-1, (-1, _ROUNDED_BLOCK))).flatten(-2)
            else:
                rounded = _as_int8(exact)
        # The difference is 0, and has the gradient of x: rounding itself has none.
        rounded = rounded + (exact - exact.detach())
        return _product(rounded, decoder(*weights, wide, params), bias_O).to(x.dtype)

    return linear


def _without_bias(
    operation: str, packed: tuple[torch.Tensor | None, ...]
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """Weight arguments and bias; the bias may be left out."""
    count = len(OPERATIONS[operation].arguments) - 2
    return cast(list[torch.Tensor], list(packed[:count])), packed[count] if len(packed) > count else None


def _quotients(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """``x / scale``, and 0 where a row is all zeros."""
    return torch.where(scale == 0, torch.zeros_like(x), x / scale)


def _own_scale(x: torch.Tensor, largest_code: int) -> torch.Tensor:
    """``max(|x|) / largest_code`` of the last dim.

    The divisor is a tensor: for a plain number a GPU multiplies by its inverse, and the last bit may be another.
    """
    if not x.numel():
        return x
    return x.abs().amax(dim=-1, keepdim=True) / torch.full((), largest_code, dtype=x.dtype, device=x.device)


def _as_int8(x: torch.Tensor) -> torch.Tensor:
    """What is left of x when the last dim is kept in int8 with one scale."""
    scale = _own_scale(x, _LARGEST_INT8)
    return _quotients(x, scale).round() * scale


def _as_float8(x: torch.Tensor, x_scale: torch.Tensor) -> torch.Tensor:
    """What is left of x when it is kept in float8_e4m3fn with a given scale, or with one for each row."""
    scale = torch.where(x_scale == 0, _own_scale(x, _LARGEST_FLOAT8), x_scale)
    quotients = _quotients(x, scale).clamp(-_LARGEST_FLOAT8, _LARGEST_FLOAT8)
    return quotients.to(torch.float8_e4m3fn).to(x.dtype) * scale


def _product(x: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> torch.Tensor:
    bias_O = None if bias_O is None else bias_O.to(weight_OI.dtype)
    return functional.linear(x, weight_OI.detach(), bias_O)
