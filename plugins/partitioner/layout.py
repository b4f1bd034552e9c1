"""How parameters are cut: by rows, so that what a rank holds is a slice of every parameter, as a DTensor has it.

Rows of dim 0 are dealt out in runs as ``torch.chunk`` does: ``ceil(rows / ranks)`` to each, so that the last ranks may
get fewer or none. Parameters are put together in buckets; a bucket's *section* for a rank is that rank's rows of each
of its parameters, one after the other, padded so that all sections of a bucket have one size S.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

_ALIGNMENT = 16
"""Elements: every parameter starts at a multiple of them, so that vector instructions find it aligned."""


@dataclass(frozen=True)
class Piece:
    """A parameter of the model, and how its rows are dealt out.

    parameter: the whole one, which the model computes with.
    owners:    every module that has it, and under which attribute; several where it is shared.
    """

    name: str
    parameter: nn.Parameter
    owners: tuple[tuple[nn.Module, str], ...]
    num_ranks: int

    @property
    def shape(self) -> torch.Size:
        return self.parameter.shape

    @property
    def row_numel(self) -> int:
        return math.prod(self.shape[1:])

    @property
    def padded_numel(self) -> int:
        """Elements of the largest share, rounded up."""
        numel = self._rows_each * self.row_numel
        return -(-numel // _ALIGNMENT) * _ALIGNMENT

    @property
    def _rows_each(self) -> int:
        return -(-self.shape[0] // self.num_ranks)

    def rows(self, rank: int) -> tuple[int, int]:
        """First row of a rank, and the one behind its last."""
        return min(rank * self._rows_each, self.shape[0]), min((rank + 1) * self._rows_each, self.shape[0])

    def of_rank(self, whole: torch.Tensor, rank: int) -> torch.Tensor:
        """The rank's rows of a tensor that has the parameter's shape."""
        first, end = self.rows(rank)
        return whole[first:end]


class Bucket:
    """Parameters that travel together.

    unit:    number of the unit they belong to; None for those of the model itself.
    trained: whether they get gradients.
    size:    elements of a section.
    """

    def __init__(self, pieces: Sequence[Piece], unit: int | None, trained: bool) -> None:
        self.pieces = tuple(pieces)
        self.unit = unit
        self.trained = trained
        offsets = [0]
        for piece in self.pieces:
            offsets.append(offsets[-1] + piece.padded_numel)
        self._offsets = offsets[:-1]
        self.size = offsets[-1]

    def in_section(self, section_S: torch.Tensor, rank: int) -> list[torch.Tensor]:
        """A rank's rows of each parameter, as views of that rank's section."""
        views = []
        for piece, offset in zip(self.pieces, self._offsets, strict=True):
            first, end = piece.rows(rank)
            numel = (end - first) * piece.row_numel
            views.append(section_S[offset : offset + numel].view(end - first, *piece.shape[1:]))
        return views

    def of_rank(self, wholes: Sequence[torch.Tensor], rank: int) -> list[torch.Tensor]:
        """A rank's rows of tensors that have the parameters' shapes."""
        return [piece.of_rank(whole, rank) for piece, whole in zip(self.pieces, wholes, strict=True)]

    def new_wholes(self, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """One tensor with room for all parameters, whole, and the view of it that each of them gets."""
        starts, end = [], 0
        for piece in self.pieces:
            starts.append(end)
            end += -(-piece.parameter.numel() // _ALIGNMENT) * _ALIGNMENT
        flat = torch.empty(end, dtype=dtype, device=device)
        views = [
            flat[start : start + piece.parameter.numel()].view(piece.shape)
            for start, piece in zip(starts, self.pieces, strict=True)
        ]
        return flat, views


def floating_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What can be cut and trained, by its first name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.is_floating_point()}


def pieces_of(model: nn.Module, num_ranks: int) -> tuple[list[Piece], list[Piece]]:
    """The parameters that are cut, and those of no dim, of which every rank has its own copy."""
    owners: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(parameter, []).append((module, attribute))
    pieces = [
        Piece(name, parameter, tuple(owners[parameter]), num_ranks)
        for name, parameter in floating_parameters(model).items()
    ]
    return [piece for piece in pieces if piece.parameter.dim()], [p for p in pieces if not p.parameter.dim()]


def units_of_pieces(model: nn.Module, units: Sequence[str], pieces: Sequence[Piece]) -> list[int | None]:
    """The number of the unit that each piece belongs to; None where it is of none or of several."""
    inside: dict[nn.Module, int] = {}
    for number, name in enumerate(units):
        for module in model.get_submodule(name).modules():
            inside[module] = number
    numbers = []
    for piece in pieces:
        found = {inside.get(module) for module, _ in piece.owners}
        numbers.append(found.pop() if len(found) == 1 else None)
    return numbers


def make_buckets(
    pieces: Sequence[Piece], units: Sequence[int | None], kinds: Sequence[object], bucket_bytes: int
) -> list[Bucket]:
    """Buckets in the order in which backward usually completes them: the last parameters first.

    kinds: pieces of one bucket have one kind; it also says whether they are trained.
    """
    buckets: list[Bucket] = []
    for run in _runs(pieces, units, kinds, bucket_bytes):
        first = run[0]
        buckets.append(Bucket([pieces[i] for i in run], units[first], pieces[first].parameter.requires_grad))
    return buckets


def _runs(
    pieces: Sequence[Piece], units: Sequence[int | None], kinds: Sequence[object], bucket_bytes: int
) -> Iterator[list[int]]:
    """Numbers of the pieces of each bucket."""
    open_runs: dict[tuple[object, int | None], list[int]] = {}
    done: list[list[int]] = []
    last_unit: int | None = None
    for index in reversed(range(len(pieces))):
        if units[index] != last_unit:
            open_runs.clear()  # a bucket does not wait for parameters on the other side of another unit
            last_unit = units[index]
        key = (kinds[index], units[index])
        run = open_runs.get(key)
        held = sum(pieces[i].parameter.nbytes for i in run) if run else 0
        if run is None or held + pieces[index].parameter.nbytes > bucket_bytes:
            run = open_runs[key] = []
            done.append(run)
        run.append(index)
    yield from done


def copy_all(into: Sequence[torch.Tensor], found: Sequence[torch.Tensor]) -> None:
    """Copy tensor by tensor, in one call."""
    pairs = [(a, b) for a, b in zip(into, found, strict=True) if a.numel()]
    if pairs:
        torch._foreach_copy_([a for a, _ in pairs], [b for _, b in pairs])
