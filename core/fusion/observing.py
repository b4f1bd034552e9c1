"""What a module does in one run: which module is called with which tensors, and how many operations are launched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Example = tuple[Sequence[Any], Mapping[str, Any]]
"""Positional and named arguments of one call."""


@dataclass(frozen=True)
class Call:
    """One call of a module.

    first:   the first tensor among the arguments; None without one.
    version: how often it had been written to in place by then.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    first: torch.Tensor | None
    version: int

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Self:
        leaves = (args[0],) if args and isinstance(args[0], torch.Tensor) else tree_leaves((args, kwargs))
        first = next((leaf for leaf in leaves if isinstance(leaf, torch.Tensor)), None)
        version = 0 if first is None or first.is_inference() else first._version
        return cls(args, dict(kwargs), first, version)


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

    @cached_property
    def readers(self) -> Mapping[int, list[nn.Module]]:
        """id of a tensor -> the modules that are called with it first among their arguments."""
        found: dict[int, list[nn.Module]] = {}
        for module, calls in self.calls.items():
            for call in calls:
                if call.first is not None:
                    found.setdefault(id(call.first), []).append(module)
        return found

    def only_call(self, module: nn.Module) -> Call | None:
        """Its call, if it was called exactly once."""
        calls = self.calls.get(module, [])
        return calls[0] if len(calls) == 1 else None


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or torch imports its compiler, which takes longer than all else here

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if not func.is_view:
            self.count += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def _same_chance(module: nn.Module) -> Iterator[None]:
    """The same random numbers in every run, so that a dropout drops the same; afterwards all is as before."""
    parameter = next(module.parameters(), None)
    on_gpu = parameter is not None and parameter.device.type == "cuda"
    with torch.random.fork_rng(devices=[parameter.device] if on_gpu and parameter is not None else []):
        torch.manual_seed(0)
        yield


@torch.no_grad()
def observe(module: nn.Module, example: Example) -> Run:
    """Run ``module`` on ``example`` without gradients."""
    run, counter, started = Run(), _Counter(), []

    def before(called: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        run.calls.setdefault(called, []).append(Call.of(args, kwargs))
        started.append(counter.count)

    def after(called: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        run.outputs.setdefault(called, []).append(output)
        run.operations_of[called] = run.operations_of.get(called, 0) + counter.count - started.pop()

    handles: list[Any] = []
    try:
        for part in set(module.modules()):
            handles.append(part.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(part.register_forward_hook(after))
        with _same_chance(module), counter:
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
