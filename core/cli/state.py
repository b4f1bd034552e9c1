"""``drivetrain state``: what a run has saved: a list, a check of every byte, an export to safetensors."""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from drivetrain.errors import StoreError

if TYPE_CHECKING:
    from drivetrain.contracts.store import Store

app = typer.Typer(help="Look at what a run has saved.", no_args_is_help=True, rich_markup_mode=None)

Folder = Annotated[Path, typer.Argument(help="Folder of saved states: store.folder of the run.", show_default=False)]
Step = Annotated[int | None, typer.Option(help="Step of the state. Default: the newest.", show_default=False)]
StoreName = Annotated[str, typer.Option("--store", help="The store that has written it.")]


@app.command("list")
def list_states(folder: Folder, store: StoreName = "dcp") -> None:
    """List the complete states of a run.

    Example: drivetrain state list runs/ship-clerk/state
    """
    opened = _opened(store, folder)
    for step in opened.steps():
        metadata = opened.metadata(step)
        tensors = opened.tensors(step)
        print(f"step {step}: {len(tensors)} tensors, {metadata.get('samples', '?')} samples were trained on")


@app.command("check")
def check(folder: Folder, step: Step = None, store: StoreName = "dcp") -> None:
    """Read every byte of a state and compare it with its checksum.

    Example: drivetrain state check runs/ship-clerk/state
    """
    from drivetrain.training.saved import check_state, chosen_step

    opened = _opened(store, folder)
    found = chosen_step(opened, step)
    print(f"step {found}: {check_state(opened, found)} bytes are those that were saved")


@app.command("export")
def export(
    folder: Folder,
    output: Annotated[Path, typer.Argument(help="The safetensors file to write.", show_default=False)],
    step: Step = None,
    match: Annotated[str, typer.Option(help="Only tensors whose names match, such as 'model.*'.")] = "*",
    store: StoreName = "dcp",
) -> None:
    """Write the tensors of a state to one safetensors file, with its metadata.

    Example: drivetrain state export runs/ship-clerk/state weights.safetensors --match 'model.*'
    """
    from drivetrain.training.saved import chosen_step, export_state

    opened = _opened(store, folder)
    found = chosen_step(opened, step)
    count = export_state(opened, found, output, lambda name: fnmatch.fnmatchcase(name, match))
    print(f"{output}: {count} tensors of step {found}")


def _opened(name: str, folder: Path) -> Store:
    from drivetrain.registry import Registry, load

    if not folder.is_dir():
        raise StoreError("there is no such folder", where=str(folder))
    plugin = load(Registry().find("store", name))
    return cast("Store", plugin(plugin.Config.model_validate({"folder": str(folder)})))
