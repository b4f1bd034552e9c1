"""The trackers of a run: the chosen one and those beside it, on rank 0 alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from drivetrain.assembly import Parts
from drivetrain.contracts.tracker import RunInfo, Tracker
from drivetrain.errors import ConfigError, PluginRefusedError, TrackerError
from drivetrain.registry import load
from drivetrain.registry.selection import probe_safely
from drivetrain.training.ranks import Ranks
from drivetrain.training.run import StepResult

PLAN_FILE = "plan.json"


class Trackers:
    """Tells each of them what it wants to know."""

    def __init__(self, parts: Parts, folder: Path, ranks: Ranks) -> None:
        """Raises PluginError for a tracker beside the chosen one that is not there or refuses, and ConfigError for one
        that is named twice."""
        self._parts = parts
        self._folder = folder.expanduser().absolute()
        chosen = cast(Tracker, parts.plugins["tracker"])
        _check_once([parts.report.chosen_names["tracker"], *chosen.config.also])
        self._trackers = [chosen, *(self._beside(name) for name in chosen.config.also)] if ranks.is_first else []
        self._started: list[Tracker] = []

    def _beside(self, name: str) -> Tracker:
        plugin = load(self._parts.registry.find("tracker", name))
        probe = probe_safely(plugin, self._parts.context)
        if not probe.ok:
            raise PluginRefusedError(
                f"tracker {name!r} refuses: {probe.reason}", where="tracker.also", found=probe.code
            )
        return cast(Tracker, plugin(plugin.Config()))

    def start(self, steps: int, first_step: int) -> None:
        """Raises TrackerError."""
        if not self._trackers:
            return
        plan = self._parts.plan.to_json()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / PLAN_FILE).write_text(plan + "\n", encoding="utf-8")
        except OSError as error:
            raise TrackerError(
                f"the folder of the run can't be written: {error.strerror or error}", where=str(self._folder)
            ) from error
        info = RunInfo(self._folder, steps, first_step, json.loads(plan))
        for tracker in self._trackers:
            tracker.start(info)
            self._started.append(tracker)

    def record(self, result: StepResult, *, is_last: bool) -> None:
        for tracker in self._started:
            if is_last or result.step % tracker.config.every == 0:
                tracker.record(result.step, result.figures)

    def finish(self, outcome: str) -> None:
        for tracker in self._started:
            tracker.finish(outcome)


def _check_once(names: Sequence[str]) -> None:
    """Two of one name would write to the same place, each step twice."""
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError("this tracker is named twice", where="tracker.also", found=twice)
