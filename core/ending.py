"""The end of a process that does not take itself apart."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from typing import NoReturn


def end_process(status: int) -> NoReturn:
    """End as any process does, after its threads and what was registered to be done at its end, but leave memory as it
    is: taking torch apart takes seconds, and may fail where other threads still let go of tensors."""
    threading._shutdown()  # type: ignore[attr-defined]  # pools of threads are told, and threads are waited for
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)
