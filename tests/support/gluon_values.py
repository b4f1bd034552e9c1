"""Runs a kernel written in Gluon on plain numbers, program by program, without a GPU: what Triton's interpreter does
for kernels in Triton, and can't for these.

Layouts say which thread has a number, and are ignored: that conversions move nothing is for the compiler to find, which
is asked in ``test_triton_compiles.py``. Memory is not ignored. A load or store that is not masked out has to lie within
its tensor, a copy to shared memory arrives when it is waited for and not before, and until then, and from the moment in
which the next copy to the same place begins, what is there is garbage.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from typing import Any

import torch


class Values(torch.Tensor):
    """A tensor of numbers with the methods that differ between torch and Gluon."""

    def to(self, dtype: torch.dtype, bitcast: bool = False) -> Values:  # type: ignore[override]
        return self.view(dtype) if bitcast else super().to(dtype)

    def split(self) -> tuple[Values, ...]:  # type: ignore[override]
        return self.unbind(-1)

    def __iadd__(self, other: Any) -> Values:  # type: ignore[misc]
        return self + other  # a name gets another number: what else has the old one keeps it


def values(x: torch.Tensor) -> Values:
    return x.as_subclass(Values)


class _Element:
    def __init__(self, dtype: torch.dtype) -> None:
        self.element_ty = dtype


class Pointer:
    """Places in a tensor."""

    def __init__(self, memory: torch.Tensor, places: Any = 0) -> None:
        assert memory.is_contiguous()
        self.memory, self.places, self.dtype = memory.view(-1), places, _Element(memory.dtype)

    def __add__(self, places: Any) -> Pointer:
        return Pointer(self.memory, self.places + places)

    def checked(self, mask: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Places, 0 where the mask has none, and the mask."""
        places = torch.as_tensor(self.places).as_subclass(torch.Tensor).long()
        mask = torch.as_tensor(True if mask is None else mask).as_subclass(torch.Tensor)
        places, mask = torch.broadcast_tensors(places, mask)
        asked = places[mask]
        if asked.numel() and not 0 <= int(asked.min()) <= int(asked.max()) < len(self.memory):
            raise IndexError(f"places {int(asked.min())} to {int(asked.max())} of {len(self.memory)}")
        return torch.where(mask, places, 0), mask


def load(pointer: Pointer, mask: Any = None, other: float = 0) -> Values:
    places, mask = pointer.checked(mask)
    found = torch.where(mask, pointer.memory[places], torch.tensor(other).to(pointer.memory.dtype))
    return values(found)


def store(pointer: Pointer, found: Values, mask: Any = None) -> None:
    places, mask = pointer.checked(mask)
    found = found.as_subclass(torch.Tensor).expand(places.shape)
    assert found.dtype == pointer.memory.dtype
    assert len(places[mask].unique()) == int(mask.sum()), "two numbers are stored at one place"
    pointer.memory[places[mask]] = found[mask]


class Shared:
    """Shared memory of a program, a part of it, and the copies to it that are on their way."""

    def __init__(self, memory: torch.Tensor) -> None:
        self.memory = memory
        _spoil(memory)

    def index(self, number: int) -> Shared:
        part = object.__new__(Shared)
        part.memory = self.memory[number]
        return part

    def load(self, layout: object) -> Values:
        return values(self.memory.clone())


def _spoil(memory: torch.Tensor) -> None:
    memory.fill_(math.nan if memory.is_floating_point() else 0x5A5A5A5A)


class Copies:
    """Copies to shared memory in groups, in the order in which they were asked for."""

    def __init__(self) -> None:
        self._open: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._groups: list[list[tuple[torch.Tensor, torch.Tensor]]] = []

    def load(self, target: Shared, pointer: Pointer, mask: Any = None) -> None:
        places, mask = pointer.checked(mask)
        assert places.shape == target.memory.shape
        _spoil(target.memory)
        if bool(mask.any()):
            assert bool(mask.all())
            self._open.append((target.memory, pointer.memory[places]))

    def commit_group(self) -> None:
        self._groups.append(self._open)
        self._open = []

    def wait_group(self, left: int) -> None:
        while len(self._groups) > left:
            for target, found in self._groups.pop(0):
                target.copy_(found)


def _minimum(a: Any, b: Any) -> Any:
    return torch.minimum(torch.as_tensor(a), torch.as_tensor(b)) if torch.is_tensor(a) else min(a, b)


def _multiply(a: Values, b: Values, total: Values) -> Values:
    return total + a.float() @ b.float()


class _Language(types.SimpleNamespace):
    """``gl`` of one program."""

    def __init__(self, program: tuple[int, ...]) -> None:
        dtypes = {name: getattr(torch, name) for name in ("int16", "int32", "int64", "float16", "bfloat16", "float32")}
        layouts = "BlockedLayout SliceLayout DistributedLinearLayout NVMMADistributedLayout DotOperandLayout"
        ignored = dict.fromkeys([*layouts.split(), "SwizzledSharedLayout"], lambda *arguments: None)
        super().__init__(
            **dtypes,
            **ignored,
            program_id=lambda axis: values(torch.tensor(program[axis], dtype=torch.int32)),
            cdiv=lambda a, b: -(-a // b),
            static_assert=_check,
            static_range=range,
            arange=lambda first, end, layout=None: values(torch.arange(first, end, dtype=torch.int32)),
            zeros=lambda shape, dtype, layout=None: values(torch.zeros(shape, dtype=dtype)),
            full=lambda shape, value, dtype, layout=None: values(torch.full(shape, value, dtype=dtype)),
            minimum=_minimum,
            sum=lambda x, axis: x.sum(axis),
            join=lambda a, b: torch.stack((a, b), -1),
            convert_layout=lambda x, layout, assert_trivial=False: x,
            allocate_shared_memory=lambda dtype, shape, layout: Shared(torch.empty(shape, dtype=dtype)),
            load=load,
            store=store,
        )


def _check(condition: bool) -> None:
    assert condition


class Kernel:
    """Launched as Gluon's are: ``Kernel(kernel)[grid](*arguments, **options)``. Tensors are on the CPU, dense."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            options = {name: value for name, value in options.items() if name in self._kernel.arg_names}
            placed = [Pointer(value) if torch.is_tensor(value) else value for value in arguments]
            for program in product(*(range(size) for size in grid)):
                _run(self._kernel, program)(*placed, **options)

        return launch


def _run(kernel: Any, program: tuple[int, ...]) -> Callable[..., None]:
    """The kernel's function with what it calls replaced by what works on numbers."""
    copies = Copies()
    replaced: dict[str, Any] = {
        "gl": _Language(program),
        "async_copy": types.SimpleNamespace(commit_group=copies.commit_group, wait_group=copies.wait_group),
        "async_load": copies.load,
        "mma_v2": _multiply,
    }
    names: dict[str, Any] = {**kernel.fn.__globals__, **replaced}
    for name, value in _jitted(names):
        names[name] = types.FunctionType(value.fn.__code__, names, name, value.fn.__defaults__)
    return types.FunctionType(kernel.fn.__code__, names)


def _jitted(names: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in list(names.items()):
        if hasattr(value, "fn") and hasattr(value, "arg_names"):
            yield name, value
