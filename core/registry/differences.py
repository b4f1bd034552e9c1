"""Two sides that should be equal and are not: a table of what differs, and the error that carries it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from drivetrain.errors import PluginError


@dataclass(frozen=True)
class Difference:
    """One thing that the two sides say differently.

    path:         what it is: a distribution, or a dotted path in a plan.
    ours, theirs: what each side says; ``"(absent)"`` where it says nothing.
    """

    path: str
    ours: str
    theirs: str


ABSENT = "(absent)"


class DifferencesError(PluginError):
    """Two sides that had to be equal differ.

    differences: all of them.
    columns:     heads of the table that the message ends with: what differs, and the names of the two sides.
    """

    def __init__(
        self,
        what: str,
        differences: Sequence[Difference],
        *,
        columns: tuple[str, str, str],
        where: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(what, where=where, hint=hint)
        self.differences = tuple(differences)
        self.columns = columns

    @property
    def line(self) -> str:
        """The message without the table."""
        return super().__str__()

    @property
    def table(self) -> str:
        """The differences in aligned columns, a line each."""
        rows = [self.columns, *((d.path, d.ours, d.theirs) for d in self.differences)]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        )

    def __str__(self) -> str:
        return f"{self.line}\n{self.table}"
