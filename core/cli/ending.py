"""How the process of a command ends.

Usually the interpreter takes itself apart. A rank of a run must not wait for that: threads of torch's process groups
still let go of tensors then, and a thread that asks a dying interpreter for its lock ends the whole process with
SIGABRT, at random, after everything was done or told. The agent would take it for a crash, and start anew. Neither may
a server that leaves a thread behind, one that makes the parts of a swap, say.
"""

from __future__ import annotations

from drivetrain.ending import end_process

_at_once = False


def end_at_once() -> None:
    """Have this process end right after its command, once what was registered to be done at its end is done."""
    global _at_once
    _at_once = True


def leave(status: int) -> None:
    """End the process where a command has asked for it; otherwise return."""
    if _at_once:
        end_process(status)
