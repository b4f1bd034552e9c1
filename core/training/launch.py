"""Starts the processes of a run through torchrun's elastic agent, as a library."""

from __future__ import annotations

import logging
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from drivetrain.errors import ConfigError

FAILED = 1


@dataclass(frozen=True)
class Launch:
    """How many processes there are, and where they meet.

    processes:    on this machine.
    min_machines, max_machines: how many machines take part; the run goes on with any number between.
    endpoint:     host:port of the rendezvous; None where this machine is alone.
    run_id:       of the rendezvous: the same on every machine, another for each run.
    max_restarts: how often the processes are started again after one of them has died.
    """

    processes: int = 1
    min_machines: int = 1
    max_machines: int = 1
    endpoint: str | None = None
    run_id: str = "drivetrain"
    max_restarts: int = 0

    @classmethod
    def of(cls, processes: int, machines: str, endpoint: str | None, run_id: str | None, max_restarts: int) -> Launch:
        """From the options of the command. Raises ConfigError."""
        low, _, high = machines.partition(":")
        try:
            least, most = int(low), int(high or low)
            if not 1 <= least <= most:
                raise ValueError
        except ValueError as error:
            raise ConfigError(
                "not a number of machines", where="--nnodes", found=machines, allowed="N, or MIN:MAX"
            ) from error
        if most > 1 and endpoint is None:
            raise ConfigError(
                "several machines must be told where to meet",
                where="--rdzv-endpoint",
                hint="Give the same HOST:PORT on each of them.",
            )
        return cls(processes, least, most, endpoint, run_id or "drivetrain", max_restarts)

    def run(self, arguments: Sequence[str]) -> int:
        """Run ``drivetrain ARGUMENTS`` in every process, and wait; the exit status. The processes themselves tell what
        went wrong."""
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

        # The agent's own report of a process that failed would bury what the process has said.
        logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
        alone = self.endpoint is None
        config = LaunchConfig(
            min_nodes=self.min_machines,
            max_nodes=self.max_machines,
            nproc_per_node=self.processes,
            run_id=uuid.uuid4().hex if alone else self.run_id,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0" if alone else self.endpoint or "",
            max_restarts=self.max_restarts,
            monitor_interval=0.2,
        )
        try:
            elastic_launch(config, sys.executable)("-m", "drivetrain", *arguments)
        except ChildFailedError:
            return FAILED
        return 0
