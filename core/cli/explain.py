"""``drivetrain explain`` and ``drivetrain doctor``: what would be chosen here and why, and what is wrong here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from drivetrain.cli.console import print_json, print_table
from drivetrain.cli.options import with_settings
from drivetrain.config import Settings
from drivetrain.registry import Outcome, SelectionReport


@with_settings("frontend")
def explain(
    settings: Settings,
    config_file: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="Configuration file.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say which plugin is chosen for each kind, who asked for it, and what became of every other candidate.

    Downloads nothing: parts that depend on a model which is not here are left open.

    Example: drivetrain explain --model smollm2-135m
    """
    from drivetrain.assembly import resolve_parts

    parts = resolve_parts(settings, fetch=False)
    if as_json:
        print_json({**parts.report.to_dict(), "model": settings.model, "plan_digest": parts.plan.digest})
        return
    print_report(parts.report)
    print(f"\nplan {parts.plan.digest[:16]}  (drivetrain explain --json prints all of it)")


def print_report(report: SelectionReport) -> None:
    """The selection report as a table of choices and a list of refusals."""
    rows = [(s.kind, s.chosen.name, s.origin, s.reason) for s in report.selections]
    rows += [(kind, "(open)", "", reason) for kind, reason in report.open_kinds.items()]
    print_table(("kind", "chosen", "asked by", "why"), rows)
    passed = [
        (s.kind, candidate.name, candidate.outcome.value, candidate.reason)
        for s in report.selections
        for candidate in s.candidates
        if candidate.outcome is not Outcome.CHOSEN
    ]
    if passed:
        print()
        print_table(("kind", "not chosen", "outcome", "because"), passed)
    for fallback in report.fallbacks:
        print(f"\nwarning: {fallback}")


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    time_limit: Annotated[float, typer.Option(help="Seconds that one plugin may take to load and answer.")] = 20.0,
) -> int:
    """Examine this installation: versions, devices, compilers, and every plugin in a process of its own.

    Exits with 1 when something is wrong.

    Example: drivetrain doctor --json
    """
    from drivetrain.cli.console import show_progress
    from drivetrain.registry.doctor import examine

    with show_progress() as progress:
        report = examine(time_limit_seconds=time_limit, progress=progress)
    if as_json:
        print_json(report.to_dict())
    else:
        from drivetrain.cli.doctor_view import print_doctor

        print_doctor(report)
    return 1 if report.has_problems else 0
