"""From a requested name to one plugin, with the reason: who was asked, who refused and why, who was chosen.

A name is used or is an error. ``auto`` probes every candidate and ranks those that say yes: the platform's preference
list first, then what was measured on this machine, then tier, then name. Every outcome is kept in a :class:`Selection`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from pydantic import ValidationError

from drivetrain.contracts.kinds import KINDS
from drivetrain.contracts.plugin import Plugin, PluginConfig, Probe, ProbeContext, Tier
from drivetrain.errors import (
    AmbiguousPluginError,
    ConfigError,
    DrivetrainError,
    NoCandidateError,
    PluginError,
    PluginRefusedError,
    UnknownPluginError,
    first_fault,
    nearest,
)
from drivetrain.registry.discovery import PluginRef, discover, load, normalized

AUTO = "auto"


@dataclass(frozen=True)
class PartRequest:
    """What was asked for one kind.

    name:    plugin name, ``dist/name``, or ``auto``.
    options: for the plugin's Config.
    origin:  who asked: ``default``, ``FILE:LINE``, ``command line``, ``argument``.
    places:  path of an option -> who asked for it, where that differs from ``origin``.
    is_named: whether ``name`` was asked for, and not options of the default alone.
    """

    kind: str
    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    origin: str = "default"
    places: Mapping[tuple[str, ...], str] = field(default_factory=dict)
    is_named: bool = True

    def place(self, path: tuple[str, ...]) -> str:
        """Who asked for the option at ``path``, or for the nearest table around it."""
        lengths = range(len(path), 0, -1)
        return next((self.places[path[:n]] for n in lengths if path[:n] in self.places), self.origin)


class Outcome(StrEnum):
    """What became of a candidate."""

    CHOSEN = "chosen"
    ELIGIBLE = "eligible"
    REFUSED = "refused"
    BROKEN = "broken"
    NOT_ASKED = "not asked"


@dataclass(frozen=True)
class CandidateReport:
    """One candidate and what became of it; ``code`` and the pair wanted/offered are the probe's.

    below: for an eligible one, why the chosen one ranks above it.
    """

    name: str
    distribution: str
    version: str
    outcome: Outcome
    code: str
    reason: str
    wanted: str = ""
    offered: str = ""
    below: str = ""


@dataclass(frozen=True)
class Selection:
    """The choice for one kind.

    reason:   why this one, in a sentence.
    fallback: set when a candidate broke that might have ranked above, refused although it is preferred, or could not
              make what it was chosen for.
    measured: what the machine's record of measurements says; empty for a kind that is not measured.
    """

    kind: str
    requested: str
    origin: str
    chosen: PluginRef
    options: Mapping[str, Any]
    reason: str
    candidates: tuple[CandidateReport, ...]
    fallback: str | None = None
    measured: str = ""

    def in_place_of(self, failed: Selection, reason: str) -> Selection:
        """This selection, made because what ``failed`` chose turned out not to work."""
        name, mine = failed.chosen.name, failed.chosen.distribution
        broken = [
            dataclasses.replace(candidate, outcome=Outcome.BROKEN, code="not_built", reason=reason)
            for candidate in failed.candidates
            if (candidate.name, candidate.distribution) == (name, mine)
        ]
        texts = (
            failed.fallback,
            self.fallback,
            f"{self.kind} {self.chosen.name!r} is used in place of {name!r}: {reason}",
        )
        fallback = "; ".join(text for text in texts if text)
        return dataclasses.replace(self, candidates=(*self.candidates, *broken), fallback=fallback)


@dataclass(frozen=True)
class SelectionReport:
    """All choices of one run, in resolution order, and the kinds left open with the reason.

    contexts: kind -> what its candidates were told, so that one which was not asked can be asked afterwards.
    """

    selections: tuple[Selection, ...]
    open_kinds: Mapping[str, str] = field(default_factory=dict)
    contexts: Mapping[str, ProbeContext] = field(default_factory=dict, repr=False, compare=False)

    def __getitem__(self, kind: str) -> Selection:
        for selection in self.selections:
            if selection.kind == kind:
                return selection
        raise KeyError(kind)

    def with_selection(self, new: Selection) -> SelectionReport:
        """The report with another selection for its kind."""
        selections = tuple(new if selection.kind == new.kind else selection for selection in self.selections)
        return dataclasses.replace(self, selections=selections)

    @property
    def chosen_names(self) -> dict[str, str]:
        """kind -> name of the chosen plugin."""
        return {selection.kind: selection.chosen.name for selection in self.selections}

    @property
    def fallbacks(self) -> tuple[str, ...]:
        return tuple(s.fallback for s in self.selections if s.fallback)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, as ``/debug/selection`` and ``explain --json`` give it."""
        return {
            "selections": [dataclasses.asdict(selection) for selection in self.selections],
            "open": dict(self.open_kinds),
            "fallbacks": list(self.fallbacks),
        }


class Registry:
    """The plugins that may be chosen: installed ones, or those given (tests, embedders).

    refs:   what may be chosen.
    barred: what is installed, but of a distribution that :meth:`allowing` left out.
    """

    def __init__(self, refs: Iterable[PluginRef] | None = None, barred: Iterable[PluginRef] = ()) -> None:
        self.refs = tuple(refs) if refs is not None else discover()
        self.barred = tuple(barred)

    def allowing(self, distributions: Iterable[str]) -> Registry:
        """A registry in which only plugins of ``distributions`` may be chosen; spelling as PyPI compares names."""
        allowed = {normalized(distribution) for distribution in distributions}
        kept = [ref for ref in self.refs if normalized(ref.distribution) in allowed]
        return Registry(kept, [*self.barred, *(ref for ref in self.refs if ref not in kept)])

    def candidates(self, kind: str) -> list[PluginRef]:
        return [ref for ref in self.refs if ref.kind == kind]

    def barred_candidates(self, kind: str) -> list[PluginRef]:
        return [ref for ref in self.barred if ref.kind == kind]

    def find(self, kind: str, name: str) -> PluginRef:
        """The one plugin that ``name``, short or ``dist/name``, means.

        Raises UnknownPluginError, AmbiguousPluginError, or PluginRefusedError for one that is barred.
        """
        candidates = self.candidates(kind)
        matches = [ref for ref in candidates if means(name, ref)]
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise AmbiguousPluginError(
                f"{len(matches)} distributions register {kind} {name!r}",
                found=name,
                allowed=[ref.qualified for ref in matches],
                hint="Name one of them in full.",
            )
        for ref in self.barred_candidates(kind):
            if means(name, ref):
                raise PluginRefusedError(
                    f"{kind} {name!r} is installed, but plugins.allow does not name its distribution",
                    found=ref.distribution,
                    hint=f"Add {ref.distribution} to plugins.allow.",
                )
        names = sorted({ref.name for ref in candidates})
        close = nearest(name, names)
        raise UnknownPluginError(
            f"no installed plugin of kind {kind!r} is named {name!r}",
            allowed=[*names, AUTO],
            hint=f"Did you mean {close!r}?" if close else f"Run: drivetrain plugins list --kind {kind}",
        )


def means(name: str, ref: PluginRef) -> bool:
    """Whether ``name``, short or ``dist/name``, is this plugin's."""
    distribution, _, short = name.rpartition("/")
    return short == ref.name and (not distribution or normalized(distribution) == normalized(ref.distribution))


@dataclass(frozen=True)
class Standing:
    """How a candidate ranks by what was measured on this machine.

    score: speed relative to the slowest way to do it, 1.0 also where nothing was measured; higher ranks first.
    text:  the score and where it comes from, in words.
    """

    score: float
    text: str


@dataclass(frozen=True)
class _Probed:
    """A candidate after loading and probing; ``plugin`` is None when it broke."""

    ref: PluginRef
    plugin: type[Plugin] | None
    probe: Probe


def _tier(probed: _Probed) -> Tier:
    return probed.plugin.tier if probed.plugin else Tier.REFERENCE


def probe_safely(plugin: type[Plugin], context: ProbeContext) -> Probe:
    """The plugin's answer, or ``broken`` with what it raised instead of answering."""
    try:
        probe = plugin.probe(context)
    except SystemExit as error:
        return Probe.no("broken", f"its probe called sys.exit({error.code!r})")
    except Exception as error:  # a third party's code; reported as the plugin's own fault
        return Probe.no("broken", f"its probe raised {type(error).__name__}: {error}")
    if not isinstance(probe, Probe):
        return Probe.no("broken", f"its probe returned {type(probe).__name__} instead of a Probe")
    return probe


def load_and_probe(ref: PluginRef, context: ProbeContext) -> Probe:
    """A candidate's answer; ``broken``, with the error, when it does not load."""
    return _load_and_probe(ref, context).probe


def _load_and_probe(ref: PluginRef, context: ProbeContext) -> _Probed:
    try:
        plugin = load(ref)
    except PluginError as error:
        return _Probed(ref, None, Probe.no("broken", error.what))
    return _Probed(ref, plugin, probe_safely(plugin, context))


def make_config(plugin: type[Plugin], ref: PluginRef, request: PartRequest) -> PluginConfig:
    """Validate the request's options against the plugin's Config. Raises ConfigError that names option and nearest."""
    try:
        return plugin.Config.model_validate(dict(request.options))
    except ValidationError as error:
        first, path, message = first_fault(error.errors(), request.options)
        where = f"{request.place(path)}: {'.'.join([KINDS[ref.kind].key, *path])}"
        if first["type"] == "extra_forbidden":
            known = list(plugin.Config.model_fields) if len(path) == 1 else []
            close = nearest(path[-1], known)
            raise ConfigError(
                f"{ref.kind} {ref.name!r} has no option {'.'.join(path)!r}",
                where=where,
                allowed=known or ("no options" if len(path) == 1 else None),
                hint=f"Did you mean {close!r}?" if close else None,
            ) from error
        raise ConfigError(
            message,
            where=where,
            found=None if _is_secret(plugin, path) else first["input"],
            hint=f"Run: drivetrain plugins info {ref.kind}/{ref.name}",
        ) from error


def _is_secret(plugin: type[Plugin], path: tuple[str, ...]) -> bool:
    field = plugin.Config.model_fields.get(path[0]) if path else None
    return field is not None and "Secret" in str(field.annotation)


def _create(plugin: type[Plugin], ref: PluginRef, request: PartRequest) -> Plugin:
    """Raises ConfigError for options the plugin does not take, PluginError for whatever else its code raises."""
    try:
        return plugin(make_config(plugin, ref, request))
    except DrivetrainError:
        raise
    except (Exception, SystemExit) as error:  # a third party's code; callers meet one tree of errors
        raise PluginError(f"creating it failed with {type(error).__name__}: {error}", where=str(ref)) from error


class Selector:
    """Chooses one plugin a kind, in whatever order it is asked, and keeps the report."""

    def __init__(self, registry: Registry, requests: Mapping[str, PartRequest]) -> None:
        self._registry = registry
        self._requests = requests
        self._preferences: dict[str, tuple[str, ...]] = {}
        self._whose: dict[str, str] = {}
        self._standings: dict[str, Callable[[PluginRef], Standing]] = {}
        self._measured: dict[str, str] = {}
        self._selections: list[Selection] = []
        self._contexts: dict[str, ProbeContext] = {}
        self.open_kinds: dict[str, str] = {}

    @property
    def report(self) -> SelectionReport:
        return SelectionReport(tuple(self._selections), dict(self.open_kinds), dict(self._contexts))

    def request(self, kind: str) -> PartRequest:
        return self._requests.get(kind) or PartRequest(kind, KINDS[kind].default)

    def prefer(self, preferences: Mapping[str, tuple[str, ...]], whose: str = "the platform's") -> None:
        """Rank the candidates of these kinds by preference from here on; ``whose`` it is, is told with the choice."""
        self._preferences.update(preferences)
        self._whose.update(dict.fromkeys(preferences, whose))

    def rank_by(self, kind: str, standing: Callable[[PluginRef], Standing], measured: str) -> None:
        """Rank the candidates of ``kind`` by measurement too; ``measured`` says of what measurements."""
        self._standings[kind] = standing
        self._measured[kind] = measured

    def leave_open(self, kind: str, reason: str) -> None:
        """Note why no plugin is chosen for ``kind``. A name that was asked for must exist all the same."""
        request = self.request(kind)
        if request.name != AUTO and request.origin != "default":
            self._find(request)
        self.open_kinds[kind] = reason

    def choose(self, kind: str, context: ProbeContext) -> Plugin:
        """Resolve, probe and create the plugin for ``kind``. Raises a PluginError or ConfigError."""
        self._contexts[kind] = self._with_choices(context)
        instance, selection = self.would_choose(kind, context)
        self._selections.append(selection)
        return instance

    def would_choose(self, kind: str, context: ProbeContext) -> tuple[Plugin, Selection]:
        """What :meth:`choose` would choose with what is known now. Nothing is noted of it. Raises as it does."""
        request, context = self.request(kind), self._with_choices(context)
        if request.name == AUTO:
            plugin, selection = self._choose_best(request, context)
        else:
            plugin, selection = self._choose_named(request, context)
        instance = _create(plugin, selection.chosen, request)
        # Reports are printed, served and saved: what a Config declares secret is masked by its own dump.
        shown = instance.config.model_dump(mode="json", include=set(request.options))
        measured = self._measured.get(kind, "")
        return instance, dataclasses.replace(selection, options=shown, measured=measured)

    def _with_choices(self, context: ProbeContext) -> ProbeContext:
        return dataclasses.replace(context, chosen=self.report.chosen_names)

    def _find(self, request: PartRequest) -> PluginRef:
        try:
            return self._registry.find(request.kind, request.name)
        except PluginError as error:
            error.where = f"{request.origin}: {KINDS[request.kind].key}"
            raise

    def _choose_named(self, request: PartRequest, context: ProbeContext) -> tuple[type[Plugin], Selection]:
        ref = self._find(request)
        plugin = load(ref)
        probe = probe_safely(plugin, context)
        if not probe.ok:
            raise PluginRefusedError(
                f"{request.kind} {request.name!r} ({request.origin}) can't be used here: {probe.reason}",
                found=probe.offered or None,
                allowed=probe.wanted or None,
                hint=f"Run: drivetrain explain --{KINDS[request.kind].key} {AUTO}",
            )
        reason = f"{request.name!r} was asked for by name ({request.origin})"
        if request.origin == "default":
            reason = f"{request.name!r} is the default"
        elif not request.is_named:
            reason = f"{request.name!r} is the default; options of it were asked for ({request.origin})"
        others = [
            _report(other, Outcome.NOT_ASKED, Probe.yes(reason))
            for other in self._registry.candidates(request.kind)
            if other != ref
        ]
        others += self._barred(request.kind)
        return plugin, Selection(
            request.kind,
            request.name,
            request.origin,
            ref,
            dict(request.options),
            reason,
            (_report(ref, Outcome.CHOSEN, probe), *others),
        )

    def _choose_best(self, request: PartRequest, context: ProbeContext) -> tuple[type[Plugin], Selection]:
        probed = [_load_and_probe(ref, context) for ref in self._registry.candidates(request.kind)]
        eligible = sorted((p for p in probed if p.probe.ok and p.plugin), key=self._rank)
        if not eligible:
            raise self._no_candidate(request, probed)
        best = eligible[0]
        assert best.plugin is not None
        reports = [_report(best.ref, Outcome.CHOSEN, best.probe)]
        reports += [
            dataclasses.replace(_report(p.ref, Outcome.ELIGIBLE, p.probe), below=self._why_above(best, p))
            for p in eligible[1:]
        ]
        refused = [p for p in probed if not p.probe.ok]
        reports += [
            _report(p.ref, Outcome.BROKEN if p.probe.code == "broken" else Outcome.REFUSED, p.probe) for p in refused
        ]
        reports += self._barred(request.kind)
        selection = Selection(
            request.kind,
            AUTO,
            request.origin,
            best.ref,
            dict(request.options),
            self._why(best, eligible, request.kind),
            tuple(reports),
            self._fallback(best, refused),
        )
        return best.plugin, selection

    def _barred(self, kind: str) -> list[CandidateReport]:
        return [_report(ref, Outcome.REFUSED, _not_allowed(ref)) for ref in self._registry.barred_candidates(kind)]

    def _preference(self, ref: PluginRef) -> int:
        preferred = self._preferences.get(ref.kind, ())
        return preferred.index(ref.name) if ref.name in preferred else len(preferred)

    def _standing(self, ref: PluginRef) -> Standing:
        rule = self._standings.get(ref.kind)
        return rule(ref) if rule else Standing(1.0, "")

    def _rank(self, probed: _Probed) -> tuple[int, float, int, str, str]:
        ref = probed.ref
        return (self._preference(ref), -self._standing(ref).score, -_tier(probed), ref.name, ref.distribution)

    def _why(self, best: _Probed, eligible: list[_Probed], kind: str) -> str:
        if len(eligible) == 1:
            return f"the only candidate that can work here: {best.probe.reason}"
        if best.ref.name in self._preferences.get(kind, ()):
            order = ", ".join(self._preferences[kind])
            return f"first in {self._whose[kind]} order of preference ({order}) of those that can work here"
        second = eligible[1]
        reason = self._why_above(best, second)
        if self._standing(best.ref).score != self._standing(second.ref).score:
            return reason
        return f"{reason} ({second.ref.name!r})" if _tier(best) != _tier(second) else "first by name among equals"

    def _why_above(self, better: _Probed, worse: _Probed) -> str:
        """Which rule put ``better`` before ``worse``, both of which can work here."""
        if self._preference(better.ref) != self._preference(worse.ref):
            order = ", ".join(self._preferences[better.ref.kind])
            return f"{self._whose[better.ref.kind]} order of preference is {order}"
        mine, theirs = self._standing(better.ref), self._standing(worse.ref)
        if mine.score != theirs.score:
            return f"{better.ref.name!r} is {mine.text}; {worse.ref.name!r} is {theirs.text}"
        if _tier(better) != _tier(worse):
            return f"tier {_tier(better).name.lower()} is above {_tier(worse).name.lower()}"
        return "first by name among equals"

    def _fallback(self, best: _Probed, refused: list[_Probed]) -> str | None:
        passed = [
            p
            for p in refused
            if (p.probe.code == "broken" and self._preference(p.ref) <= self._preference(best.ref))
            or (
                p.ref.name in self._preferences.get(p.ref.kind, ())
                and self._preference(p.ref) < self._preference(best.ref)
            )
        ]
        if not passed:
            return None
        reasons = "; ".join(f"{p.ref.name!r}: {p.probe.reason}" for p in passed)
        return f"{best.ref.kind} {best.ref.name!r} is used in place of {reasons}"

    def _no_candidate(self, request: PartRequest, probed: list[_Probed]) -> NoCandidateError:
        barred = [_Probed(ref, None, _not_allowed(ref)) for ref in self._registry.barred_candidates(request.kind)]
        if not probed and not barred:
            return NoCandidateError(
                f"no plugin of kind {request.kind!r} is installed",
                hint="Run: pip install drivetrain, and see drivetrain doctor",
            )
        reasons = "; ".join(f"{p.ref.name}: {p.probe.reason}" for p in (*probed, *barred))
        return NoCandidateError(f"no plugin of kind {request.kind!r} can be used here ({reasons})")


def _not_allowed(ref: PluginRef) -> Probe:
    return Probe.no("not_allowed", f"plugins.allow does not name {ref.distribution}")


def _report(ref: PluginRef, outcome: Outcome, probe: Probe) -> CandidateReport:
    return CandidateReport(
        ref.name, ref.distribution, ref.version, outcome, probe.code, probe.reason, probe.wanted, probe.offered
    )
