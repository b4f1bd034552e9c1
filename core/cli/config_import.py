"""``drivetrain config import``: another program's configuration as ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from drivetrain.cli.console import note

app = typer.Typer(no_args_is_help=True, help="Configuration files of other programs.")


@app.callback()
def config() -> None:
    """Configuration files of other programs."""


@app.command(name="import")
def import_(
    file: Annotated[Path, typer.Argument(metavar="DS_CONFIG", help="DeepSpeed configuration.", show_default=False)],
) -> None:
    """Print a DeepSpeed configuration (JSON) as settings of ours, and say what became of each of its keys.

    What has no counterpart is an error that names it.

    Example: drivetrain config import ds_config.json
    """
    import yaml

    from drivetrain.config import load_settings
    from drivetrain.config.deepspeed import read_deepspeed

    imported = read_deepspeed(file)
    load_settings(imported=imported.settings)
    for key, value, ours in imported.mapped:
        note(f"{key} = {json.dumps(value)}  ->  {ours}")
    for key in imported.left_out:
        note(f"{key}: left out, it changes no result here")
    print(yaml.safe_dump(imported.settings, sort_keys=False), end="")
