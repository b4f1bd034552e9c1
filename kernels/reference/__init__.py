"""The reference kernels: every logical operation in plain torch, the meaning that others are tested against."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch.nn import functional

from drivetrain.contracts.kernels import OPERATIONS, KernelProvider, KernelSpec
from drivetrain.contracts.plugin import Probe, ProbeContext, Tier
from drivetrain.errors import ConfigError, nearest
from drivetrain.kernels.reference.decoder import decoder_layers
from drivetrain.kernels.reference.pointwise import (
    gelu_tanh_mul,
    make_add_rms_norm,
    make_rms_norm,
    rope,
    rope_write,
    silu_mul,
)
from drivetrain.kernels.reference.products import (
    make_decoded,
    make_gated_linear,
    make_linear_cross_entropy,
    make_rounded,
)
from drivetrain.kernels.reference.sampling import sample

_MAKERS: Mapping[str, Callable[[KernelSpec], Callable[..., Any]]] = {
    "rms_norm": make_rms_norm,
    "rope": lambda spec: rope,
    "silu_mul": lambda spec: silu_mul,
    "gelu_tanh_mul": lambda spec: gelu_tanh_mul,
    "linear": lambda spec: functional.linear,
    "add_rms_norm": make_add_rms_norm,
    "rope_write": lambda spec: rope_write,
    "gated_linear": make_gated_linear,
    "linear_cross_entropy": make_linear_cross_entropy,
    "sample": lambda spec: sample,
    "linear_int8": make_decoded,
    "linear_int4": make_decoded,
    "linear_int4_a8": make_rounded,
    "linear_fp8": make_decoded,
    "linear_int3": make_decoded,
    "linear_w8a8": make_rounded,
    "linear_fp8a8": make_rounded,
    "linear_gguf": make_decoded,
    "linear_gguf_a8": make_rounded,
    "decoder_layers": lambda spec: decoder_layers,
}


class ReferenceKernels(KernelProvider):
    """Plain torch for every operation, on any device and dtype: the meaning all other providers are held to."""

    contract_version = "1.2"
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
