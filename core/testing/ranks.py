"""New processes for suites: alone, or joined by Gloo for what works over ranks."""

from __future__ import annotations

import functools
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerContext, SpawnContext

_PRELOADED = ("torch", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict", "pytest")
"""What most ranks import, or what torch imports for them when they make an optimizer; nothing of ours."""


@functools.cache
def process_context() -> ForkServerContext | SpawnContext:
    """What starts processes that know nothing of this one: where the operating system has them, forks of a server that
    has imported torch and nothing of ours, since torch takes seconds.

    They begin with the environment of the first call.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*_PRELOADED])
    return context


def spawn_ranks(
    work: Callable[..., None], arguments: tuple[Any, ...], *, meet: Path, count: int, seconds: float
) -> None:
    """Call ``work(rank, *arguments)`` in ``count`` processes, and wait for all of them.

    work:    a function of a module, which the processes import.
    meet:    a file that does not exist yet, by which they find each other.
    seconds: after which the test fails and what still runs is killed.

    Raises what the first rank that failed raised (``torch.multiprocessing.ProcessRaisedException``).
    """
    context = torch.multiprocessing.start_processes(
        _rank_main,
        args=(work, arguments, str(meet), count, seconds, dict(os.environ)),
        nprocs=count,
        join=False,
        start_method=process_context().get_start_method(),
    )
    assert context is not None
    try:
        deadline = time.monotonic() + seconds
        while not context.join(1.0):  # true once all have ended; raises what the first of them raised
            if time.monotonic() > deadline:
                pytest.fail(f"the ranks did not end within {seconds:g} s")
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()


def _rank_main(
    rank: int,
    work: Callable[..., None],
    arguments: tuple[Any, ...],
    meet: str,
    count: int,
    seconds: float,
    environment: Mapping[str, str],
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meet}", rank=rank, world_size=count, timeout=timedelta(seconds=seconds)
    )
    try:
        work(rank, *arguments)
    finally:
        torch.distributed.destroy_process_group()
    # Not taken apart by the interpreter: a thread of torch's process groups that still lets go of a tensor then ends
    # the process with SIGABRT, now and then, after all was done.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
