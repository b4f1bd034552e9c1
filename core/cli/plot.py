"""``drivetrain plot``: draws what a run's tracker has written."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def plot(
    run: Annotated[Path, typer.Argument(help="Folder of a run, or a figures.jsonl.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="PNG file. Default: figures.png in the folder.")
    ] = None,
) -> None:
    """Draw loss, learning rate, gradient norm, throughput and memory of a run to a PNG.

    Example: drivetrain plot run
    """
    from drivetrain.training.plotting import draw, read_figures

    file = run / "figures.jsonl" if run.is_dir() else run
    print(draw(read_figures(file), output or file.with_name("figures.png"), title=str(file.parent.name)))
