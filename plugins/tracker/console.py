"""Figures as lines on standard output."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field

from drivetrain.contracts.tracker import RunInfo, Tracker, TrackerConfig

_UNITS = {"memory_bytes": (2**20, "MiB memory"), "tokens_per_second": (1, "tokens/s")}


class ConsoleTracker(Tracker):
    """Prints a line a step on standard output."""

    class Config(TrackerConfig):
        figures: tuple[str, ...] = Field(
            ("loss", "lr", "grad_norm", "tokens_per_second", "memory_bytes", "loss_scale"),
            description="what is printed of each step, in this order, where the run has it",
        )

    config: Config
    _steps = 0

    def start(self, run: RunInfo) -> None:
        self._steps = run.steps

    def record(self, step: int, figures: Mapping[str, float]) -> None:
        shown = [_text(name, figures[name]) for name in self.config.figures if name in figures]
        print(f"step {step}/{self._steps}: {', '.join(shown)}", flush=True)

    def note(self, text: str) -> None:
        print(text, flush=True)


def _text(name: str, value: float) -> str:
    scale, unit = _UNITS.get(name, (1, ""))
    return f"{value / scale:.0f} {unit}" if unit else f"{name} {value:.5g}"
