"""``drivetrain eval``: how well a model predicts text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from drivetrain.cli.console import format_number, note, print_json, print_table, show_progress
from drivetrain.cli.options import parse_part, with_lossy, with_settings
from drivetrain.config import Settings

if TYPE_CHECKING:
    from drivetrain.evaluation import Comparison

ModelArgument = Annotated[
    str | None,
    typer.Argument(help="Name of the weights, unless --config has it.", metavar="MODEL", show_default=False),
]

app = typer.Typer(help="Measure how well a model predicts text.", no_args_is_help=True, rich_markup_mode=None)


@app.command("perplexity")
@with_settings(leave_out=("model", "quantizer", "scheduler"))
def perplexity(
    settings: Settings,
    data: Annotated[Path, typer.Option(help="Text file to predict, in UTF-8.", metavar="FILE", show_default=False)],
    model_name: ModelArgument = None,
    quantizer: Annotated[
        list[str] | None,
        typer.Option(
            help="Quantizer to measure: NAME, or NAME:OPTION=VALUE,... May be given several times.",
            metavar="NAME[:OPTION=VALUE,...]",
            show_default=False,
        ),
    ] = None,
    packed: Annotated[
        list[str] | None,
        typer.Option(
            help="Folder that drivetrain quantize made of the model, to measure too. May be given several times.",
            metavar="DIR",
            show_default=False,
        ),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=2, help="Tokens of the text. Default: 8192, or all.", show_default=False)
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            min=2, help="Tokens that are read in one go. Default: 1024, or what the model sees.", show_default=False
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw quality against bytes to FILE, a PNG.", metavar="FILE", show_default=False),
    ] = None,
    allow_lossy: Annotated[
        bool, typer.Option("--allow-lossy", help="Quantize weights that are quantized in the files already.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Perplexity, and distance from the float32 model, of a model with each of some quantizers.

    Example: drivetrain eval perplexity smollm2-135m --quantizer int8 --data text.txt --plot quality.png
    """
    requests = [with_lossy(parse_part("quantizer", text), allow_lossy) for text in quantizer or ()]
    if not requests and "quantizer" in settings.parts:  # of the configuration file
        requests = [settings.parts["quantizer"]]
    if plot is not None:
        from drivetrain.evaluation.plot import check_plot

        check_plot(plot)
    from drivetrain.evaluation import compare_quantizers

    with show_progress() as progress:
        found = compare_quantizers(
            settings,
            requests,
            data,
            packed=packed or (),
            num_tokens=tokens,
            context=context,
            progress=progress,
        )
    if plot is not None:
        from drivetrain.evaluation.plot import draw_plot

        draw_plot(found, plot)
    if as_json:
        print_json(found.to_dict())
    else:
        _show(found)


def _show(found: Comparison) -> None:
    columns = ["quantizer", "bits/weight", "bytes", "perplexity", "change", "KL (nats)", "top-1", "tok/s"]
    rows = [
        (
            row.name,
            f"{row.bits_per_weight:.2f}",
            format_number(row.num_bytes, "bytes"),
            f"{row.perplexity:.4f}",
            "" if row is found.reference else f"{found.change(row):+.2%}",
            "" if row is found.reference else f"{row.kl_divergence:.3g}",
            "" if row is found.reference else f"{row.top1_agreement:.2%}",
            f"{row.tokens_per_second:.0f}",
        )
        for row in (found.reference, *found.rows)
    ]
    print_table(columns, rows)
    note(f"note: {found.num_tokens} tokens predicted, in windows of {found.context}")
    if found.stored_bits is not None:
        note(
            f"note: the files hold {found.stored_bits:.1f} bits a weight; float32 is the model of what these stand for"
        )
