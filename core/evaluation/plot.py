"""The plot of quality against bytes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from drivetrain.errors import ConfigError, MissingDependencyError

if TYPE_CHECKING:
    from drivetrain.evaluation.perplexity import Comparison, Quality

_MIB = 2**20
_LEAST_KL = 1e-7
"""Drawn for a model that predicts exactly as the float32 one does: the axis is logarithmic."""


def check_plot(path: Path) -> None:
    """Raise, before anything is computed, when no picture can be drawn to ``path``."""
    if path.suffix.lower() != ".png":
        raise ConfigError("the plot is a PNG", where="--plot", found=path.name, allowed="a name that ends in .png")
    if not path.parent.is_dir():
        raise ConfigError("the folder is not there", where="--plot", found=str(path.parent))
    _library()


def _library() -> Any:
    try:
        from matplotlib import figure
    except ImportError as error:
        raise MissingDependencyError("matplotlib", needed_by="the plot of quality", extra="plot") from error
    return figure


def draw_plot(comparison: Comparison, path: Path) -> None:
    """Write the comparison as a PNG: perplexity and KL divergence over bytes, a point for each quantizer."""
    figure = _library().Figure(figsize=(11, 4.6), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_perplexity(left, comparison)
    _draw_divergence(right, comparison)
    figure.suptitle(
        f"{comparison.model}: {comparison.num_tokens} tokens predicted, windows of {comparison.context}", fontsize=11
    )
    figure.savefig(path)


def _draw_perplexity(axes: Any, comparison: Comparison) -> None:
    axes.axhline(comparison.reference.perplexity, color="0.5", linewidth=1, linestyle="--", zorder=1)
    rows = (comparison.reference, *comparison.rows)
    _draw_points(axes, rows, [row.perplexity for row in rows])
    axes.set_ylabel("perplexity (lower is better)")
    axes.set_title("dashed: the float32 model", fontsize=9, color="0.35")


def _draw_divergence(axes: Any, comparison: Comparison) -> None:
    rows = comparison.rows
    _draw_points(axes, rows, [max(_LEAST_KL, row.kl_divergence) for row in rows])
    axes.set_yscale("log")
    axes.set_ylabel("KL divergence to the float32 model, nats")
    axes.set_title("zero is not on this scale", fontsize=9, color="0.35")


def _draw_points(axes: Any, rows: tuple[Quality, ...], heights: list[float]) -> None:
    """Points over MiB, each with its name beside it, above and below by turns so that neighbours don't meet."""
    order = sorted(range(len(rows)), key=lambda index: (rows[index].num_bytes, heights[index]))
    for place, index in enumerate(order):
        row, height = rows[index], heights[index]
        point = axes.plot(row.num_bytes / _MIB, height, "o", markersize=7, zorder=3)[0]
        axes.annotate(
            row.name,
            (row.num_bytes / _MIB, height),
            xytext=(7, 7 if place % 2 else -13),
            textcoords="offset points",
            fontsize=8,
            color=point.get_color(),
        )
    axes.set_xlabel("size of the weights, MiB")
    axes.margins(x=0.22, y=0.15)
    axes.grid(True, color="0.9")
