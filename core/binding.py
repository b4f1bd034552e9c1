"""Binds logical operations to implementations while a model is built, and remembers which became which, and why."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from drivetrain.contracts.kernels import OPERATIONS, BuildsAhead, KernelProvider, KernelSpec
from drivetrain.contracts.plugin import Plugin
from drivetrain.contracts.source import Progress, silent
from drivetrain.errors import KernelBuildError, NoCandidateError, PluginError, nearest
from drivetrain.kernel_record import REFERENCE, KernelRecord, use_of
from drivetrain.registry import Outcome, PluginRef, Registry, Selection, load
from drivetrain.registry.selection import AUTO

_log = logging.getLogger("drivetrain")

if TYPE_CHECKING:
    from drivetrain.fusion.report import FusionReport
    from drivetrain.packed.ledger import Ledger


@dataclass(frozen=True)
class Binding:
    """One use of an operation and the provider that serves it.

    refused: who came before and why they do not serve it.
    reason:  why this one, in a sentence.
    """

    spec: KernelSpec
    provider: str
    refused: tuple[str, ...] = ()
    reason: str = ""


class KernelBinder:
    """``bind(spec)`` asks the providers in order. Used at build time only: a step calls the bound callables.

    providers: name and provider, the chosen one first.
    is_auto:   nobody asked for the first by name: one that is faster by the record goes before it, and the next takes
               over what a provider fails to make. Otherwise such a failure is an error.
    record:    what was measured on this machine.
    ledger:    what the weights of the model take that was built with it; None when it is no torch module.
    fusion:    what became of that model; None when it was not fused.
    not_fused: why there was nothing to fuse.
    """

    def __init__(
        self,
        providers: Sequence[tuple[str, KernelProvider]],
        *,
        is_auto: bool = False,
        record: KernelRecord | None = None,
        progress: Progress = silent,
    ) -> None:
        self._providers = dict(providers)
        self._is_auto = is_auto
        self._record = record or KernelRecord()
        self._progress = progress
        self._built: set[str] = set()
        self._failures: dict[tuple[str, str], str] = {}
        self.bindings: list[Binding] = []
        self.num_lookups = 0
        self.ledger: Ledger | None = None
        self.fusion: FusionReport | None = None
        self.not_fused: str | None = None

    def bind(self, spec: KernelSpec) -> Callable[..., Any]:
        """The callable for this use.

        Raises NoCandidateError that tells what each provider said, and KernelBuildError when the one that was asked for
        by name can't make what it covers.
        """
        self.num_lookups += 1
        if spec.operation not in OPERATIONS:
            close = nearest(spec.operation, OPERATIONS)
            raise NoCandidateError(
                f"no logical operation is named {spec.operation!r}",
                allowed=sorted(OPERATIONS),
                hint=f"Did you mean {close!r}?" if close else None,
            )
        refusals = {name: self._refusal(name, spec) for name in self._providers}
        order, reason = self._order(spec, refusals)
        for name in order:
            implementation = self._try_make(name, spec, refusals)
            if implementation is not None:
                self._remember(spec, name, refusals, reason if name == order[0] else "")
                return implementation
        said = "; ".join(f"{name}: {refusal}" for name, refusal in refusals.items())
        raise NoCandidateError(f"no kernel provider implements {spec.operation} here ({said})")

    def provider_of(self, spec: KernelSpec) -> str | None:
        """Name of the provider that :meth:`bind` would ask first; None when nobody covers this use. Binds nothing."""
        order, _ = self._order(spec, {name: self._refusal(name, spec) for name in self._providers})
        return order[0] if order else None

    def _order(self, spec: KernelSpec, refusals: Mapping[str, str | None]) -> tuple[list[str], str]:
        """Those that do not refuse, in the order in which they are asked, and why it is not their own order."""
        able = [name for name, refusal in refusals.items() if refusal is None]
        return self._record.order(spec, able) if self._is_auto else (able, "")

    def _refusal(self, name: str, spec: KernelSpec) -> str | None:
        """Why provider ``name`` does not serve this use; None when it says that it could."""
        provider = self._providers[name]
        if spec.operation not in provider.operations():
            return f"has no {spec.operation}"
        failed = self._failures.get((name, spec.operation)) or self._failures.get((name, ""))
        if failed is not None:
            return failed
        probe = provider.supports(spec)
        return None if probe.ok else probe.reason

    def _try_make(self, name: str, spec: KernelSpec, refusals: dict[str, str | None]) -> Callable[..., Any] | None:
        """The callable; None when it could not be made and another may take over, with the failure noted."""
        provider, what = self._providers[name], ""
        try:
            if isinstance(provider, BuildsAhead) and name not in self._built:
                provider.build_ahead(self._progress)
                self._built.add(name)
            what = spec.operation
            return provider.make(spec)
        except KernelBuildError as error:
            if not self._is_auto:
                error.what = f"kernels {name!r} can't make {spec.operation}: {error.what}"
                raise
            self._failures[name, what] = refusals[name] = str(error)
            _log.warning("kernels %r can't make %s, and another provider is asked: %s", name, spec.operation, error)
            return None

    def _remember(self, spec: KernelSpec, name: str, refusals: dict[str, str | None], reason: str) -> None:
        names = list(self._providers)
        passed = {
            *names[: names.index(name)],
            *(failed for failed, what in self._failures if what in ("", spec.operation)),
        }
        refused = tuple(f"{other}: {refusals[other]}" for other in names if other in passed and refusals[other])
        if not reason:
            cited = self._record.cite(spec, name)
            place = "the first" if name == names[0] else "the next"
            reason = f"{place} in order that covers it" + (f"; {cited}" if cited else "")
        self.bindings.append(Binding(spec, name, refused, reason))

    @property
    def fallbacks(self) -> tuple[str, ...]:
        """One sentence for each provider that failed to make what it covers."""
        told = []
        for name in dict.fromkeys(name for name, _ in self._failures):
            reasons = list(dict.fromkeys(reason for (failed, _), reason in self._failures.items() if failed == name))
            taken = {
                (binding.provider, binding.spec.operation)
                for binding in self.bindings
                if any(refusal == f"{name}: {reason}" for refusal in binding.refused for reason in reasons)
            }
            served = "; ".join(
                f"{', '.join(sorted(operation for other, operation in taken if other == provider))} by {provider!r}"
                for provider in sorted({provider for provider, _ in taken})
            )
            told.append(f"kernels {name!r} could not be made; {served or 'nothing'}: {'; '.join(reasons)}")
        return tuple(told)

    def by_operation(self) -> dict[str, dict[str, int]]:
        """operation -> provider -> number of uses."""
        table: dict[str, dict[str, int]] = {}
        for binding in self.bindings:
            row = table.setdefault(binding.spec.operation, {})
            row[binding.provider] = row.get(binding.provider, 0) + 1
        return table

    def explained(self) -> list[dict[str, Any]]:
        """Every distinct use with its provider, the reason, and who refused it, in JSON-able form."""
        rows: dict[str, dict[str, Any]] = {}
        for binding in self.bindings:
            spec = binding.spec
            row = rows.setdefault(
                use_of(spec),
                {
                    "operation": spec.operation,
                    "dtype": spec.dtype,
                    "sizes": dict(spec.sizes),
                    "provider": binding.provider,
                    "uses": 0,
                    "reason": binding.reason,
                    "refused": list(binding.refused),
                },
            )
            row["uses"] += 1
        return list(rows.values())


def kernel_providers(
    registry: Registry, chosen: KernelProvider, selection: Selection
) -> list[tuple[str, KernelProvider]]:
    """Who may be asked for an operation, in order: the chosen provider, under ``auto`` the others that can work here,
    and the reference for what none of them has."""
    providers = {selection.chosen.name: chosen}
    if selection.requested == AUTO:
        for ref, provider in _eligible(registry, selection):
            # Two distributions may register one name; the shorter form goes to whoever ranks first.
            providers.setdefault(ref.name if ref.name not in providers else ref.qualified, provider)
    if REFERENCE not in providers and any(ref.name == REFERENCE for ref in registry.candidates("kernels")):
        providers[REFERENCE] = _created(registry.find("kernels", REFERENCE))
    reference = providers.pop(REFERENCE, None)
    if reference is not None:
        providers = {**providers, REFERENCE: reference} if reference is not chosen else {REFERENCE: chosen, **providers}
    return list(providers.items())


def _eligible(registry: Registry, selection: Selection) -> Iterator[tuple[PluginRef, KernelProvider]]:
    """The candidates that could work and rank below the chosen one, in that order."""
    refs = {(ref.name, ref.distribution): ref for ref in registry.candidates("kernels")}
    for candidate in selection.candidates:
        if candidate.outcome is Outcome.ELIGIBLE:
            ref = refs[candidate.name, candidate.distribution]
            try:
                yield ref, _created(ref)
            except PluginError as error:
                _log.warning("kernels %r, which could serve what others lack, is left out: %s", ref.name, error)


def _created(ref: PluginRef) -> KernelProvider:
    """Raises PluginError for whatever its code raises."""
    plugin: type[Plugin] = load(ref)
    try:
        return cast(KernelProvider, plugin(plugin.Config()))
    except Exception as error:  # a third party's code; callers meet one tree of errors
        raise PluginError(f"creating it failed with {type(error).__name__}: {error}", where=str(ref)) from error


def served_operations(
    providers: Sequence[tuple[str, KernelProvider]],
    record: KernelRecord,
    device_type: str,
    dtype: str,
    *,
    is_auto: bool,
) -> Iterable[tuple[str, str, str]]:
    """(operation, provider, why) as far as can be told before a model is built: by what the providers have, and by the
    record where it has measured uses of the operation."""
    names = [name for name, _ in providers]
    for operation in OPERATIONS:
        having = [name for name, provider in providers if operation in provider.operations()]
        if not having:
            continue
        lacking = names[: names.index(having[0])]
        why = f"{', '.join(lacking)} {'has' if len(lacking) == 1 else 'have'} no {operation}" if lacking else ""
        uses = [
            spec
            for spec in record.uses()
            if (spec.operation, spec.device_type, spec.dtype) == (operation, device_type, dtype)
        ]
        firsts = [record.order(spec, having)[0][0] for spec in uses] if is_auto else []
        for name in dict.fromkeys([*firsts, *([] if firsts else having[:1])]):
            mine = [spec for spec, first in zip(uses, firsts, strict=True) if first == name] if is_auto else uses
            cited = "; ".join(dict.fromkeys(filter(None, (record.cite(spec, name) for spec in mine))))
            yield operation, name, "; ".join(filter(None, (why, cited))) or "the first in order that has it"


def bind_sample(binder: KernelBinder, device_type: str, vocab_size: int) -> Callable[..., Any] | None:
    """The bound operation ``sample`` for float32 scores; None where only the reference has it, which sorts whole
    vocabularies: the sampler's own way is faster then."""
    spec = KernelSpec("sample", device_type, "float32", {"V": vocab_size})
    return None if binder.provider_of(spec) in (None, "reference") else binder.bind(spec)
