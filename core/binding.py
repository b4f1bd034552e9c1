"""Binds logical operations to implementations while a model is built, and remembers which became which."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from drivetrain.contracts.kernels import OPERATIONS, KernelProvider, KernelSpec
from drivetrain.errors import NoCandidateError, nearest

if TYPE_CHECKING:
    from drivetrain.fusion.report import FusionReport


@dataclass(frozen=True)
class Binding:
    """One use of an operation and the provider that serves it; ``refused`` tells who was asked before and why not."""

    spec: KernelSpec
    provider: str
    refused: tuple[str, ...] = ()


class KernelBinder:
    """``bind(spec)`` asks the providers in order. Used at build time only: a step calls the bound callables.

    fusion: what became of the model that was built with it; None when it was not fused.
    """

    def __init__(self, providers: Sequence[tuple[str, KernelProvider]]) -> None:
        self._providers = tuple(providers)
        self.bindings: list[Binding] = []
        self.num_lookups = 0
        self.fusion: FusionReport | None = None

    def bind(self, spec: KernelSpec) -> Callable[..., Any]:
        """The callable for this use. Raises NoCandidateError that tells what each provider said."""
        self.num_lookups += 1
        if spec.operation not in OPERATIONS:
            close = nearest(spec.operation, OPERATIONS)
            raise NoCandidateError(
                f"no logical operation is named {spec.operation!r}",
                allowed=sorted(OPERATIONS),
                hint=f"Did you mean {close!r}?" if close else None,
            )
        refused: list[str] = []
        for name, provider in self._providers:
            if spec.operation not in provider.operations():
                refused.append(f"{name}: has no {spec.operation}")
                continue
            probe = provider.supports(spec)
            if probe.ok:
                implementation = provider.make(spec)
                self.bindings.append(Binding(spec, name, tuple(refused)))
                return implementation
            refused.append(f"{name}: {probe.reason}")
        raise NoCandidateError(f"no kernel provider implements {spec.operation} here ({'; '.join(refused)})")

    def provider_of(self, spec: KernelSpec) -> str | None:
        """Name of the provider that :meth:`bind` would use; None when nobody implements this use. Binds nothing."""
        for name, provider in self._providers:
            if spec.operation in provider.operations() and provider.supports(spec).ok:
                return name
        return None

    def by_operation(self) -> dict[str, dict[str, int]]:
        """operation -> provider -> number of uses."""
        table: dict[str, dict[str, int]] = {}
        for binding in self.bindings:
            row = table.setdefault(binding.spec.operation, {})
            row[binding.provider] = row.get(binding.provider, 0) + 1
        return table
