"""The dynamic loss scale: as large as gradients allow without overflowing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from drivetrain.contracts.precision import LossScaling
from drivetrain.errors import NonFiniteError


@dataclass
class LossScale:
    """The scale of a run and how long it has held. Every rank's goes the same way, since all see the same norm."""

    config: LossScaling
    value: float = 0.0
    good_steps: int = 0

    def __post_init__(self) -> None:
        self.value = self.value or self.config.initial

    def held(self) -> None:
        """A step was made without an overflow."""
        self.good_steps += 1
        if self.good_steps >= self.config.growth_steps:
            self.value, self.good_steps = self.value * self.config.factor, 0

    def overflowed(self) -> None:
        """Gradients were not finite, and the step is skipped. Raises NonFiniteError when it is not the scale's fault:
        no scale is small enough."""
        self.value, self.good_steps = self.value / self.config.factor, 0
        if self.value < self.config.minimum:
            raise NonFiniteError(
                "gradients overflow although the loss scale has been lowered to its minimum",
                where="loss scale",
                found=self.value,
                allowed=f"at least {self.config.minimum:g}",
                hint="Lower the learning rate, or use bf16, which has the range of float32.",
            )

    def to_dict(self) -> dict[str, Any]:
        return {"value": self.value, "good_steps": self.good_steps}

    def restore(self, saved: dict[str, Any]) -> None:
        """Take over what :meth:`to_dict` gave. Raises ValueError for anything else."""
        value, steps = float(saved["value"]), int(saved["good_steps"])
        if not math.isfinite(value) or value <= 0:
            raise ValueError(f"a loss scale of {value} makes no sense")
        self.value, self.good_steps = value, steps
