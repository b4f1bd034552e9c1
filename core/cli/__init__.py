"""The command line. Only what a command needs is imported, and torch by none that can do without it."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``drivetrain``; returns the exit status: 0 well, 1 an error, 2 wrong usage, 130 interrupted."""
    from drivetrain.cli.app import run
    from drivetrain.cli.ending import leave

    status = run(list(sys.argv[1:] if argv is None else argv))
    leave(status)
    return status
