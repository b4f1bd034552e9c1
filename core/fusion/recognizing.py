"""Telling what a module computes by what it does: a class's name says little in other people's code.

Shapes: E features; ``...`` any leading dims.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from drivetrain.contracts.kernels import OPERATIONS, KernelSpec

_NORM_SCALES = (1.0, 1e-3)
"""Inputs that a norm is tried on; small ones show what is added under the root."""


@dataclass(frozen=True)
class NormKind:
    """A norm that is ``rms_norm`` with these constants; ``is_bound`` when it is that operation already."""

    eps: float
    weight_offset: float
    is_bound: bool

    @property
    def params(self) -> dict[str, float]:
        return {"eps": self.eps, "weight_offset": self.weight_offset}


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(20)


def _like(weight: torch.Tensor, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=_generator()).to(weight.device, weight.dtype)


def _tolerance(operation: str, dtype: torch.dtype) -> tuple[float, float]:
    return OPERATIONS[operation].tolerance.get(str(dtype).removeprefix("torch."), (1e-9, 1e-9))


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


@torch.no_grad()
def _agrees(
    function: Callable[..., Any], x: torch.Tensor, wanted: torch.Tensor, tolerance: tuple[float, float]
) -> bool:
    """Whether ``function(x)`` is ``wanted``. A module that was not made for such an input may raise anything."""
    try:
        found = function(x)
    except Exception:
        return False  # it does not compute what was asked about
    if not isinstance(found, torch.Tensor) or found.shape != wanted.shape or found.dtype != wanted.dtype:
        return False
    return torch.allclose(found, wanted, rtol=tolerance[0], atol=tolerance[1] * float(wanted.abs().max()))


def is_plain_linear(module: nn.Module) -> bool:
    """Whether it is ``x @ weight.T + bias`` and nothing else."""
    if not isinstance(module, nn.Linear) or _has_hooks(module) or module.weight.is_meta:
        return False
    if type(module) is nn.Linear:
        return True
    x = _like(module.weight, 3, module.in_features)
    with torch.no_grad():
        wanted = functional.linear(x, module.weight, module.bias)
    return _agrees(module, x, wanted, _tolerance("linear", module.weight.dtype))


def norm_kind(module: nn.Module) -> NormKind | None:
    """What kind of RMS norm it is; None when it is none."""
    bound = getattr(module, "bound", None)
    if isinstance(bound, KernelSpec) and bound.operation == "rms_norm":
        return NormKind(float(bound.params["eps"]), float(bound.params.get("weight_offset", 0.0)), True)
    if any(True for _ in module.children()):
        return None
    parameters = dict(module.named_parameters())
    weight = parameters.get("weight")
    if list(parameters) != ["weight"] or weight is None or weight.dim() != 1:
        return None
    if _has_hooks(module) or weight.is_meta or not weight.is_floating_point():
        return None
    for eps in _small_numbers(module, weight.dtype):
        for offset in (0.0, 1.0):
            if _is_rms_norm(module, weight, eps, offset):
                return NormKind(eps, offset, False)
    return None


def _small_numbers(module: nn.Module, dtype: torch.dtype) -> list[float]:
    """What may be added under the root: every small number that the module holds."""
    own = [value for value in vars(module).values() if isinstance(value, float) and 0 < value < 0.1]
    return own or ([torch.finfo(dtype).eps] if dtype in (torch.float32, torch.float64) else [])


def _is_rms_norm(module: nn.Module, weight: torch.Tensor, eps: float, offset: float) -> bool:
    wide = torch.promote_types(weight.dtype, torch.float32)
    for scale in _NORM_SCALES:
        x = _like(weight, 3, weight.numel()) * scale
        with torch.no_grad():
            wanted = (functional.rms_norm(x.to(wide), weight.shape, None, eps) * (weight.to(wide) + offset)).to(x.dtype)
        if not _agrees(module, x, wanted, _tolerance("rms_norm", weight.dtype)):
            return False
    return True


def activation_of(function: Callable[..., Any], like: torch.Tensor) -> str | None:
    """``silu`` or ``gelu_tanh`` when ``function`` is that; None otherwise."""
    x = torch.linspace(-6, 6, 101).to(like.device, like.dtype)
    known = {"silu": functional.silu(x), "gelu_tanh": functional.gelu(x, approximate="tanh")}
    for name, wanted in known.items():
        if _agrees(function, x, wanted, _tolerance("silu_mul", like.dtype)):
            return name
    return None
