"""The CPU kernels: C++ with a plain C interface, compiled on first use for the vector instructions that are there."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from drivetrain.contracts.kernels import KernelProvider, KernelSpec
from drivetrain.contracts.plugin import PluginConfig, Probe, ProbeContext, Tier
from drivetrain.contracts.source import Progress
from drivetrain.errors import ConfigError
from drivetrain.native import probe_compiler

if TYPE_CHECKING:
    Maker = Callable[[KernelSpec, ctypes.CDLL], Callable[..., Any]]

_DTYPES = ("float32", "bfloat16")
_HALF = frozenset({"rope_write", "linear_cross_entropy"})
"""Operations that take float16 too."""


def _make_linear_cross_entropy(spec: KernelSpec, library: ctypes.CDLL) -> Callable[..., Any]:
    from drivetrain.kernels.cpu.cross_entropy import make_linear_cross_entropy  # serving does without

    return make_linear_cross_entropy(spec, library)


@functools.cache
def _makers() -> Mapping[str, Maker]:
    from drivetrain.kernels.cpu import operations, packed, rotary
    from drivetrain.kernels.cpu.decoder import CoarseDecoder

    return {
        "rms_norm": operations.make_rms_norm,
        "add_rms_norm": operations.make_add_rms_norm,
        "rope": operations.make_rope,
        "rope_write": rotary.make_rope_write,
        "silu_mul": operations.make_gated,
        "gelu_tanh_mul": operations.make_gated,
        "linear": operations.make_linear,
        "gated_linear": operations.make_gated_linear,
        "linear_cross_entropy": _make_linear_cross_entropy,
        "sample": operations.make_sample,
        "decoder_layers": CoarseDecoder,
        **dict.fromkeys(packed.PACKED, packed.make_packed),
    }


class CpuKernels(KernelProvider):
    """C++ for AMX, AVX-512, AVX2 and NEON, compiled on first use; float32 and bfloat16, whole steps in one call."""

    contract_version = "1.2"
    tier = Tier.TUNED

    class Config(PluginConfig):
        instructions: Literal["auto", "amx", "avx512", "avx2", "dotprod", "baseline"] = Field(
            "auto", description="instructions to compile for; auto takes the best that the processor has"
        )

    config: Config

    @classmethod
    def probe(cls, context: ProbeContext) -> Probe:
        if context.platform is not None and context.platform.device_type != "cpu":
            return Probe.no(
                "other_device", "it computes on the CPU only", wanted="cpu", offered=context.platform.device_type
            )
        if context.dtype is not None and context.dtype not in _DTYPES:
            return Probe.no(
                "unsupported_dtype", "no kernels for this dtype", wanted=", ".join(_DTYPES), offered=context.dtype
            )
        return probe_compiler()

    @classmethod
    def abilities(cls) -> frozenset[str]:
        return frozenset({"deterministic", "operators"})

    @functools.cached_property
    def _compiler(self) -> Probe:
        """Looked for once, not once for each use in a model."""
        return probe_compiler()

    def operations(self) -> frozenset[str]:
        return frozenset(_makers())

    def supports(self, spec: KernelSpec) -> Probe:
        if spec.operation not in _makers():
            offered = ", ".join(sorted(_makers()))
            return Probe.no("unknown_operation", f"has no {spec.operation}", wanted=spec.operation, offered=offered)
        if spec.device_type != "cpu":
            return Probe.no("other_device", "computes on the CPU only", wanted=spec.device_type, offered="cpu")
        known = (*_DTYPES, "float16") if spec.operation in _HALF else _DTYPES
        if spec.dtype not in known:
            return Probe.no("unsupported_dtype", "no kernel", wanted=spec.dtype, offered=", ".join(known))
        from drivetrain.kernels.cpu.packed import refused_shape

        return refused_shape(spec) or self._compiler

    def build_ahead(self, progress: Progress) -> None:
        """Have the C++ compiled. Raises KernelBuildError."""
        from drivetrain.kernels.cpu.library import open_library

        open_library(self.config.instructions, progress)

    def make(self, spec: KernelSpec) -> Callable[..., Any]:
        probe = self.supports(spec)
        if not probe.ok:
            raise ConfigError(
                f"{spec.operation} can't be made: {probe.reason}",
                where="kernels/cpu",
                found=probe.wanted,
                allowed=probe.offered,
            )
        from drivetrain.kernels.cpu.library import open_library

        return _makers()[spec.operation](spec, open_library(self.config.instructions))
