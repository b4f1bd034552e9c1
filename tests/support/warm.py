"""Python in a process of its own that has torch imported when it starts, which saves two seconds each time.

A server process imports once and forks for each call. What a command imports by itself, and how long that takes, is
tested elsewhere, with processes that start from nothing.
"""

from __future__ import annotations

import atexit
import functools
import multiprocessing
import os
import sys
import tempfile
import traceback
import warnings
import weakref
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path

PRELOADED = ["numpy", "torch", "torch._dynamo", "drivetrain.cli.options", "drivetrain.serving.llm"]
"""What nearly every command imports, and what torch imports for an optimizer."""


@functools.cache
def _server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def run_warm(entry: Callable[[], int | None], cwd: Path, seconds: float, *, strict: bool = False) -> tuple[int, str]:
    """Exit status and output, standard error included, of ``entry``, called in a process of its own in ``cwd``.

    entry:  can be pickled; what it returns is the exit status.
    strict: warnings are errors.

    Raises TimeoutError after ``seconds``; the process is killed.
    """
    with tempfile.NamedTemporaryFile(suffix=".out") as file:
        process = _server().Process(target=_run, args=(entry, str(cwd), file.name, strict))
        process.start()
        process.join(seconds)
        late = process.is_alive()
        if late:
            process.kill()
            process.join()
        output = file.read().decode("utf-8", errors="replace")
    if late:
        raise TimeoutError(f"not done after {seconds:g} s; so far: {output}")
    assert process.exitcode is not None
    return process.exitcode, output


def _run(entry: Callable[[], int | None], cwd: str, output: str, strict: bool) -> None:
    """In the new process: as if the interpreter had been started for ``entry`` alone."""
    for finalizer in list(weakref.finalize._registry):  # thousands of torch's, which the server has left
        finalizer.atexit = False
    os.chdir(cwd)
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    if strict:
        warnings.simplefilter("error")
    status = 1
    try:
        status = entry() or 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
