"""Parameters that lie cut, and are put together for as long as a unit of the model computes (ZeRO stage 3).

A unit is gathered before its forward and freed after it, and again around its backward; while it computes, the next one
is on its way. What belongs to no unit, such as embeddings and the last norm, is gathered when the model is first called
and stays until the micro-batch is over. Outside, a module shows its parameters as they lie: this rank's rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from drivetrain.plugins.partitioner.layout import Bucket, copy_all
from drivetrain.plugins.partitioner.offload import ScratchFile
from drivetrain.plugins.partitioner.transport import Rows, Transport


class CutBucket:
    """A bucket whose values lie in sections.

    section_S: this rank's values.
    file:      that the section lies in, where it is offloaded to one.
    shown:     for each piece, the parameter that the modules show while it is cut.
    """

    def __init__(
        self,
        bucket: Bucket,
        section_S: torch.Tensor,
        device: torch.device,
        shown: Sequence[nn.Parameter],
        ranks: int,
        file: ScratchFile | None,
    ) -> None:
        self._device, self._file = device, file
        self.bucket, self.section_S, self.shown = bucket, section_S, list(shown)
        flat, wholes = bucket.new_wholes(section_S.dtype, device)
        for piece, whole in zip(bucket.pieces, wholes, strict=True):
            piece.parameter.data = whole
        # Written through detached views: autograd would take a new gather for a change of what it has saved.
        self._flat = flat
        self._num_bytes = flat.untyped_storage().nbytes()
        raw = [piece.parameter.data for piece in bucket.pieces]
        self._into = [bucket.of_rank(raw, rank) for rank in range(ranks)]
        self.waiting: Callable[[], Rows] | None = None
        self.free()

    def start(self, transport: Transport) -> None:
        if self.waiting is None:
            if self._file is not None:
                self._file.fetch()
            self.waiting = transport.start_gather(self.section_S.to(self._device, non_blocking=True))

    @torch.no_grad()
    def fill(self, transport: Transport) -> None:
        """Have the whole parameters in the model."""
        self.start(transport)
        assert self.waiting is not None
        rows = self.waiting()
        self.waiting = None
        self._flat.untyped_storage().resize_(self._num_bytes)
        for rank, row_S in enumerate(rows):
            copy_all(self._into[rank], self.bucket.in_section(row_S, rank))
        self.let_go()
        for piece in self.bucket.pieces:
            for module, attribute in piece.owners:
                module._parameters[attribute] = piece.parameter

    def let_go(self) -> None:
        """A section in a file need not stay in memory."""
        if self._file is not None:
            self._file.let_go()

    def free(self) -> None:
        self._flat.untyped_storage().resize_(0)
        for piece, shown in zip(self.bucket.pieces, self.shown, strict=True):
            for module, attribute in piece.owners:
                module._parameters[attribute] = shown

    def drop_waiting(self) -> None:
        if self.waiting is not None:
            self.waiting()
            self.waiting = None


class _Unit:
    """Some buckets that are gathered together.

    missing: trained buckets whose gradients are not taken yet in this backward.
    """

    def __init__(self, buckets: Sequence[CutBucket]) -> None:
        self.buckets = list(buckets)
        self.is_whole = False
        self.in_backward = False
        self.is_all_trained = all(cut.bucket.trained for cut in buckets)
        self.missing: set[Bucket] = set()


class Units:
    """Gathers and frees the units of a model as it runs."""

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        methods: Sequence[str],
        cut: Sequence[CutBucket],
        transport: Transport,
    ) -> None:
        self._transport = transport
        self._is_accumulating = False
        self._root = _Unit([c for c in cut if c.bucket.unit is None])
        self._units = [_Unit([c for c in cut if c.bucket.unit == number]) for number in range(len(names))]
        self._of_bucket = {c.bucket: unit for unit in (self._root, *self._units) for c in unit.buckets}
        self._order: list[_Unit] = []
        self._last_order: list[_Unit] = []
        for name, unit in zip(names, self._units, strict=True):
            module = model.get_submodule(name)
            module.register_forward_pre_hook(self._before_forward(unit), prepend=True)
            module.register_forward_hook(self._after_forward(unit))
        model.register_forward_pre_hook(lambda *_: self._gather(self._root), prepend=True)
        model.register_forward_hook(lambda *_: self._leave_root())
        for name in methods:
            setattr(model, name, self._with_root(getattr(model, name)))

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        self._is_accumulating = True
        self._order = []
        try:
            yield
        finally:
            self._is_accumulating = False
            self._last_order = self._order
            for unit in (self._root, *self._units):
                for cut in unit.buckets:
                    cut.drop_waiting()
                self._free(unit)

    def taken(self, bucket: Bucket) -> None:
        """The gradients of a bucket are on their way. Where all of a unit are, and nothing in it is frozen, no more of
        its backward is to come."""
        unit = self._of_bucket[bucket]
        unit.missing.discard(bucket)
        if unit is not self._root and unit.in_backward and not unit.missing and unit.is_all_trained:
            self._free(unit)

    def _gather(self, unit: _Unit) -> None:
        if unit.is_whole:
            return
        for cut in unit.buckets:
            cut.start(self._transport)
        for cut in unit.buckets:
            cut.fill(self._transport)
        unit.is_whole = True

    def _start(self, unit: _Unit) -> None:
        if not unit.is_whole:
            for cut in unit.buckets:
                cut.start(self._transport)

    def _free(self, unit: _Unit) -> None:
        if unit.is_whole:
            for cut in unit.buckets:
                cut.free()
        unit.is_whole = unit.in_backward = False

    def _leave_root(self) -> None:
        if not self._is_accumulating:
            self._free(self._root)

    def _with_root(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self._gather(self._root)
            try:
                return method(*args, **kwargs)
            finally:
                self._leave_root()

        return call

    def _before_forward(self, unit: _Unit) -> Callable[..., None]:
        def gather(*_: Any) -> None:
            self._gather(unit)
            if self._is_accumulating and torch.is_grad_enabled() and not unit.in_backward:
                self._order.append(unit)
                place = len(self._order)
                if place < len(self._last_order) and self._last_order[place - 1] is unit:
                    self._start(self._last_order[place])

        return gather

    def _after_forward(self, unit: _Unit) -> Callable[..., None]:
        def leave(module: nn.Module, args: object, output: object) -> None:
            if unit.in_backward:
                return  # computed anew, and about to be used
            if torch.is_grad_enabled():
                for tensor in _tensors(output):
                    if tensor.requires_grad:
                        tensor.register_hook(lambda gradient: self._before_backward(unit))
                if self._is_accumulating and self._last_order and self._last_order[-1] is unit:
                    return  # backward begins with it
            self._free(unit)

        return leave

    def _before_backward(self, unit: _Unit) -> None:
        if unit.in_backward:
            return
        for other in self._units:
            if other.in_backward:
                self._free(other)  # backward has gone through what this unit's output went into
        self._gather(unit)
        unit.in_backward = True
        unit.missing = {cut.bucket for cut in unit.buckets if cut.bucket.trained}
        place = next((i for i in reversed(range(len(self._order))) if self._order[i] is unit), 0)
        if place > 0:
            self._start(self._order[place - 1])


def _tensors(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
