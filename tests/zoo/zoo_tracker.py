"""Trackers with one fault each, and the test of the kit that must catch it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from drivetrain.contracts.plugin import Plugin, PluginConfig
from drivetrain.contracts.tracker import RunInfo
from drivetrain.errors import TrackerError
from drivetrain.plugins.tracker.jsonl import FILE, JsonlTracker


class KnowsItsFigures(JsonlTracker):
    """Takes the figures that it knows, and falls over the others."""

    def record(self, step: int, figures: Mapping[str, float]) -> None:
        super().record(step, {name: figures[name] for name in ("loss", "lr", "memory_bytes")})


class WritesWhereItStands(JsonlTracker):
    """Writes to the folder that the process stands in."""

    def start(self, run: RunInfo) -> None:
        super().start(RunInfo(Path.cwd(), run.steps, run.first_step, run.plan))


class RefusesToGoOn(JsonlTracker):
    """Takes a file that is there for another run's."""

    def start(self, run: RunInfo) -> None:
        if (run.folder / FILE).exists():
            raise TrackerError("there is a file already", where=str(run.folder))
        super().start(run)


class OpensTooEarly(JsonlTracker):
    """Makes its file when it is created."""

    def __init__(self, config: PluginConfig) -> None:
        super().__init__(config)
        Path(FILE).touch()


ZOO: dict[type[Plugin], str] = {
    KnowsItsFigures: "test_any_figure_is_taken",
    WritesWhereItStands: "test_it_writes_in_the_runs_folder_alone",
    RefusesToGoOn: "test_an_interrupted_run_goes_on",
    OpensTooEarly: "test_making_one_writes_nothing",
}
"""Faulty tracker -> the test that must fail for it."""
