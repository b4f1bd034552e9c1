"""The command line. Only what a command needs is imported, and torch by none that can do without it."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from drivetrain.collecting import collect_seldom


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``drivetrain``; returns the exit status: 0 well, 1 an error, 2 wrong usage, 130 interrupted."""
    from drivetrain.cli.app import run

    return run(list(sys.argv[1:] if argv is None else argv))


def program() -> int:
    """The process ``drivetrain``: it looks for garbage seldom until it has work, and one that has loaded torch does not
    take itself apart, which takes a second and more.

    A rank of a run must not: threads of torch's process groups still let go of tensors then, and a thread that asks a
    dying interpreter for its lock ends the whole process with SIGABRT, at random, after everything was done or told.
    The agent would take it for a crash, and start anew. Neither may a server that leaves a thread behind, one that
    makes the parts of a swap, say.
    """
    collect_seldom()
    status = main()
    if "torch" in sys.modules:
        from drivetrain.ending import end_process

        end_process(status)
    return status
