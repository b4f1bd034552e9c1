"""What the operators of these kernels have in common: devices and names.

An operator finds what it works with by its name: the record that its blocks are kept in, the dtype that it was bound
for, and what else tells one use from another. A name means the same in every process: torch keeps compiled graphs.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from drivetrain import operators
from drivetrain.contracts.kernels import KernelSpec
from drivetrain.kernels.triton.launch import INTERPRETED
from drivetrain.kernels.triton.tuning import Tuner

NAMESPACE = "drivetrain_triton"
"""Of the operators that have no blocks to choose."""

DEVICE_TYPES = ("cpu",) if INTERPRETED else ("cuda",)
"""torch device types of the tensors that kernels take; ROCm's is ``cuda`` too."""


def name_of(spec: KernelSpec, tuner: Tuner, *params: str) -> str:
    """The qualified name of the operator of a use. params: of the spec, that are part of it."""
    values = (f"{name}_{spec.params[name]:g}" for name in params)
    return f"{NAMESPACE}_{tuner.name}::" + re.sub(r"\W", "_", "_".join((spec.operation, *values, spec.dtype)))


def define(*arguments: Any, **parts: Any) -> torch._ops.OpOverload:
    """:func:`drivetrain.operators.define` for the devices that kernels run on."""
    return operators.define(*arguments, **parts, device_types=DEVICE_TYPES)
