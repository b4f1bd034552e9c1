"""The Triton kernels, for NVIDIA and AMD GPUs. Triton itself is imported when the first kernel is made."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from drivetrain.contracts.kernels import OPERATIONS, KernelProvider, KernelSpec
from drivetrain.contracts.plugin import PluginConfig, Probe, ProbeContext, Tier
from drivetrain.errors import ConfigError, nearest
from drivetrain.kernels.triton.availability import DTYPES, is_interpreted, probe, runs_on
from drivetrain.kernels.triton.tuning import DEFAULT_FOLDER

if TYPE_CHECKING:
    from drivetrain.kernels.triton.tuning import Tuner

_DTYPES = ", ".join(DTYPES)
_OPERATIONS = frozenset(name for name, it in OPERATIONS.items() if not it.takes_modules)
_MAX_FEATURES = 32768
"""A row lies in the registers of one program."""

_GROUP_SIZES = (32, 64, 128, 256)
"""Inputs that may share a scale in int4 and int3: a group is one step of the sum, and a product takes 16 at least."""

_ROUNDED_BLOCK = 32
"""Inputs that activations of int4_a8 are rounded together, and so the least that may share a scale of the weights."""

_MAX_INTEGER_INPUTS = (2**31 - 1) // (127 * 128)
"""Products of int8 that an int32 can always sum."""


class TritonConfig(PluginConfig):
    """Settings of the Triton kernels."""

    tune: bool = Field(
        True,
        description="Time block sizes once for each shape on a GPU and keep the fastest; no takes a default.",
    )
    record: Path = Field(
        DEFAULT_FOLDER, description="Folder of the files that keep what was fastest, one for each device."
    )
    loss_chunk_mib: int = Field(
        256, ge=1, description="MiB that logits may take at a time in linear_cross_entropy; 128 rows at least."
    )


def _refused_shape(spec: KernelSpec) -> Probe | None:
    """Why these sizes or parameters are not covered; None when they are."""
    if spec.operation in ("rms_norm", "add_rms_norm") and spec.sizes.get("E", 0) > _MAX_FEATURES:
        reason = f"a row of more than {_MAX_FEATURES} features does not fit into one program"
        wanted, offered = str(spec.sizes["E"]), str(_MAX_FEATURES)
        return Probe.no("unsupported_shape", reason, wanted=wanted, offered=offered)
    group = spec.params.get("group", 0.0)
    if spec.operation in ("linear_int4", "linear_int3") and group not in _GROUP_SIZES:
        offered = ", ".join(map(str, _GROUP_SIZES))
        return Probe.no("unsupported_shape", "takes groups of a few sizes only", wanted=f"{group:g}", offered=offered)
    if spec.operation == "linear_int4_a8" and (group < _ROUNDED_BLOCK or group % _ROUNDED_BLOCK):
        reason, offered = "takes groups of whole blocks of activations", f"multiples of {_ROUNDED_BLOCK}"
        return Probe.no("unsupported_shape", reason, wanted=f"{group:g}", offered=offered)
    if spec.operation == "linear_w8a8" and spec.sizes.get("I", 0) > _MAX_INTEGER_INPUTS:
        reason, wanted = "sums of so many products may not fit into 32 bits", str(spec.sizes["I"])
        return Probe.no("unsupported_shape", reason, wanted=wanted, offered=str(_MAX_INTEGER_INPUTS))
    if spec.operation in ("linear_gguf", "linear_gguf_a8"):
        return _refused_blocks(spec)
    if spec.operation == "gated_linear" and spec.params.get("activation", 0.0) not in (0, 1):
        wanted = f"{spec.params['activation']:g}"
        return Probe.no("unknown_activation", "has silu and gelu only", wanted=wanted, offered="0, 1")
    return None


def _refused_blocks(spec: KernelSpec) -> Probe | None:
    from drivetrain.packed.gguf import BLOCK_TYPES

    number, inputs = spec.params.get("type", 0), spec.sizes.get("I", 0)
    if number not in BLOCK_TYPES:
        offered = ", ".join(map(str, BLOCK_TYPES))
        return Probe.no("unsupported_type", "no such GGUF blocks", wanted=f"type {number:g}", offered=offered)
    kind = BLOCK_TYPES[int(number)]
    if inputs % kind.size:
        reason, offered = f"rows of {kind.name} are whole blocks", f"multiples of {kind.size}"
        return Probe.no("unsupported_shape", reason, wanted=str(inputs), offered=offered)
    return None


@functools.lru_cache(maxsize=8)
def tuner_of(folder: Path, tune: bool) -> Tuner:
    """One for all kernels of a process that keep their record in the same folder."""
    import torch
    import triton

    from drivetrain.kernels.triton.tuning import Tuner, TuningRecord, time_on_gpu

    if is_interpreted() or not tune:
        return Tuner()
    return Tuner(TuningRecord(folder, torch.cuda.get_device_name(), triton.__version__), time_on_gpu)


class TritonKernels(KernelProvider):
    """Kernels in Triton for NVIDIA and AMD GPUs, tuned once on each machine."""

    contract_version = "1.2"
    tier = Tier.TUNED
    Config = TritonConfig
    config: TritonConfig

    @classmethod
    def probe(cls, context: ProbeContext) -> Probe:
        return probe(context)

    @classmethod
    def abilities(cls) -> frozenset[str]:
        return frozenset({"operators"})

    def operations(self) -> frozenset[str]:
        return _OPERATIONS

    def supports(self, spec: KernelSpec) -> Probe:
        if spec.operation not in _OPERATIONS:
            offered = ", ".join(sorted(_OPERATIONS))
            return Probe.no("unknown_operation", f"has no {spec.operation}", wanted=spec.operation, offered=offered)
        if spec.dtype not in DTYPES:
            return Probe.no("unsupported_dtype", f"computes in {_DTYPES}", wanted=spec.dtype, offered=_DTYPES)
        return _refused_shape(spec) or runs_on(spec.device_type)

    def make(self, spec: KernelSpec) -> Callable[..., Any]:
        if spec.operation not in _OPERATIONS:
            near = nearest(spec.operation, _OPERATIONS)
            raise ConfigError(
                "the Triton kernels have no such operation",
                where="kernels/triton",
                found=spec.operation,
                allowed=sorted(_OPERATIONS),
                hint=f"Did you mean {near!r}?" if near else None,
            )
        return self._makers()[spec.operation](spec)

    def _makers(self) -> Mapping[str, Callable[[KernelSpec], Callable[..., Any]]]:
        from drivetrain.kernels.triton import (
            activations,
            cross_entropy,
            gguf,
            norms,
            products,
            rotary,
            rounded_products,
            sampling,
        )

        tuner = tuner_of(self.config.record, self.config.tune)
        chunk_bytes = self.config.loss_chunk_mib << 20
        return {
            "rms_norm": lambda spec: norms.make_rms_norm(spec, tuner),
            "add_rms_norm": lambda spec: norms.make_add_rms_norm(spec, tuner),
            "silu_mul": lambda spec: activations.make_gated_activation(spec, tuner),
            "gelu_tanh_mul": lambda spec: activations.make_gated_activation(spec, tuner),
            "rope": lambda spec: rotary.make_rope(spec, tuner),
            "rope_write": lambda spec: rotary.make_rope_write(spec, tuner),
            "linear": lambda spec: products.make_linear(spec, tuner),
            "gated_linear": lambda spec: products.make_gated_linear(spec, tuner),
            "linear_cross_entropy": lambda spec: cross_entropy.make_linear_cross_entropy(spec, chunk_bytes),
            "linear_int8": lambda spec: products.make_linear_by_row(spec, tuner),
            "linear_int4": lambda spec: products.make_linear_by_group(spec, tuner),
            "linear_int4_a8": lambda spec: rounded_products.make_rounded(spec, tuner),
            "linear_fp8": lambda spec: products.make_linear_by_row(spec, tuner),
            "linear_int3": lambda spec: products.make_linear_by_group(spec, tuner),
            "linear_w8a8": lambda spec: rounded_products.make_rounded(spec, tuner),
            "linear_fp8a8": lambda spec: rounded_products.make_rounded(spec, tuner),
            "linear_gguf": lambda spec: gguf.make_linear_gguf(spec, tuner),
            "linear_gguf_a8": lambda spec: gguf.make_linear_gguf(spec, tuner),
            "sample": sampling.make_sample,
        }
