"""``drivetrain rendezvous``: keeps the place where the machines of a training run meet."""

from __future__ import annotations

import threading
from typing import Annotated

import typer

from drivetrain.cli.console import note
from drivetrain.errors import ConfigError


def rendezvous(
    endpoint: Annotated[str, typer.Argument(metavar="HOST:PORT", help="Where to listen; port 0 takes a free one.")],
) -> int:
    """Keep the place where the machines of training runs meet, until it is interrupted.

    Without it the first machine of a run keeps the place, and the run ends with that machine.

    Example: drivetrain rendezvous 127.0.0.1:29400
    """
    from torch.distributed import TCPStore

    from drivetrain.training.launch import split_endpoint

    host, port = split_endpoint(endpoint)
    try:
        place = TCPStore(host, port, is_master=True, wait_for_workers=False, multi_tenant=True)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"nothing can be kept there: {error}", where="HOST:PORT", found=endpoint) from error
    print(f"{host}:{place.port}", flush=True)
    note("give this as --rdzv-endpoint to drivetrain train on each machine; Ctrl-C ends it")
    threading.Event().wait()
    return 0
