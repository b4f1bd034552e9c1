"""``drivetrain plan``: the bytes that a training run takes on each rank, for every partitioner side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from drivetrain.cli.console import print_json, print_table
from drivetrain.cli.options import TRAINING_KINDS, with_settings
from drivetrain.config import Settings
from drivetrain.errors import ConfigError

if TYPE_CHECKING:
    from drivetrain.assembly import Parts
    from drivetrain.contracts.partitioner import Partitioner
    from drivetrain.training.ledger import Ledger

_COLUMNS = ("partitioner", "parameters", "gradients", "optimizer", "state", "activations", "buffers", "peak")


@with_settings(kinds=TRAINING_KINDS)
def plan(
    settings: Settings,
    config_file: Annotated[
        Path | None, typer.Argument(metavar="CONFIG", help="YAML file with the run's settings.", show_default=False)
    ] = None,
    ranks: Annotated[int, typer.Option(min=1, help="Processes of the run, over all machines.")] = 1,
    length: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a sample. Default: the recipe's length.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, in bytes.")] = False,
) -> None:
    """Say what each rank of a training run takes, in MiB: parameters, gradients, optimizer, activations, buffers.

    Every partitioner is shown; the configuration's own is marked and has its options, the others their defaults.

    Example: drivetrain plan docs/examples/sft-smollm2.yaml --ranks 8
    """
    from drivetrain.assembly import resolve_parts
    from drivetrain.contracts.plugin import Purpose

    if settings.model is None:
        raise ConfigError("no model is named", hint="Give one with model: NAME in the file, or --model NAME.")
    parts = resolve_parts(settings, purpose=Purpose.TRAIN)
    ledgers = _ledgers(parts, ranks, length)
    chosen = parts.report["partitioner"].chosen.name
    if as_json:
        print_json({name: _figures(ledger) for name, ledger in ledgers.items()})
        return
    rows = [
        (f"{name} *" if name == chosen else name, *(f"{value / 2**20:.1f}" for value in _figures(ledger).values()))
        for name, ledger in ledgers.items()
    ]
    print_table(_COLUMNS, rows)


def _figures(ledger: Ledger) -> dict[str, int]:
    footprint = ledger.footprint
    return {
        "parameters": footprint.parameters,
        "gradients": footprint.gradients,
        "optimizer": footprint.optimizer,
        "state": footprint.state,
        "activations": ledger.activations,
        "buffers": footprint.buffers,
        "peak": ledger.peak,
    }


def _ledgers(parts: Parts, ranks: int, length: int | None) -> dict[str, Ledger]:
    from drivetrain.contracts.checkpoint import CheckpointPolicy
    from drivetrain.contracts.optimizer import Optimizer
    from drivetrain.training import ledger

    assert parts.checkpoint is not None
    assert parts.spec is not None
    config, dtypes = parts.checkpoint.config, parts.precision.dtypes()
    per_sample = length or int(getattr(cast(Any, parts.plugins["recipe"]).config, "length", 0)) or 1024
    tokens = per_sample * parts.settings.trainer.micro_batch
    unit = ledger.decoder_activations(config, dtypes.param)
    policy = cast(CheckpointPolicy, parts.plugins["checkpoint"])
    activations = ledger.activation_bytes(policy, unit, parts.spec.num_layers, tokens)
    return ledger.plan_ranks(
        _partitioners(parts),
        ledger.parameters_of(parts.checkpoint),
        ledger.formats_of(dtypes, cast(Optimizer, parts.plugins["optimizer"])),
        ranks,
        activations + ledger.loss_bytes(config, tokens),
    )


def _partitioners(parts: Parts) -> dict[str, Partitioner]:
    """Every installed one; the chosen one as it is configured."""
    from drivetrain.contracts.partitioner import Partitioner
    from drivetrain.registry import load

    chosen = parts.report["partitioner"].chosen.name
    found: dict[str, Partitioner] = {}
    for ref in parts.registry.candidates("partitioner"):
        plugin = load(ref)
        made = parts.plugins["partitioner"] if ref.name == chosen else plugin(plugin.Config())
        found[ref.name] = cast(Partitioner, made)
    return found
