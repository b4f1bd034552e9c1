"""Figures as lines of JSON, one a step."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from drivetrain.contracts.plugin import PluginConfig
from drivetrain.contracts.tracker import RunInfo, Tracker
from drivetrain.errors import TrackerError

FILE = "figures.jsonl"


class JsonlTracker(Tracker):
    """Writes figures.jsonl in the run's folder, a line a step; drivetrain plot draws it."""

    def __init__(self, config: PluginConfig) -> None:
        super().__init__(config)
        self._file: TextIO | None = None
        self._path = Path()

    def start(self, run: RunInfo) -> None:
        """Lines of steps that will be made again are taken out, and one that was cut short."""
        self._path = run.folder / FILE
        with _writing(self._path):
            kept = [line for line in _lines(self._path) if (_step(line) or run.first_step + 1) <= run.first_step]
            unfinished = self._path.with_suffix(".unfinished")
            unfinished.write_text("".join(kept), encoding="utf-8")
            os.replace(unfinished, self._path)
            self._file = self._path.open("a", encoding="utf-8")

    def record(self, step: int, figures: Mapping[str, float]) -> None:
        assert self._file is not None
        # JSON has no word for a norm that overflowed.
        told = {name: value if math.isfinite(value) else None for name, value in figures.items()}
        with _writing(self._path):
            self._file.write(json.dumps({"step": step, **told}, allow_nan=False) + "\n")
            self._file.flush()

    def finish(self, outcome: str) -> None:
        if self._file is not None:
            with _writing(self._path):
                self._file.close()


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if path.exists() else []


def _step(line: str) -> int | None:
    """The step that a line tells of; None when it is no whole line of ours."""
    try:
        step = json.loads(line)["step"] if line.endswith("\n") else None
    except (ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) else None


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TrackerError(f"figures can't be written: {error.strerror or error}", where=str(path)) from error
