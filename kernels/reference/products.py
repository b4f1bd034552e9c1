"""Matrix products in plain torch: with a gate, with the loss behind them, and with quantized weights.

Shapes: ``...`` any leading dims; I, O features of a linear layer; T tokens; E features; V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from drivetrain.contracts.kernels import KernelSpec
from drivetrain.errors import ConfigError
from drivetrain.kernels.reference.pointwise import gelu_tanh_mul, silu_mul

IGNORED_TARGET = -100
"""A position with this target has no loss."""

_ACTIVATIONS = (silu_mul, gelu_tanh_mul)


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


def linear_by_row(
    x: torch.Tensor, weight_OI: torch.Tensor, scales_O: torch.Tensor, bias_O: torch.Tensor | None = None
) -> torch.Tensor:
    """A product with a weight of int8 or float8 that has one scale for each output; float32 or wider, rounded once."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return _product(x, weight_OI.to(wide) * scales_O.to(wide).unsqueeze(1), bias_O)


def make_linear_int4(spec: KernelSpec) -> Callable[..., torch.Tensor]:
    """``(x [..., I], weight [O, I / 2], scales [O, I / group], mins, bias) -> [..., O]``; float32 or wider, rounded
    once."""

    def linear_int4(
        x: torch.Tensor,
        weight: torch.Tensor,
        scales: torch.Tensor,
        mins: torch.Tensor,
        bias_O: torch.Tensor | None = None,
    ) -> torch.Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        nibbles_OI = torch.stack((weight & 15, weight >> 4), dim=-1).flatten(1)
        group = nibbles_OI.shape[1] // scales.shape[1]
        grouped = nibbles_OI.to(wide).unflatten(1, (-1, group))
        weight_OI = (grouped * scales.to(wide).unsqueeze(2) + mins.to(wide).unsqueeze(2)).flatten(1)
        return _product(x, weight_OI, bias_O)

    return linear_int4


def _product(x: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> torch.Tensor:
    bias_O = None if bias_O is None else bias_O.to(weight_OI.dtype)
    return functional.linear(x.to(weight_OI.dtype), weight_OI.detach(), bias_O).to(x.dtype)
