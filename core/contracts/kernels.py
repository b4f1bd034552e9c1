"""Contract of a kernel provider, and the logical operations that providers implement.

A logical operation is a signature, a meaning (the reference provider, in plain torch) and a tolerance. A model asks for
it once, when it is built, and keeps the plain callable that it gets: nothing is looked up while a step runs.

Shapes: ``...`` any leading dims; E features; T tokens; H query heads; G key/value heads; D head size; R rotary
dims (R <= D).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from drivetrain.contracts.plugin import Plugin, Probe


@dataclass(frozen=True)
class Operation:
    """One logical operation.

    signature: how the bound callable is called, as Python would print it.
    meaning:   what it computes.
    tolerance: torch dtype name -> (relative, absolute) distance from the reference that still passes.
    """

    name: str
    signature: str
    meaning: str
    tolerance: Mapping[str, tuple[float, float]] = field(
        default_factory=lambda: {"float32": (1e-5, 1e-5), "bfloat16": (1.6e-2, 1e-2), "float16": (2e-3, 1e-3)}
    )


_OPERATIONS = (
    Operation(
        "rms_norm",
        "(x: [..., E], weight: [E]) -> [..., E]",
        "x / sqrt(mean(x^2) + eps) in float32, times (weight + weight_offset); spec params: eps, weight_offset",
    ),
    Operation(
        "rope",
        "(q: [T, H, D], k: [T, G, D], cos: [T, R], sin: [T, R]) -> (q, k)",
        "rotary embedding of the first R dims, halves paired as (i, i + R/2); the rest passes unchanged",
    ),
    Operation("silu_mul", "(gate: [..., E], up: [..., E]) -> [..., E]", "silu(gate) * up"),
    Operation("gelu_tanh_mul", "(gate: [..., E], up: [..., E]) -> [..., E]", "gelu(gate, tanh approximation) * up"),
    Operation("linear", "(x: [..., I], weight: [O, I], bias: [O] | None) -> [..., O]", "x @ weight.T + bias"),
)

OPERATIONS: dict[str, Operation] = {operation.name: operation for operation in _OPERATIONS}
"""Every logical operation by name."""


@dataclass(frozen=True)
class KernelSpec:
    """One use of an operation, known when the model is built.

    device_type: torch device type.
    dtype:       torch dtype name of the activations.
    sizes:       named fixed sizes: ``{"E": 576}``.
    params:      named constants of the operation: ``{"eps": 1e-5}``.
    """

    operation: str
    device_type: str
    dtype: str
    sizes: Mapping[str, int] = field(default_factory=dict)
    params: Mapping[str, float] = field(default_factory=dict)


class KernelProvider(Plugin):
    """Implements some of the logical operations.

    Abilities: ``deterministic``, the same inputs give the same bits in every run; ``batch_invariant``, the bits of a
    row do not depend on the rows beside it.
    """

    kind = "kernels"

    @abstractmethod
    def operations(self) -> frozenset[str]:
        """Names of the operations this provider has at all. Pure."""

    @abstractmethod
    def supports(self, spec: KernelSpec) -> Probe:
        """Whether this use of an operation is covered. Pure; compiles nothing."""

    @abstractmethod
    def make(self, spec: KernelSpec) -> Callable[..., Any]:
        """The callable for this use, with the operation's signature. May compile. Differentiable in its tensors."""
