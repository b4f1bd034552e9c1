"""What a module does in one run: which module is called with which tensors, and how many operations are launched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Example = tuple[Sequence[Any], Mapping[str, Any]]
"""Positional and named arguments of one call."""


@dataclass(frozen=True)
class Call:
    """One call of a module. ``version`` counts how often the first tensor had been written to in place by then."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    version: int

    @property
    def first(self) -> torch.Tensor | None:
        """The first tensor among the arguments."""
        return next((leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, torch.Tensor)), None)


@dataclass
class Run:
    """One run of a module.

    calls:   module -> its calls, modules in the order of their first call.
    outputs: module -> what each call returned.
    """

    output: Any = None
    num_operations: int = 0
    calls: dict[nn.Module, list[Call]] = field(default_factory=dict)
    outputs: dict[nn.Module, list[Any]] = field(default_factory=dict)
    operations_of: dict[nn.Module, int] = field(default_factory=dict)

    def only_call(self, module: nn.Module) -> Call | None:
        """Its call, if it was called exactly once."""
        calls = self.calls.get(module, [])
        return calls[0] if len(calls) == 1 else None


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if not func.is_view:
            self.count += 1
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def observe(module: nn.Module, example: Example) -> Run:
    """Run ``module`` on ``example`` without gradients."""
    run, counter, started = Run(), _Counter(), []

    def before(called: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        call = Call(args, dict(kwargs), 0)
        first = call.first
        if first is not None and not first.is_inference():
            call = Call(args, dict(kwargs), first._version)
        run.calls.setdefault(called, []).append(call)
        started.append(counter.count)

    def after(called: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        run.outputs.setdefault(called, []).append(output)
        run.operations_of[called] = run.operations_of.get(called, 0) + counter.count - started.pop()

    handles: list[Any] = []
    try:
        for part in set(module.modules()):
            handles.append(part.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(part.register_forward_hook(after))
        with counter:
            run.output = module(*example[0], **example[1])
    finally:
        for handle in handles:
            handle.remove()
    run.num_operations = counter.count
    return run


def layers_of(module: nn.Module) -> list[nn.Module]:
    """The longest list of modules, which holds a model's layers."""
    lists = [list(part) for part in module.modules() if isinstance(part, nn.ModuleList)]
    return max(lists, key=len, default=[])


def tensors_of(value: Any) -> list[torch.Tensor]:
    """The tensors in what a module returned."""
    found = [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
    if not found and hasattr(value, "__dict__"):
        found = [leaf for leaf in tree_leaves(list(vars(value).values())) if isinstance(leaf, torch.Tensor)]
    return found
