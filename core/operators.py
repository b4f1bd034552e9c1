"""Shows a kernel to autograd and torch.compile: as an operator of ``torch.library``, with shapes and a backward.

A call of an operator goes through torch's dispatcher, which costs microseconds: as much as a small kernel itself. So a
provider keeps the plain callable for serving, and :func:`visible` decides at each call which of the two is meant::

    forward = define("acme::rms_norm", "(Tensor x, Tensor weight, float eps) -> Tensor", run, fake=like_x,
                     save=save_inputs, backward=rms_norm_backward)
    return visible(lambda x, weight: run(x, weight, eps), Operator(forward, (eps,)))

Operators are registered when a provider makes its first callable, never on import.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from drivetrain.errors import ConfigError, ContractError

_GUARD = threading.Lock()
_LIBRARIES: dict[str, torch.library.Library] = {}
"""Namespace -> what holds its registrations: they end with it, so it lives as long as the process."""
_DEFINED: dict[str, tuple[str, str, torch._ops.OpOverload]] = {}
"""Qualified name -> schema, implementation's name, and the operator."""


@dataclass(frozen=True)
class Operator:
    """An operator as one use of an operation calls it.

    overload:  what :func:`define` returned.
    constants: that follow the tensors: the use's eps, its offset.
    results:   how many of the overload's results are the operation's: those behind them are kept for its backward. None
               for all.
    """

    overload: torch._ops.OpOverload
    constants: tuple[Any, ...] = ()
    results: int | None = None

    def __call__(self, *tensors: torch.Tensor | None) -> Any:
        found = self.overload(*tensors, *self.constants)
        if self.results is None:
            return found
        return found[0] if self.results == 1 else found[: self.results]


def define(
    name: str,
    schema: str,
    implementation: Callable[..., Any],
    *,
    fake: Callable[..., Any],
    save: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    device_types: Sequence[str] = ("cpu",),
) -> torch._ops.OpOverload:
    """Register an operator once in this process, and return it; later calls return the same.

    name:           ``"namespace::name"``; the namespace is the provider's own: ``"acme"``.
    schema:         in torch's language: ``"(Tensor x, Tensor weight, float eps) -> Tensor"``. What is written to is
                    ``Tensor(a!)``. A result shares no memory with an argument.
    implementation: computes it, outside of autograd.
    fake:           called with the same arguments, makes empty results of the right shape, dtype and device.
    save:           ``save(ctx, inputs, output)``: keeps what the backward needs.
    backward:       ``backward(ctx, *gradients)``: a gradient or None for every argument. torch.compile traces it, so
                    what is no torch code in it has to be an operator too. Without one, there is no gradient: results
                    ask for none, whatever the arguments do.
    device_types:   torch device types that ``implementation`` works on.

    Raises ContractError when the name is taken by something else.
    """
    namespace, _, short = name.partition("::")
    made_by = f"{implementation.__module__}.{implementation.__qualname__}"
    with _GUARD:
        if name in _DEFINED:
            known_schema, known_maker, overload = _DEFINED[name]
            if (known_schema, known_maker) != (schema, made_by):
                raise ContractError(
                    f"the operator {name} is defined already, and differently",
                    where=made_by,
                    found=schema,
                    allowed=f"{known_schema} of {known_maker}",
                    hint="Use a namespace that only this provider has.",
                )
            return overload
        library = _LIBRARIES.setdefault(namespace, torch.library.Library(namespace, "FRAGMENT"))
        library.define(f"{short}{schema}")
        if backward is None:  # torch would have results ask for a gradient, and warn of what it can't compute
            library.impl(short, torch.library.fallthrough_kernel, "Autograd")
            implementation = torch.no_grad()(implementation)
        for device_type in device_types:
            library.impl(short, implementation, device_type.upper())
        torch.library.register_fake(name, fake, lib=library)
        if backward is not None:
            torch.library.register_autograd(name, backward, setup_context=save, lib=library)
        overload = getattr(getattr(torch.ops, namespace), short).default
        _DEFINED[name] = (schema, made_by, overload)
        return overload


def once_differentiable(ctx: Any, *gradients: Any) -> Any:
    """The ``backward`` of an operator that is a backward itself: a second derivative is refused and not left out."""
    raise ConfigError(
        "kernels have no second derivatives",
        where="drivetrain.operators",
        hint="Differentiate twice with the kernels reference.",
    )


def visible(plain: Callable[..., Any], operator: Operator) -> Callable[..., Any]:
    """A callable that is ``operator`` where autograd records or torch.compile traces, and ``plain`` elsewhere.

    Both are called with the logical operation's arguments. The result carries ``operator`` as an attribute, by which
    the conformance kit finds it.
    """
    is_compiling, is_grad_enabled = torch.compiler.is_compiling, torch.is_grad_enabled

    def call(*tensors: torch.Tensor | None) -> Any:
        if is_grad_enabled() or is_compiling():
            return operator(*tensors)
        return plain(*tensors)

    call.operator = operator  # type: ignore[attr-defined]
    return call
