"""What a pattern works with: the module, one observed run of it, bound operations, and the record of what was done."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from drivetrain.contracts.kernels import KernelSpec
from drivetrain.fusion.observing import Call, Run
from drivetrain.fusion.report import Fused, Left
from drivetrain.fusion.rewriting import Traced, trace

REFERENCE = "reference"
"""Name of the provider whose operations are no faster than what they replace."""


class Binder(Protocol):
    """Binds operations; :class:`drivetrain.binding.KernelBinder` is one."""

    def bind(self, spec: KernelSpec) -> Callable[..., Any]: ...

    def provider_of(self, spec: KernelSpec) -> str | None: ...


@runtime_checkable
class FusesItself(Protocol):
    """A module that knows better than any pattern how its operations become one."""

    def fuse_with(self, fuser: Fuser) -> None:
        """Bind operations with ``fuser.better``, take them into use, and tell with ``fuser.did`` and ``fuser.leave``.

        Called again on a module that is fused already, it does nothing.
        """


class Fuser:
    """One fusion of one module.

    module:         what is fused, in place.
    run:            the module's run before anything was changed.
    reference_too:  bind also what only the reference provider has.
    fused, left:    the record so far.
    taken:          linear layers that another operation reads the weights of, not to be joined.
    changed:        modules whose graph was changed; :meth:`finish` sets it as their forward.
    """

    def __init__(self, module: nn.Module, run: Run, binder: Binder, reference_too: bool) -> None:
        self.module, self.run, self.reference_too = module, run, reference_too
        self.fused: list[Fused] = []
        self._left: dict[Left, None] = {}
        self.undo: list[Callable[[], None]] = []
        self.taken: set[nn.Module] = set()
        self.changed: set[nn.Module] = set()
        self._traced: dict[nn.Module, Traced | str] = {}
        self._binder = binder
        self._names = {part: name for name, part in module.named_modules()}

    @property
    def left(self) -> tuple[Left, ...]:
        """Every place that was left, once."""
        return tuple(self._left)

    def name_of(self, part: nn.Module) -> str:
        """Its dotted path."""
        return self._names.get(part, type(part).__name__)

    @property
    def names(self) -> Mapping[nn.Module, str]:
        """Every module and its path, as they were before anything was changed."""
        return self._names

    @functools.cached_property
    def tied(self) -> frozenset[int]:
        """ids of the parameters that several modules share."""
        uses = Counter(id(parameter) for _, parameter in self.module.named_parameters(remove_duplicate=False))
        return frozenset(one for one, count in uses.items() if count > 1)

    # --- bound operations --------------------------------------------------------------------------------------------

    def spec(
        self, like: torch.Tensor, operation: str, sizes: Mapping[str, int], params: Mapping[str, float] | None = None
    ) -> KernelSpec:
        """The use of an operation on tensors of the device and dtype of ``like``."""
        dtype = str(like.dtype).removeprefix("torch.")
        return KernelSpec(operation, like.device.type, dtype, sizes, params or {})

    def provider_of(self, spec: KernelSpec) -> str | None:
        return self._binder.provider_of(spec)

    def bind(self, spec: KernelSpec) -> Callable[..., Any]:
        return self._binder.bind(spec)

    def better(self, pattern: str, where: str, spec: KernelSpec) -> Callable[..., Any] | None:
        """The bound operation if a provider beside the reference has it; otherwise None, and the place is left.

        For operations whose reference is the very operations that they would replace.
        """
        provider = self.provider_of(spec)
        if provider is None:
            self.leave(pattern, where, f"no kernel provider has {spec.operation} for {spec.dtype} here")
            return None
        operation = None if provider == REFERENCE and not self.reference_too else self.bind(spec)
        # A provider that fails to make what it covers has been passed over by now.
        if operation is None or (self.provider_of(spec) == REFERENCE and not self.reference_too):
            self.leave(pattern, where, f"only the reference has {spec.operation}, in as many operations as before")
            return None
        return operation

    # --- graphs ------------------------------------------------------------------------------------------------------

    def trace(self, pattern: str, module: nn.Module, call: Call) -> Traced | None:
        """The graph of the module's call, the same for every pattern; None, with the reason on record, without one."""
        if module not in self._traced:
            self._traced[module] = _try_to_trace(module, call)
        traced = self._traced[module]
        if isinstance(traced, str):
            self.leave(pattern, self.name_of(module), traced)
            return None
        return traced

    def finish(self) -> None:
        """Take the changed graphs into use."""
        for module in self.changed:
            traced = self._traced[module]
            assert isinstance(traced, Traced)
            self.set_forward(module, traced.forward())

    # --- the record --------------------------------------------------------------------------------------------------

    def did(self, pattern: str, where: str, what: str, spec: KernelSpec, bytes_per_token: int) -> None:
        provider = self.provider_of(spec) or "none"
        self.fused.append(Fused(pattern, where, what, spec.operation, provider, bytes_per_token))

    def leave(self, pattern: str, where: str, reason: str) -> None:
        entry = Left(pattern, where, reason)
        if entry not in self._left:
            self._left[entry] = None

    # --- changes that can be taken back ------------------------------------------------------------------------------

    def set_forward(self, part: nn.Module, forward: Callable[..., Any]) -> None:
        """Let ``forward`` stand before the class's own on this one module."""
        before = vars(part).get("forward")
        part.forward = forward

        def undo() -> None:
            if before is None:
                del part.forward
            else:
                part.forward = before

        self.undo.append(undo)

    def set_attribute(self, part: nn.Module, name: str, value: Any) -> None:
        """Set an attribute that is no module, parameter or buffer."""
        before = getattr(part, name)
        setattr(part, name, value)
        self.undo.append(lambda: setattr(part, name, before))

    def take_back(self) -> None:
        """Make the module what it was before."""
        while self.undo:
            self.undo.pop()()


def _try_to_trace(module: nn.Module, call: Call) -> Traced | str:
    try:
        return trace(module, call)
    except Exception as error:  # the code of anybody's module runs on stand-ins here
        said = str(error).strip().splitlines()
        return f"its forward can't be traced: {type(error).__name__}: {said[0][:100] if said else ''}"
