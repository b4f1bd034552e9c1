"""``drivetrain plugins lock``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from drivetrain.cli.console import note, print_table
from drivetrain.registry.lock import DEFAULT_FILE, write_lock


def lock(
    file: Annotated[Path, typer.Option("--file", help="Where to write.")] = Path(DEFAULT_FILE),
) -> None:
    """Write down which distributions register plugins here: versions, and hashes of their files.

    A command with --locked FILE, or a configuration with plugins.lock, then refuses to run with anything else.

    Example: drivetrain plugins lock --file plugins.lock
    """
    written = write_lock(file)
    rows = []
    for name, locked in sorted(written.items()):
        how = "its version only: editable" if locked.is_editable else "its version only: no RECORD"
        rows.append((name, locked.version, f"sha256 {locked.record}" if locked.record else how))
    print_table(("distribution", "version", "locked by"), rows)
    note(f"{len(rows)} {'distribution' if len(rows) == 1 else 'distributions'} locked in {file}")
