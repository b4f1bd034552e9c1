"""Contract of a tracker: where the figures of a training run go."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field

from drivetrain.contracts.plugin import Plugin, PluginConfig


class TrackerConfig(PluginConfig):
    """Options that every tracker has."""

    every: int = Field(1, ge=1, description="steps from one record to the next; the last step is always recorded")
    also: tuple[str, ...] = Field((), description="further trackers by name, with their default options")


@dataclass(frozen=True)
class RunInfo:
    """What a tracker is told of a run.

    folder:     of the run; a tracker writes below it.
    steps:      that the run will make in all.
    first_step: steps that were made before, in an earlier process: 0 in a new run.
    plan:       the resolved choices, as JSON can hold them.
    """

    folder: Path
    steps: int
    first_step: int = 0
    plan: Mapping[str, Any] = field(default_factory=dict)


class Tracker(Plugin):
    """Receives figures. One process of a run has trackers: rank 0.

    Figures are numbers by name: ``loss``, ``lr``, ``grad_norm`` (before clipping), ``tokens_per_second`` (all ranks),
    ``step_seconds``, ``memory_bytes`` (peak of rank 0), ``tokens`` and ``samples`` (seen so far), ``epoch``,
    ``loss_scale`` (float16 only), ``skipped`` (1 for a step whose gradients overflowed). More may come.
    """

    kind = "tracker"

    Config = TrackerConfig
    config: TrackerConfig

    @abstractmethod
    def start(self, run: RunInfo) -> None:
        """The run begins, or goes on. What an interrupted process recorded of later steps than ``first_step`` is void:
        those steps are made again. Raises TrackerError when there is no place to write."""

    @abstractmethod
    def record(self, step: int, figures: Mapping[str, float]) -> None:
        """A step was made; steps count from 1. Called for every step that :attr:`TrackerConfig.every` asks for."""

    def note(self, text: str) -> None:
        """A sentence about the run."""

    def finish(self, outcome: str) -> None:
        """The run is over: ``"done"``, or in a few words what ended it. Called once, after ``start`` only."""
