"""``drivetrain quantize``: a model's weights packed and written, with or without calibration."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from drivetrain.cli.console import format_number, note, show_progress
from drivetrain.cli.evaluate import ModelArgument
from drivetrain.cli.options import parse_part, with_lossy, with_settings
from drivetrain.config import Settings
from drivetrain.config.settings import parse_bytes
from drivetrain.errors import ConfigError

if TYPE_CHECKING:
    from drivetrain.calibration.plan import CalibrationPlan


@with_settings(leave_out=("model", "quantizer", "scheduler"))
def quantize(
    settings: Settings,
    out: Annotated[Path, typer.Option(help="Folder to write, new or empty.", metavar="DIR", show_default=False)],
    model_name: ModelArgument = None,
    quantizer: Annotated[
        str | None,
        typer.Option(help="What packs the weights.", metavar="NAME[:OPTION=VALUE,...]", show_default=False),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Text to calibrate on, in UTF-8.", metavar="FILE", show_default=False),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens to calibrate on. Default: 16384.", show_default=False)
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens of a window. Default: 512, or what the model sees.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(help="Draws the windows of the text.")] = 0,
    memory: Annotated[
        str | None,
        typer.Option(
            help="Most memory to take beside what the process has, such as 2GiB. Default: no bound.",
            metavar="BYTES",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that did not end.")] = False,
    allow_lossy: Annotated[
        bool, typer.Option("--allow-lossy", help="Quantize weights that are quantized in the files already.")
    ] = False,
) -> None:
    """Pack a model's weights, layer by layer, and write a folder that Drivetrain, transformers and vLLM open.

    Example: drivetrain quantize smollm2-135m --quantizer awq --data topics.txt --out smollm2-awq --allow-lossy
    """
    from drivetrain.calibration import QuantizeOptions, quantize_model

    options = QuantizeOptions(out, data, tokens, context, seed, _bytes(memory), resume)
    request = parse_part("quantizer", quantizer) if quantizer else settings.parts.get("quantizer")
    parts = settings.parts if request is None else {**settings.parts, "quantizer": with_lossy(request, allow_lossy)}
    with show_progress() as progress:
        quantize_model(replace(settings, parts=parts), options, progress=progress, planned=_tell)
    print(out)


def _bytes(text: str | None) -> int | None:
    if text is None:
        return None
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise ConfigError(str(error), where="--memory") from error


def _tell(plan: CalibrationPlan) -> None:
    """What the run takes, before it begins."""
    text = f"note: takes at most {format_number(plan.memory_bytes, 'bytes')} of memory beside the program itself"
    if plan.disk_bytes:
        text += f", and {format_number(plan.disk_bytes, 'bytes')} on the disk while it runs"
    note(text)
