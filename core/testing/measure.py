"""What the suites measure: tensors that an object keeps alive, and what torch operations allocate."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def _parts(value: object) -> Iterator[object]:
    """What ``value`` refers to directly, as far as it may hold tensors."""
    if isinstance(value, Mapping):
        yield from value.values()
    elif isinstance(value, Sequence | Set) and not isinstance(value, str | bytes):
        yield from value
    elif isinstance(value, functools.partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, types.MethodType):
        yield from (value.__self__, value.__func__)
    elif isinstance(value, types.FunctionType):
        yield from (cell.cell_contents for cell in value.__closure__ or ())
    elif not isinstance(value, type | types.ModuleType):
        yield from getattr(value, "__dict__", {}).values()
        for base in type(value).__mro__:
            slots = base.__dict__.get("__slots__", ())
            for name in (slots,) if isinstance(slots, str) else slots:
                if hasattr(value, name):
                    yield getattr(value, name)


def reachable_tensors(root: object) -> list[torch.Tensor]:
    """Every tensor that ``root`` keeps alive through attributes, containers and closures, each once."""
    seen: set[int] = set()
    found: list[torch.Tensor] = []
    stack = [root]
    while stack:
        value = stack.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            found.append(value)
        else:
            stack.extend(_parts(value))
    return found


def tensor_bytes(root: object) -> int:
    """Bytes of the storages behind :func:`reachable_tensors`; what several tensors share counts once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in reachable_tensors(root)}
    return sum(storage.nbytes() for storage in storages.values())


class Allocations(TorchDispatchMode):
    """Within this context, remembers the largest result of a torch operation that lies neither in memory of what it
    was given nor on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.largest_bytes = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta"]
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        known = {leaf.untyped_storage().data_ptr() for leaf in given if leaf.device.type != "meta"}
        for leaf in made:
            if leaf.untyped_storage().data_ptr() not in known:
                self.largest_bytes = max(self.largest_bytes, leaf.nbytes)
        return result


class HostTraffic(TorchDispatchMode):
    """Within this context, remembers operations that brought more than single numbers from a device to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        if any(leaf.device.type != "cpu" for leaf in given):
            if any(leaf.device.type == "cpu" and leaf.numel() > 1 for leaf in made):
                self.operations.append(str(func))
        return result
