"""What commands print with: tables, notes, and progress that is a bar on a terminal and plain lines elsewhere."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from drivetrain.contracts.source import Progress


def note(text: str) -> None:
    """One line beside the command's output, on standard error."""
    print(text, file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    """JSON on standard output, indented, with anything unknown as its text."""
    print(json.dumps(value, indent=2, default=str))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table: fitted to the width of a terminal, whole lines elsewhere so that other programs can read it."""
    texts = [["" if cell is None else str(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(*columns, box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
        for row in texts:
            table.add_row(*(Text(cell) for cell in row))
        Console().print(table)
        return
    widths = [max(len(line[i]) for line in [list(columns), *texts]) for i in range(len(columns))]
    for line in [list(columns), *texts]:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def format_number(value: float, unit: str) -> str:
    """``value`` of ``unit`` for people: bytes in MiB or GiB, other numbers as they are."""
    if unit == "bytes":
        return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.1f} MiB"
    return f"{value:g} {unit}"


@contextmanager
def show_progress() -> Iterator[Progress]:
    """A progress receiver for long work."""
    if sys.stderr.isatty():
        with _bars() as progress:
            yield progress
    else:
        yield _Lines()


@contextmanager
def _bars() -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    bars = RichProgress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        TextColumn("{task.fields[amount]}"),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    tasks: dict[str, Any] = {}

    def receive(what: str, done: int, total: int | None, unit: str = "bytes") -> None:
        amount = format_number(done, unit) + (f" / {format_number(total, unit)}" if total else "")
        if what not in tasks:
            tasks[what] = bars.add_task(what, total=total, amount=amount)
        bars.update(tasks[what], completed=done, total=total, amount=amount)

    with bars:
        yield receive


class _Lines:
    """Progress as lines: the first, every five seconds with the time that is left, and the last."""

    def __init__(self) -> None:
        self._printed: dict[str, float] = {}
        self._begun: dict[str, tuple[float, int]] = {}
        self._ended: set[str] = set()

    def __call__(self, what: str, done: int, total: int | None, unit: str = "bytes") -> None:
        now = time.monotonic()
        is_end = total is not None and done >= total
        if what in self._ended or (not is_end and now - self._printed.get(what, -1e9) < 5):
            return
        self._printed[what] = now
        since, first = self._begun.setdefault(what, (now, done))
        if is_end:
            self._ended.add(what)
        if total is None:
            note(what if done == 0 else f"{what}: {format_number(done, unit)}")
        else:
            text = f"{what}: {format_number(done, unit) if unit == 'bytes' else done} of {format_number(total, unit)}"
            # Counted from what was there at the beginning: a run that goes on has done some of it before.
            if done > first and not is_end:
                text += f", about {(now - since) * (total - done) / (done - first):.0f} s left"
            note(text)
