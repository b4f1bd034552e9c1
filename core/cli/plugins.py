"""``drivetrain plugins``: what is installed, what each plugin says of itself, and whether it keeps its contract."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from drivetrain.cli.console import note, print_json, print_table, show_progress
from drivetrain.cli.lock import lock
from drivetrain.contracts.kinds import KINDS
from drivetrain.errors import ConfigError, UnknownPluginError, nearest
from drivetrain.registry import PluginRef, discover, load, summary_of

if TYPE_CHECKING:
    from drivetrain.contracts.plugin import Plugin, ProbeContext
    from drivetrain.testing.run import Report

app = typer.Typer(help="List, describe and test plugins.", no_args_is_help=True, rich_markup_mode=None)
app.command("lock")(lock)


@app.command("list")
def list_plugins(
    kind: Annotated[str | None, typer.Option(help="Only this kind, for example attention.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the installed plugins. Reads metadata only: no plugin is imported.

    Example: drivetrain plugins list --kind attention
    """
    if kind is not None:
        _check_kind(kind)
    refs = discover(kind)
    rows = [(ref.kind, ref.name, ref.version, ref.distribution, summary_of(ref)) for ref in refs]
    columns = ("kind", "name", "version", "distribution", "summary")
    if as_json:
        print_json(
            [dict(zip(columns, row, strict=True)) | {"target": ref.target} for row, ref in zip(rows, refs, strict=True)]
        )
    else:
        print_table(columns, rows)


@app.command("info")
def info(
    name: Annotated[str, typer.Argument(help="KIND/NAME or KIND/DISTRIBUTION/NAME.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Describe one plugin: contract, options, abilities, and whether it could be chosen here.

    Example: drivetrain plugins info attention/sdpa
    """
    kind, plugin_name = _split(name)
    from drivetrain.registry import Registry

    ref = Registry().find(kind, plugin_name)
    plugin = load(ref)
    facts = _describe(ref, plugin)
    if as_json:
        print_json(facts)
        return
    for key in (
        "kind",
        "name",
        "summary",
        "distribution",
        "version",
        "target",
        "contract",
        "tier",
        "abilities",
        "here",
    ):
        print(f"{key + ':':<14}{facts[key]}")
    print("options:" if facts["options"] else "options:      none")
    for option in facts["options"]:
        print(f"  {option['name']}: {option['type']} = {option['default']}    {option['description']}")


@app.command("new")
def new(
    kind: Annotated[str, typer.Argument(help="What sort of plugin, for example attention.", show_default=False)],
    name: Annotated[str, typer.Argument(help="What users will call it.", show_default=False)],
    folder: Annotated[
        Path | None, typer.Option(help="Folder to make. Default: the distribution's name.", show_default=False)
    ] = None,
    package: Annotated[
        str | None, typer.Option(help="Import name. Default: drivetrain_KIND_NAME.", show_default=False)
    ] = None,
) -> None:
    """Write the package of a new plugin: a class that works, its tests, README and CI.

    Example: drivetrain plugins new scheduler shortest
    """
    from drivetrain.cli.scaffold import Scaffold

    scaffold = Scaffold(kind, name, package)
    target = folder or Path(scaffold.distribution)
    for path in scaffold.write(target):
        print(path)
    note(f'Next: cd {target} && pip install -e ".[test]" && pytest')


@app.command("test")
def run_suite(
    name: Annotated[
        str, typer.Argument(help="KIND/NAME, KIND/DISTRIBUTION/NAME or KIND/MODULE:CLASS.", show_default=False)
    ],
    options: Annotated[
        list[str] | None, typer.Option(help="An option of the plugin, as NAME=VALUE. Repeatable.", show_default=False)
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(help="A suite of your own in place of the kind's, as MODULE:CLASS.", show_default=False),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Run this test, and no other. Repeatable.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Put one plugin through the conformance suite of its kind. Exits 1 when a test fails.

    Example: drivetrain plugins test precision/bf16
    """
    from drivetrain.registry import Registry
    from drivetrain.testing.run import Target, run_suites

    kind, plugin_name = _split(name)
    if ":" not in plugin_name:
        Registry().find(kind, plugin_name)
    target = Target(suite or kind, plugin_name, _parse_options(options or []), tuple(only or ()))
    with show_progress() as progress:
        report = run_suites([target], progress=progress)
    if as_json:
        print_json(report.to_dict())
    else:
        _print_report(report)
    if report.failures:
        raise typer.Exit(1)


def _parse_options(assignments: list[str]) -> dict[str, Any]:
    """``a.b=c`` as a table in a table; values are read as YAML, as those of --set are."""
    from drivetrain.config.loading import parse_assignment

    options: dict[str, Any] = {}
    for assignment in assignments:
        path, value = parse_assignment(assignment)
        table = options
        for key in path[:-1]:
            table = table.setdefault(key, {})
            if not isinstance(table, dict):
                raise ConfigError("an option is given both a value and options of its own", found=assignment)
        table[path[-1]] = value
    return options


def _print_report(report: Report) -> None:
    shown = {"not_run": "NOT RUN"}
    rows = [(r.test, shown.get(r.outcome, r.outcome.value), r.rule, r.message) for r in report.results]
    print_table(("test", "outcome", "rule", "reason"), rows)
    times = [str(r.properties["import_time"]) for r in report.results if "import_time" in r.properties]
    counts = report.counts
    told = f"{counts['passed']} passed, {len(report.failures)} failed, {counts['skipped']} skipped"
    told += f"; {counts['not_run']} NOT RUN" if counts["not_run"] else ""
    note(f"{told}; {report.seconds:.0f} s" + (f"; import {times[0]}" if times else ""))


def _split(name: str) -> tuple[str, str]:
    """Kind and plugin of ``KIND/NAME``. Raises ConfigError, or UnknownPluginError for a kind that does not exist."""
    kind, slash, plugin_name = name.partition("/")
    if not slash or not plugin_name:
        raise ConfigError("not a plugin's name", found=name, allowed="KIND/NAME, such as attention/sdpa")
    _check_kind(kind)
    return kind, plugin_name


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        close = nearest(kind, KINDS)
        raise UnknownPluginError(
            f"no kind of plugin is named {kind!r}", allowed=KINDS, hint=f"Did you mean {close!r}?" if close else None
        )


def _describe(ref: PluginRef, plugin: type[Plugin]) -> dict[str, Any]:
    from drivetrain.registry.selection import probe_safely

    probe = probe_safely(plugin, _context_for(ref.kind))
    return {
        "kind": ref.kind,
        "name": ref.name,
        "summary": summary_of(ref),
        "distribution": ref.distribution,
        "version": ref.version,
        "target": ref.target,
        "contract": f"{ref.kind} {plugin.contract_version}",
        "tier": plugin.tier.name.lower(),
        "abilities": ", ".join(sorted(plugin.abilities())) or "none claimed",
        "here": f"{'yes' if probe.ok else 'no'}: {probe.reason}",
        "options": _options(plugin),
        "schema": plugin.Config.model_json_schema(),
    }


def _context_for(kind: str) -> ProbeContext:
    """What a run on this machine would have chosen before it comes to ``kind``, as far as no model is needed."""
    from drivetrain.assembly import resolve_parts
    from drivetrain.config import Settings
    from drivetrain.contracts.plugin import ProbeContext, Purpose

    purpose = Purpose.SERVE if "serve" in KINDS[kind].purposes else Purpose.TRAIN
    if kind in ("platform",):
        return ProbeContext(purpose=purpose)
    before = list(KINDS)[: list(KINDS).index(kind)]
    parts = resolve_parts(Settings(), purpose=purpose, fetch=False, leave_out=[k for k in KINDS if k not in before])
    precision = parts.plugins.get("precision")
    dtype = parts.precision.dtypes().param if precision else None
    return ProbeContext(purpose=purpose, platform=parts.platform.facts(), dtype=dtype, chosen=parts.report.chosen_names)


def _options(plugin: type[Plugin]) -> list[dict[str, Any]]:
    options = []
    for name, field in plugin.Config.model_fields.items():
        annotation = field.annotation
        type_name = annotation.__name__ if isinstance(annotation, type) else str(annotation)
        default = "required" if field.is_required() else field.get_default(call_default_factory=True)
        options.append({"name": name, "type": type_name, "default": default, "description": field.description or ""})
    return options
