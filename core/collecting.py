"""Python's garbage collector while a program starts.

What is made then stays: modules, classes, plugins, a model. Looking for garbage among it again and again takes a tenth
of the time to a first token, so the command line looks seldom until there is work to do.
"""

from __future__ import annotations

import gc

_USUAL = gc.get_threshold()
_SELDOM = (1_000_000, 10, 10)
"""More than a start makes, and less than a command that never begins work could do without."""


def collect_seldom() -> None:
    """From here on until :func:`collect_as_usual`."""
    gc.set_threshold(*_SELDOM)


def collect_as_usual() -> None:
    """Where work begins: garbage of requests and steps may hold tensors. Nothing without :func:`collect_seldom`."""
    if gc.get_threshold() == _SELDOM:
        # What is there becomes old without being looked at: there and back, it lies in the oldest generation.
        gc.freeze()
        gc.unfreeze()
        gc.set_threshold(*_USUAL)
