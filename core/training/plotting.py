"""Draws the figures of a run."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Sequence
from pathlib import Path

from drivetrain.errors import MissingDependencyError, TrackerError

PANELS = (
    ("loss", "loss", 1.0),
    ("lr", "learning rate", 1.0),
    ("grad_norm", "gradient norm", 1.0),
    ("tokens_per_second", "tokens per second", 1.0),
    ("memory_bytes", "peak memory, MiB", 2.0**20),
    ("loss_scale", "loss scale", 1.0),
)
"""Figure, what it is called, and its unit."""


def read_figures(path: Path) -> list[dict[str, float]]:
    """The lines that the tracker ``jsonl`` has written; one that was cut short at the end is left out. Raises
    TrackerError for anything else, and for a file without a step."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TrackerError(
            f"the figures can't be read: {error}", where=str(path), hint="Give the folder of a run with tracker jsonl."
        ) from error
    figures: list[dict[str, float]] = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            known = {name: math.nan if value is None else float(value) for name, value in row.items()}
            figures.append(known | {"step": float(row["step"])})
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            if number == len(lines):
                break
            raise TrackerError(f"the line tells of no step: {error!r}", where=f"{path}:{number}") from error
    if not figures:
        raise TrackerError("the run has made no step yet", where=str(path))
    return figures


def draw(figures: Sequence[dict[str, float]], output: Path, *, title: str) -> Path:
    """One panel for each figure that the run has; returns the file. Raises MissingDependencyError, TrackerError."""
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingDependencyError("matplotlib", needed_by="drivetrain plot", extra="plot")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [panel for panel in PANELS if any(panel[0] in row for row in figures)]
    rows = math.ceil(len(panels) / 2)
    canvas = FigureCanvasAgg(Figure(figsize=(11, 3.2 * rows), layout="constrained"))
    canvas.figure.suptitle(title)
    for index, (name, label, unit) in enumerate(panels, 1):
        axes = canvas.figure.add_subplot(rows, 2, index)
        known = [row for row in figures if name in row]
        axes.plot([row["step"] for row in known], [row[name] / unit for row in known], linewidth=1.2)
        axes.set_xlabel("step")
        axes.set_title(label, fontsize=10)
        axes.grid(alpha=0.3)
    try:
        canvas.print_png(str(output))
    except OSError as error:
        raise TrackerError(f"the picture can't be written: {error.strerror or error}", where=str(output)) from error
    return output
