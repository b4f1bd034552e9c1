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
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)
