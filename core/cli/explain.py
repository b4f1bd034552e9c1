"""``drivetrain explain`` and ``drivetrain doctor``: what would be chosen here and why, and what is wrong here."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from drivetrain.cli.console import format_number, print_json, print_table
from drivetrain.cli.options import with_settings
from drivetrain.config import Settings, load_settings
from drivetrain.registry import CandidateReport, Outcome, Selection, SelectionReport
from drivetrain.registry.selection import AUTO

if TYPE_CHECKING:
    from drivetrain.assembly import Parts
    from drivetrain.packed.ledger import Ledger
    from drivetrain.registry.why_not import WhyNot


@with_settings("frontend")
def explain(
    settings: Settings,
    config_file: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="Configuration file.", show_default=False)
    ] = None,
    why_nots: Annotated[
        list[str] | None,
        typer.Option(
            "--why-not",
            metavar="KIND/NAME",
            help="Say also why this plugin is not used. May be given several times.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say which plugin is chosen for each kind, who asked for it, and what became of every other candidate.

    Downloads nothing: parts that depend on a model which is not here are left open.

    Example: drivetrain explain --model smollm2-135m --why-not scheduler/priority
    """
    from drivetrain.assembly import resolve_parts
    from drivetrain.registry.why_not import why_not

    parts = resolve_parts(settings, fetch=False)
    ledger = _ledger(parts)
    answers = [answer for wanted in why_nots or () for answer in why_not(wanted, parts.report, parts.registry)]
    operations = _operations(parts)
    if as_json:
        facts = parts.platform.facts()
        report = {
            **parts.report.to_dict(),
            "model": settings.model,
            "plan_digest": parts.plan.digest,
            "device": {"name": facts.device_name, "architecture": facts.architecture, **facts.details},
        }
        report["weights"] = None if ledger is None else ledger.to_dict()
        report["notes"] = list(parts.notes)
        report["operations"] = [dict(zip(("operation", "provider", "reason"), row, strict=True)) for row in operations]
        print_json({**report, "why_not": [dataclasses.asdict(answer) for answer in answers]} if why_nots else report)
        return
    print_report(parts.report)
    print()
    print_table(("operation", "served by", "why"), operations)
    print(parts.report["kernels"].measured)
    if ledger is not None:
        print()
        print_ledger(ledger)
    for text in parts.notes:
        print(f"\nnote: {text}")
    for answer in answers:
        print(f"\n{_told(answer)}")
    if settings.model is not None:
        wanted = str(settings.engine.fuse).lower()
        print(f"\nfusion {wanted}  (engine.fuse; what it did is in the selection report of a running engine)")
    print(f"\nplan {parts.plan.digest[:16]}  (drivetrain explain --json prints all of it)")


def _ledger(parts: Parts) -> Ledger | None:
    """What the weights will take; None while the model's files are not here."""
    from drivetrain.assembly import weigh_model

    if parts.checkpoint is None or parts.spec is None or "quantizer" not in parts.plugins:
        return None
    return weigh_model(parts, parts.quantizer)


def print_ledger(ledger: Ledger) -> None:
    """The layers by quantizer, and what they and everything else take."""
    rows = [
        (
            row.quantizer,
            row.rule or "",
            str(row.num_layers),
            f"{row.bits_per_weight:.2f}",
            format_number(row.num_bytes, "bytes"),
        )
        for row in ledger.rows
    ]
    rows.append(("(all else)", "", "", "", format_number(ledger.other_bytes, "bytes")))
    print_table(("linear layers", "by rule", "how many", "bits a weight", "memory"), rows)
    total, peak = format_number(ledger.total_bytes, "bytes"), format_number(ledger.peak_bytes, "bytes")
    how = "" if ledger.is_exact else "about "
    print(f"the weights take {how}{total} of memory, and {how}{peak} at most while they are made")


def _operations(parts: Parts) -> list[tuple[str, str, str]]:
    """Which provider would serve each logical operation, as far as that is known without building the model."""
    from drivetrain.binding import kernel_providers, served_operations

    selection = parts.report["kernels"]
    providers = kernel_providers(parts.registry, parts.kernels, selection)
    device_type, dtype = parts.platform.facts().device_type, parts.precision.dtypes().param
    is_auto = selection.requested == AUTO
    return list(served_operations(providers, parts.kernel_record, device_type, dtype, is_auto=is_auto))


def _told(answer: WhyNot) -> str:
    """The answer to one ``--why-not``: the verdict, and below it the reasons and the way out."""
    owner = f" ({answer.distribution} {answer.version}".rstrip() + ")" if answer.distribution else ""
    lines = [f"why not {answer.kind}/{answer.name}{owner}? {answer.verdict.value}", f"  {answer.reason}"]
    if answer.wanted or answer.offered:
        lines.append(f"  wanted: {answer.wanted or 'nothing'}; offered: {answer.offered or 'nothing'}")
    if answer.hint:
        lines.append(f"  {answer.hint}")
    return "\n".join(lines)


def print_report(report: SelectionReport) -> None:
    """The selection report as a table of choices and a list of refusals."""
    rows = [(s.kind, s.chosen.name, s.origin, s.reason) for s in report.selections]
    rows += [(kind, "(open)", "", reason) for kind, reason in report.open_kinds.items()]
    print_table(("kind", "chosen", "asked by", "why"), rows)
    passed = [
        (s.kind, candidate.name, candidate.outcome.value, _because(s, candidate))
        for s in report.selections
        for candidate in s.candidates
        if candidate.outcome is not Outcome.CHOSEN
    ]
    if passed:
        print()
        print_table(("kind", "not chosen", "outcome", "because"), passed)
    for fallback in report.fallbacks:
        print(f"\nwarning: {fallback}")


def _because(selection: Selection, candidate: CandidateReport) -> str:
    if candidate.below:
        return f"{candidate.reason}; ranks below {selection.chosen.name!r}: {candidate.below}"
    return candidate.reason


def doctor(
    config: Annotated[
        Path | None,
        typer.Option("--config", help="Examine this configuration's names too.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    time_limit: Annotated[float, typer.Option(help="Seconds that one plugin may take to load and answer.")] = 20.0,
) -> int:
    """Examine this installation: versions, devices, compilers, and every plugin in a process of its own.

    Finds, too, distributions that are shadowed, stale or half removed, and names in a configuration that match nothing.
    Exits with 1 when something is wrong.

    Example: drivetrain doctor --json
    """
    from drivetrain.cli.console import show_progress
    from drivetrain.registry.doctor import examine

    settings = load_settings(config) if config is not None else None
    with show_progress() as progress:
        report = examine(time_limit_seconds=time_limit, settings=settings, progress=progress)
    if as_json:
        print_json(report.to_dict())
    else:
        from drivetrain.cli.doctor_view import print_doctor

        print_doctor(report)
    return 1 if report.has_problems else 0
