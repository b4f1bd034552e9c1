"""What a fusion did and what it left, with the reasons."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Fused:
    """One place where operations became one.

    pattern:         name of the pattern: ``shared_input``, ``add_norm``, ...
    where:           dotted path of the module.
    what:            what was there, for a person to read: ``q_proj + k_proj + v_proj``.
    operation:       the logical operation that does it now.
    provider:        the kernel provider that the operation is bound to.
    bytes_per_token: reads and writes of main memory that are no longer needed, by the sizes alone.
    """

    pattern: str
    where: str
    what: str
    operation: str
    provider: str
    bytes_per_token: int


@dataclass(frozen=True)
class Left:
    """One place that a pattern looked at and left as it was."""

    pattern: str
    where: str
    reason: str


@dataclass(frozen=True)
class FusionReport:
    """What :func:`drivetrain.fusion.fuse` did to a module.

    fused, left:  every place, in the order in which the patterns came to it.
    num_layers:   layers of the module: the children of its longest list of modules; 0 without one.
    layer_operations_before, layer_operations_after: operations that one layer launches, as counted in a run over a few
                  tokens: everything torch dispatches that is not a mere view. An operation outside of torch shows as
                  the allocation of its result. 0 without layers.
    operations_before, operations_after: the same for the whole module.
    """

    fused: tuple[Fused, ...] = ()
    left: tuple[Left, ...] = ()
    num_layers: int = 0
    layer_operations_before: float = 0.0
    layer_operations_after: float = 0.0
    operations_before: int = 0
    operations_after: int = 0

    @property
    def bytes_per_token(self) -> int:
        """Reads and writes of main memory that are no longer needed for each token."""
        return sum(one.bytes_per_token for one in self.fused)

    def to_dict(self) -> dict[str, Any]:
        """For JSON. Like places of all layers are one row, with their number and ``*`` for the layer."""
        rows = {"fused": _rows(self.fused), "left": _rows(self.left)}
        return {**dataclasses.asdict(self), **rows, "bytes_per_token": self.bytes_per_token}

    def summary(self) -> str:
        """One line for a log."""
        if not self.fused:
            return "fusion: nothing to fuse"
        per_layer = (
            f", operations per layer {self.layer_operations_before:g} -> {self.layer_operations_after:g}"
            if self.num_layers
            else f", operations {self.operations_before} -> {self.operations_after}"
        )
        return f"fusion: {len(self.fused)} places{per_layer}, {self.bytes_per_token} bytes less a token"

    def lines(self) -> list[str]:
        """The report for a person."""
        done = [
            f"{row['places']} x {row['pattern']} at {row['where'] or 'the top'}: {row['what']} -> {row['operation']} "
            f"({row['provider']})"
            for row in _rows(self.fused)
        ]
        kept = [
            f"{row['places']} x {row['pattern']} at {row['where'] or 'the top'}: left: {row['reason']}"
            for row in _rows(self.left)
        ]
        return [self.summary(), *done, *kept]


def _rows(entries: Sequence[Fused | Left]) -> list[dict[str, Any]]:
    counts: dict[Fused | Left, int] = {}
    for entry in entries:
        where = ".".join("*" if part.isdigit() else part for part in entry.where.split("."))
        like = dataclasses.replace(entry, where=where)
        counts[like] = counts.get(like, 0) + 1
    return [{**dataclasses.asdict(entry), "places": count} for entry, count in counts.items()]
