"""The reference kernels: every logical operation in plain torch, the meaning that other providers are tested against.

Shapes: ``...`` any leading dims; E features; T tokens; H heads (query or key); D head size; R rotary dims; I, O
features of a linear layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn import functional

from drivetrain.contracts.kernels import OPERATIONS, KernelProvider, KernelSpec
from drivetrain.contracts.plugin import Probe, ProbeContext, Tier
from drivetrain.errors import ConfigError, nearest


def make_rms_norm(spec: KernelSpec) -> Callable[..., torch.Tensor]:
    """``(x [..., E], weight [E]) -> [..., E]``; computed in float32 or wider and rounded once. Source: Zhang & Sennrich
    2019, "Root Mean Square Layer Normalization", equation 4."""
    eps = float(spec.params.get("eps", 1e-6))
    offset = float(spec.params.get("weight_offset", 0.0))

    def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, weight.shape, weight, eps)

    def rms_norm_with_offset(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        # Weight and offset are added in float32: 1 + weight would lose the weight's low bits in bfloat16.
        wide = torch.promote_types(x.dtype, torch.float32)
        return (functional.rms_norm(x.to(wide), weight.shape, None, eps) * (weight.to(wide) + offset)).to(x.dtype)

    return rms_norm_with_offset if offset else rms_norm


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


def rope(
    q_THD: torch.Tensor, k_THD: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate the first R dims of queries and keys in the wider of their own and the angles' dtype, and return them in
    their own. Source: Su et al. 2021, "RoFormer", equation 34, with dims i and i + R/2 as the pair."""
    rotary_size = cos_TR.shape[-1]
    cos, sin = cos_TR.unsqueeze(1), sin_TR.unsqueeze(1)
    if rotary_size == q_THD.shape[-1]:
        return _rotate(q_THD, cos, sin), _rotate(k_THD, cos, sin)
    q, k = (torch.cat((_rotate(x[..., :rotary_size], cos, sin), x[..., rotary_size:]), dim=-1) for x in (q_THD, k_THD))
    return q, k


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up``. Source: Shazeer 2020, "GLU Variants Improve Transformer", equation 5 (SwiGLU)."""
    return functional.silu(gate) * up


def gelu_tanh_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """``gelu(gate) * up`` with the tanh approximation of Hendrycks & Gimpel 2016, section 2."""
    return functional.gelu(gate, approximate="tanh") * up


_MAKERS: Mapping[str, Callable[[KernelSpec], Callable[..., Any]]] = {
    "rms_norm": make_rms_norm,
    "rope": lambda spec: rope,
    "silu_mul": lambda spec: silu_mul,
    "gelu_tanh_mul": lambda spec: gelu_tanh_mul,
    "linear": lambda spec: functional.linear,
}


class ReferenceKernels(KernelProvider):
    """Plain torch for every operation, on any device and dtype: the meaning all other providers are held to."""

    tier = Tier.REFERENCE

    @classmethod
    def probe(cls, context: ProbeContext) -> Probe:
        return Probe.yes("plain torch runs on every device and dtype")

    def operations(self) -> frozenset[str]:
        return frozenset(_MAKERS)

    def supports(self, spec: KernelSpec) -> Probe:
        if spec.operation in _MAKERS:
            return Probe.yes("plain torch runs on every device and dtype")
        return Probe.no(
            "unknown_operation",
            f"the reference has no operation {spec.operation!r}",
            wanted=spec.operation,
            offered=", ".join(sorted(OPERATIONS)),
        )

    def make(self, spec: KernelSpec) -> Callable[..., Any]:
        if spec.operation not in _MAKERS:
            near = nearest(spec.operation, OPERATIONS)
            raise ConfigError(
                "no such logical operation",
                where="kernels/reference",
                found=spec.operation,
                allowed=sorted(OPERATIONS),
                hint=f"Did you mean {near!r}?" if near else None,
            )
        return _MAKERS[spec.operation](spec)
