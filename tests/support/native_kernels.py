"""A small kernel provider as a third party would write one: a C++ source, a plain callable, and a torch operator."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import Field

from drivetrain.contracts.kernels import KernelProvider, KernelSpec
from drivetrain.contracts.plugin import PluginConfig, Probe, ProbeContext, Tier
from drivetrain.contracts.source import Progress, silent
from drivetrain.errors import ConfigError
from drivetrain.native import SourceBuild, probe_compiler
from drivetrain.operators import Operator, define, visible

BUILD = SourceBuild("native-norm", (Path(__file__).with_name("native_norm.cpp"),), flags=("-ffast-math",))

_POINTER, _COUNT, _REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double


def dense(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as C++ reads it: float32 without gaps. Raises ConfigError for another dtype."""
    if tensor.dtype is not torch.float32:
        raise ConfigError("bound for float32", where="kernels/native-norm", found=str(tensor.dtype), allowed="float32")
    return tensor.contiguous()


class Norm:
    """The functions of the library, called with tensors."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._forward, self._backward = library.norm_forward, library.norm_backward
        self._forward.argtypes = [_POINTER] * 3 + [_COUNT] * 2 + [_REAL]
        self._backward.argtypes = [_POINTER] * 5 + [_COUNT] * 2 + [_REAL]
        self._forward.restype = self._backward.restype = None

    def forward(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        x, weight = dense(x), dense(weight)
        out, size = torch.empty_like(x), weight.numel()
        self._forward(x.data_ptr(), weight.data_ptr(), out.data_ptr(), x.numel() // size, size, eps)
        return out

    def backward(
        self, grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        grad, x, weight = dense(grad), dense(x), dense(weight)
        grad_x, size = torch.empty_like(x), weight.numel()
        grad_weight = torch.zeros(size, dtype=torch.float64)
        pointers = [tensor.data_ptr() for tensor in (grad, x, weight, grad_x, grad_weight)]
        self._backward(*pointers, x.numel() // size, size, eps)
        return grad_x, grad_weight.float()

    def operator(self) -> torch._ops.OpOverload:
        """The norm as torch sees it. Its backward is an operator too, since torch.compile traces what calls it."""
        backward = define(
            "native_norm::rms_norm_backward",
            "(Tensor grad, Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
            self.backward,
            fake=lambda grad, x, weight, eps: (x.new_empty(x.shape), weight.new_empty(weight.shape)),
        )

        def save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
            x, weight, ctx.eps = inputs
            ctx.save_for_backward(x, weight)

        def gradients(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
            return (*backward(grad, *ctx.saved_tensors, ctx.eps), None)

        return define(
            "native_norm::rms_norm",
            "(Tensor x, Tensor weight, float eps) -> Tensor",
            self.forward,
            fake=lambda x, weight, eps: x.new_empty(x.shape),
            save=save,
            backward=gradients,
        )


class NativeNorm(KernelProvider):
    """RMS norm in C++, for float32 on the CPU."""

    contract_version = "1.1"
    tier = Tier.TUNED

    class Config(PluginConfig):
        compiler: str | None = Field(None, description="C++ compiler, by name or path; null looks on PATH")

    config: Config
    _norm: Norm | None = None

    @classmethod
    def probe(cls, context: ProbeContext) -> Probe:
        return probe_compiler()

    @classmethod
    def abilities(cls) -> frozenset[str]:
        return frozenset({"deterministic", "batch_invariant", "operators"})

    def operations(self) -> frozenset[str]:
        return frozenset({"rms_norm"})

    def supports(self, spec: KernelSpec) -> Probe:
        if spec.operation not in self.operations():
            return Probe.no("unknown_operation", f"has no {spec.operation}", wanted=spec.operation, offered="rms_norm")
        if (spec.device_type, spec.dtype) != ("cpu", "float32"):
            found = f"{spec.dtype} on {spec.device_type}"
            return Probe.no("unsupported_dtype", "float32 on the CPU only", wanted=found, offered="float32 on cpu")
        if spec.params.get("weight_offset"):
            return Probe.no("unsupported_offset", "the weight is taken as it is", wanted="an offset", offered="none")
        return Probe.yes()

    def build_ahead(self, progress: Progress) -> None:
        self._norm = Norm(BUILD.library(compiler=self.config.compiler, progress=progress))

    def make(self, spec: KernelSpec) -> Callable[..., Any]:
        if not self.supports(spec).ok:
            raise ConfigError("not covered", where="kernels/native-norm", found=str(spec))
        if self._norm is None:
            self.build_ahead(silent)
        norm, eps = cast(Norm, self._norm), float(spec.params.get("eps", 1e-6))

        def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return norm.forward(x, weight, eps)

        return visible(rms_norm, Operator(norm.operator(), (eps,)))


class WithoutCompiler(NativeNorm):
    """The same, on a machine whose compiler is not the one that it was set up with."""

    def build_ahead(self, progress: Progress) -> None:
        BUILD.library(compiler="no-such-compiler", progress=progress)
