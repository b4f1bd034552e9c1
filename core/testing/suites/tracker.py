"""What every tracker has to do: take whatever figures come, and stay in the run's folder."""

from __future__ import annotations

import math
from pathlib import Path
from typing import cast

import pytest

from drivetrain.contracts.plugin import ProbeContext
from drivetrain.contracts.tracker import RunInfo, Tracker
from drivetrain.testing.suite import Suite

FIGURES = {"loss": 2.5, "lr": 1e-4, "grad_norm": 0.25, "tokens_per_second": 1234.5, "memory_bytes": 2.0**30}


class TrackerSuite(Suite):
    """A run is recorded, interrupted and gone on with."""

    kind = "tracker"

    def started(self, folder: Path, first_step: int = 0) -> Tracker:
        self.require_probe(ProbeContext())
        folder.mkdir(parents=True, exist_ok=True)
        tracker = cast(Tracker, self.make())
        tracker.start(RunInfo(folder, 10, first_step, {"model": "tiny"}))
        return tracker

    def test_a_run_is_recorded(self, tmp_path: Path) -> None:
        """Start, some steps, a note, the end."""
        tracker = self.started(tmp_path / "run")
        for step in (1, 2, 3):
            tracker.record(step, FIGURES)
        tracker.note("a line was left out")
        tracker.finish("done")

    def test_any_figure_is_taken(self, tmp_path: Path) -> None:
        """Figures that it has never heard of, and values that are not finite."""
        tracker = self.started(tmp_path / "run")
        tracker.record(1, {"surely_unknown": 1.0, "loss": math.nan, "grad_norm": math.inf, "lr": 0.0})
        tracker.record(2, {})
        tracker.finish("the gradients are not finite")

    def test_an_interrupted_run_goes_on(self, tmp_path: Path) -> None:
        """A second process begins after a step that the first one had passed, with the first one's files there."""
        tracker = self.started(tmp_path / "run")
        for step in (1, 2, 3):
            tracker.record(step, FIGURES)
        tracker.finish("killed")
        again = self.started(tmp_path / "run", first_step=2)
        again.record(3, FIGURES)
        again.finish("done")

    def test_it_writes_in_the_runs_folder_alone(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Neither beside the folder nor where the process stands."""
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        tracker = self.started(tmp_path / "run")
        tracker.record(1, FIGURES)
        tracker.finish("done")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "run"]
        assert not list((tmp_path / "elsewhere").iterdir())

    def test_making_one_writes_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Nothing is opened before the run starts, and a run that never started has no end."""
        monkeypatch.chdir(tmp_path)
        self.make()
        assert not list(tmp_path.iterdir())

    def test_every_and_also_are_its_options(self) -> None:
        """How often it is told, and which trackers are told beside it, are options of every tracker."""
        tracker = cast(Tracker, self.make(every=5, also=["console"]))
        assert (tracker.config.every, tracker.config.also) == (5, ("console",))
