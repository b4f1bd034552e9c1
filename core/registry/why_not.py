"""The answer to "why not X?": what became of one candidate, or what it would have said had it been asked.

The candidate is loaded and probed in the very context in which its kind was chosen.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from drivetrain.contracts.kinds import KINDS
from drivetrain.contracts.plugin import Probe
from drivetrain.errors import ConfigError, PluginError, UnknownPluginError, nearest
from drivetrain.registry.discovery import PluginRef, foreign_groups, load
from drivetrain.registry.selection import (
    CandidateReport,
    Outcome,
    Registry,
    Selection,
    SelectionReport,
    load_and_probe,
    means,
)


class Verdict(StrEnum):
    """Why a plugin is not the one that is used."""

    CHOSEN = "chosen"
    OUTRANKED = "ranks below"
    REFUSED = "refused"
    BROKEN = "broken"
    NOT_ASKED = "not asked"
    BARRED = "barred"
    NOT_INSTALLED = "not installed"
    OPEN = "left open"
    NOT_NEEDED = "not needed"


@dataclass(frozen=True)
class WhyNot:
    """The answer for one plugin.

    distribution, version: empty when it is not installed.
    reason:          the sentences that a person reads.
    code:            the probe's word for its answer; empty where it was not asked and can't be.
    wanted, offered: the probe's, for a refusal.
    hint:            how to have it chosen; empty where there is no way.
    """

    kind: str
    name: str
    distribution: str
    version: str
    verdict: Verdict
    reason: str
    code: str = ""
    wanted: str = ""
    offered: str = ""
    hint: str = ""


def why_not(wanted: str, report: SelectionReport, registry: Registry) -> tuple[WhyNot, ...]:
    """Why the plugin named ``wanted`` (``KIND/NAME`` or ``KIND/DISTRIBUTION/NAME``) is not used in ``report``.

    registry: what could be chosen when the report was made. One answer for each distribution that registers the name.
    Raises ConfigError for a malformed name, UnknownPluginError for an unknown kind.
    """
    kind, _, name = wanted.partition("/")
    if not kind or not name:
        raise ConfigError("not a plugin's name", found=wanted, allowed="KIND/NAME, such as attention/sdpa")
    if kind not in KINDS:
        close = nearest(kind, KINDS)
        raise UnknownPluginError(
            f"no kind of plugin is named {kind!r}", allowed=KINDS, hint=f"Did you mean {close!r}?" if close else None
        )
    answers = [_barred(ref) for ref in registry.barred_candidates(kind) if means(name, ref)]
    answers += [_installed(ref, report, registry) for ref in registry.candidates(kind) if means(name, ref)]
    return tuple(answers) or (_absent(kind, name, registry),)


def _barred(ref: PluginRef) -> WhyNot:
    # Not even loaded to be asked: what plugins.allow leaves out must not run.
    return _answer(
        ref,
        Verdict.BARRED,
        f"it is installed, but plugins.allow does not name {ref.distribution}",
        hint=f"Add {ref.distribution} to plugins.allow.",
    )


def _installed(ref: PluginRef, report: SelectionReport, registry: Registry) -> WhyNot:
    kind = KINDS[ref.kind]
    selection = next((s for s in report.selections if s.kind == ref.kind), None)
    if selection is None:
        if ref.kind in report.open_kinds:
            return _answer(ref, Verdict.OPEN, f"the kind is left open, since {report.open_kinds[ref.kind]}")
        return _answer(
            ref, Verdict.NOT_NEEDED, f"nothing here needs a {ref.kind}; it is for: {', '.join(kind.purposes)}"
        )
    candidate = next(
        (c for c in selection.candidates if (c.distribution, c.name) == (ref.distribution, ref.name)), None
    )
    if candidate is None or candidate.outcome is Outcome.NOT_ASKED:
        return _not_asked(ref, selection, load_and_probe(ref, report.contexts[ref.kind]), registry)
    return _reported(ref, selection, candidate, registry)


def _reported(ref: PluginRef, selection: Selection, candidate: CandidateReport, registry: Registry) -> WhyNot:
    """The answer of a candidate that was asked when the choice was made."""
    chosen = selection.chosen.name
    if candidate.outcome is Outcome.CHOSEN:
        return _answer(ref, Verdict.CHOSEN, f"it is the one that is used: {selection.reason}", code=candidate.code)
    if candidate.outcome is Outcome.ELIGIBLE:
        return _answer(
            ref,
            Verdict.OUTRANKED,
            f"it could work here ({candidate.reason}), but ranks below {chosen!r}: {candidate.below}",
            code=candidate.code,
            hint=_how_to_ask(ref, registry),
        )
    if candidate.outcome is Outcome.BROKEN:
        return _answer(ref, Verdict.BROKEN, candidate.reason, code=candidate.code, hint=_how_to_look(ref))
    return _answer(
        ref,
        Verdict.REFUSED,
        f"its probe says no: {candidate.reason}",
        code=candidate.code,
        wanted=candidate.wanted,
        offered=candidate.offered,
    )


def _not_asked(ref: PluginRef, selection: Selection, probe: Probe, registry: Registry) -> WhyNot:
    why = f"nothing else was asked, since {selection.reason}"
    if probe.ok:
        said, hint = f"asked now, it says yes: {probe.reason}", _how_to_ask(ref, registry)
    elif probe.code == "broken":
        said, hint = f"and it is broken: {probe.reason}", _how_to_look(ref)
    else:
        said, hint = f"asked now, it says no: {probe.reason}", ""
    return _answer(
        ref,
        Verdict.NOT_ASKED,
        f"{why}; {said}",
        code=probe.code,
        wanted=probe.wanted,
        offered=probe.offered,
        hint=hint,
    )


def _absent(kind: str, name: str, registry: Registry) -> WhyNot:
    """No installed plugin has this name; one for another version of the contract may."""
    short = name.rpartition("/")[2]
    for group in foreign_groups():
        if group.group.startswith(f"drivetrain.{kind}.") and short in group.names:
            reason = f"{group.distribution} registers it in {group.group}: {group.reason}"
            return WhyNot(kind, name, group.distribution, "", Verdict.REFUSED, reason, hint=group.hint)
    known = sorted({ref.name for ref in registry.candidates(kind)})
    close = nearest(short, known)
    hint = f"Did you mean {close!r}?" if close else "Install the distribution that registers it."
    reason = f"no installed distribution registers it; there are: {', '.join(known) or 'none'}"
    return WhyNot(kind, name, "", "", Verdict.NOT_INSTALLED, reason, hint=hint)


def _how_to_ask(ref: PluginRef, registry: Registry) -> str:
    is_unique = sum(other.name == ref.name for other in registry.candidates(ref.kind)) == 1
    return f"To use it: --{KINDS[ref.kind].key} {ref.name if is_unique else ref.qualified}"


def _how_to_look(ref: PluginRef) -> str:
    """What the error itself advises, such as an upgrade; else the command that shows it whole."""
    try:
        load(ref)
    except PluginError as error:
        if error.hint:
            return error.hint
    return f"Run: drivetrain plugins info {ref.kind}/{ref.qualified} --debug"


def _answer(ref: PluginRef, verdict: Verdict, reason: str, **more: str) -> WhyNot:
    return WhyNot(ref.kind, ref.name, ref.distribution, ref.version, verdict, reason, **more)
