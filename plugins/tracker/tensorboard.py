"""Figures as TensorBoard reads them."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

from pydantic import Field

from drivetrain.contracts.plugin import PluginConfig, Probe, ProbeContext
from drivetrain.contracts.tracker import RunInfo, Tracker, TrackerConfig
from drivetrain.errors import MissingDependencyError, TrackerError


class TensorboardTracker(Tracker):
    """Writes event files in the run's folder: tensorboard --logdir RUN/tensorboard shows them."""

    class Config(TrackerConfig):
        folder: str = Field("tensorboard", description="where the event files lie, below the run's folder")

    config: Config

    def __init__(self, config: PluginConfig) -> None:
        super().__init__(config)
        self._writer: Any = None

    @classmethod
    def probe(cls, context: ProbeContext) -> Probe:
        if importlib.util.find_spec("tensorboard") is None:
            return Probe.no(
                "missing_dependency",
                'the package tensorboard is not installed; run: pip install "drivetrain[tensorboard]"',
                wanted="tensorboard",
                offered="nothing",
            )
        return Probe.yes("tensorboard is installed")

    def start(self, run: RunInfo) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingDependencyError(
                "tensorboard", needed_by="the tracker 'tensorboard'", extra="tensorboard"
            ) from error
        folder = run.folder / self.config.folder
        try:
            # What an interrupted process told of later steps is not shown any more.
            self._writer = SummaryWriter(str(folder), purge_step=run.first_step + 1)
        except OSError as error:
            raise TrackerError(f"events can't be written: {error.strerror or error}", where=str(folder)) from error

    def record(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def note(self, text: str) -> None:
        self._writer.add_text("notes", text)

    def finish(self, outcome: str) -> None:
        if self._writer is not None:
            self._writer.close()
