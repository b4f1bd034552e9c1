"""How the learning rate goes over a run: a function of the step alone, so that nothing of it needs saving."""

from __future__ import annotations

import math
from dataclasses import dataclass

from drivetrain.contracts.optimizer import ScheduleConfig
from drivetrain.errors import ConfigError


@dataclass(frozen=True)
class Schedule:
    """The factor on every group's own rate. Raises ConfigError when the phases do not fit into the run.

    steps: of the whole run.
    """

    config: ScheduleConfig
    steps: int

    def __post_init__(self) -> None:
        if self.warmup + self.decay > self.steps:
            raise ConfigError(
                "warm-up and decay together are longer than the run",
                where="optimizer.schedule",
                found=f"{self.warmup} + {self.decay} steps",
                allowed=f"{self.steps} steps in all",
            )

    @property
    def warmup(self) -> int:
        return _steps(self.config.warmup, self.steps)

    @property
    def decay(self) -> int:
        """Steps of the fall at the end of ``wsd``; the other curves have no such phase."""
        return _steps(self.config.decay, self.steps) if self.config.name == "wsd" else 0

    def factor(self, step: int) -> float:
        """For the step after ``step`` steps were made: step 0 is the first. Beyond the run, that of the last step."""
        step = min(step, self.steps - 1)
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        if self.config.name == "constant":
            return 1.0
        first = self.steps - self.decay if self.config.name == "wsd" else self.warmup
        # 0 at the first step of the fall's curve, 1 at the run's last.
        progress = max(0, step - first) / max(1, self.steps - 1 - first)
        if self.config.name == "wsd":
            progress = max(0, step - first + 1) / max(1, self.decay)
        fall = (1 + math.cos(math.pi * progress)) / 2 if self.config.name == "cosine" else 1 - progress
        return self.config.floor + (1 - self.config.floor) * fall


def _steps(value: float, total: int) -> int:
    return round(value * total) if isinstance(value, float) and value < 1 else round(value)
