"""Whether Triton can run here, told without importing it."""

from __future__ import annotations

import importlib.util
import os
import sys

from drivetrain.contracts.plugin import Probe, ProbeContext

DTYPES = ("float32", "bfloat16", "float16")
"""What the kernels take; sums are always float32."""

_INSTALL = 'pip install "drivetrain[triton]"'


def is_interpreted() -> bool:
    """Whether Triton's interpreter is on, as Triton itself decides it when it is imported."""
    if "triton" in sys.modules:
        return bool(sys.modules["triton"].knobs.runtime.interpret)
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "y", "yes", "on", "true")


def runs_on(device_type: str) -> Probe:
    """Whether kernels run on tensors of this device."""
    if is_interpreted():
        if device_type == "cpu":
            return Probe.yes("Triton's interpreter runs on the CPU")
        return Probe.no(
            "no_device", "Triton's interpreter takes tensors of the CPU only", wanted="cpu", offered=device_type
        )
    if device_type == "cuda":
        return Probe.yes("Triton compiles for this device")
    return Probe.no("no_device", "Triton compiles for NVIDIA and AMD GPUs", wanted="cuda", offered=device_type)


def probe(context: ProbeContext) -> Probe:
    """Package, device and dtype."""
    if importlib.util.find_spec("triton") is None:
        return Probe.no(
            "missing_dependency", f"the package triton is not installed; run: {_INSTALL}", wanted="triton>=3.6"
        )
    if context.dtype is not None and context.dtype not in DTYPES:
        return Probe.no(
            "unsupported_dtype",
            f"the kernels compute in {', '.join(DTYPES)}",
            wanted=context.dtype,
            offered=", ".join(DTYPES),
        )
    if context.platform is None:
        return Probe.yes("Triton is installed")
    return runs_on(context.platform.device_type)
