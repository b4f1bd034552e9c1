"""Starts the processes of a run through torchrun's elastic agent, as a library."""

from __future__ import annotations

import logging
import math
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drivetrain.errors import ConfigError, TrainingError
from drivetrain.training.pulse import Pulses

if TYPE_CHECKING:
    from torch.distributed.elastic.rendezvous import RendezvousHandler

FAILED = 1
RESTARTS = 3
"""Restarts where nothing else is asked for and there is more than one process."""

_JOIN_SECONDS = 600
_KEEP_ALIVE_SECONDS, _KEEP_ALIVE_MISSES = 2, 5
"""An agent that has not been heard of for their product is taken out of the run."""

_ANOTHER_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
"""The agent's own switch: workers meet at a store that is made anew for each start. With the shared one, ranks that are
started again find what the ranks before them have left there, and the start fails now and then."""


@dataclass(frozen=True)
class Launch:
    """How many processes there are, and where they meet.

    processes:       on this machine.
    min_machines, max_machines: how many machines take part; the run goes on with any number between.
    endpoint:        host:port of the rendezvous; None where this machine is alone.
    run_id:          of the rendezvous: the same on every machine, another for each run.
    max_restarts:    how often the processes are started again after one of them has died.
    wait_seconds:    for more machines, once the fewest are there.
    timeout_seconds: without a step until a process counts as stuck, and is ended.
    """

    processes: int = 1
    min_machines: int = 1
    max_machines: int = 1
    endpoint: str | None = None
    run_id: str = "drivetrain"
    max_restarts: int = 0
    wait_seconds: int = 30
    timeout_seconds: float = 600.0

    @classmethod
    def of(
        cls,
        processes: int,
        machines: str,
        endpoint: str | None,
        run_id: str | None,
        max_restarts: int | None,
        *,
        wait_seconds: int = 30,
        timeout_seconds: float = 600.0,
    ) -> Launch:
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
        if endpoint is not None:
            split_endpoint(endpoint)
        if max_restarts is None:
            max_restarts = RESTARTS if processes > 1 or most > 1 else 0
        return cls(
            processes, least, most, endpoint, run_id or "drivetrain", max_restarts, wait_seconds, timeout_seconds
        )

    def unshared(self, batch: int | None, micro_batch: int) -> str | None:
        """What to know beforehand where some of the allowed numbers of machines can't share a step; None if all can.

        batch: samples of a step; None where the first start decides it.
        """
        numbers = range(self.min_machines, self.max_machines + 1)
        at_once = micro_batch * self.processes
        bad = [number for number in numbers if batch is None or batch % (at_once * number)]
        if len(numbers) == 1 or not bad:
            return None
        fits = f"a multiple of {at_once * math.lcm(*numbers)}"
        if batch is None:
            return (
                "the first start decides the samples of a step, and other numbers of machines may not be able to share "
                f"them; with trainer.batch {fits} any number from {numbers[0]} to {numbers[-1]} can"
            )
        told = ", ".join(map(str, bad))
        return (
            f"steps of {batch} samples (trainer.batch) can't be shared out among {told} of {numbers[0]} to "
            f"{numbers[-1]} machines, and the run would end there; {fits} can"
        )

    @property
    def needs_agent(self) -> bool:
        return self.processes > 1 or self.max_machines > 1 or self.max_restarts > 0

    def run(self, arguments: Sequence[str], say: Callable[[str], None]) -> int:
        """Run ``drivetrain ARGUMENTS --pulses FOLDER`` in every process, and wait; the exit status.

        The processes themselves tell what went wrong; ``say`` is told who was lost, and when they are started anew.
        Raises TrainingError when the machines can't meet.
        """
        from torch.distributed.elastic.agent.server import WorkerSpec
        from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException

        from drivetrain.training.agent import Agent

        # The agent's own report of a process that failed would bury what the process has said.
        logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
        os.environ[_ANOTHER_STORE] = "1"
        with tempfile.TemporaryDirectory(prefix="drivetrain-train-") as folder:
            pulses = Pulses(Path(folder), self.timeout_seconds)
            with _Meeting(self.endpoint, self.run_id):
                meeting = self._meet()
                spec = WorkerSpec(
                    role="trainer",
                    local_world_size=self.processes,
                    entrypoint=sys.executable,
                    args=("-m", "drivetrain", *arguments, "--pulses", folder),
                    rdzv_handler=meeting,
                    max_restarts=self.max_restarts,
                    monitor_interval=0.2,
                )
                logs = DefaultLogsSpecs(log_dir=folder)
                agent = Agent(spec, logs, self.timeout_seconds, pulses, say, is_alone=self.max_machines == 1)
                is_over = True
                try:
                    result = agent.run()
                except SignalException as error:
                    is_over = False  # the other machines go on
                    if error.sigval == signal.SIGINT:
                        raise KeyboardInterrupt from error
                    return 128 + int(error.sigval)
                finally:
                    if is_over:
                        meeting.shutdown()
        return FAILED if result is not None and result.is_failed() else 0

    def _meet(self) -> RendezvousHandler:
        from torch.distributed.elastic.rendezvous import RendezvousParameters, registry

        alone = self.endpoint is None
        options: dict[str, Any] = {
            "join_timeout": _JOIN_SECONDS,
            "last_call_timeout": max(1, self.wait_seconds),
            "keep_alive_interval": _KEEP_ALIVE_SECONDS,
            "keep_alive_max_attempt": _KEEP_ALIVE_MISSES,
        }
        parameters = RendezvousParameters(
            backend="c10d",
            endpoint="localhost:0" if alone else self.endpoint or "",
            run_id=uuid.uuid4().hex if alone else self.run_id,
            min_nodes=self.min_machines,
            max_nodes=self.max_machines,
            **options,
        )
        return registry.get_rendezvous_handler(parameters)


def split_endpoint(endpoint: str) -> tuple[str, int]:
    """Host and port. Raises ConfigError."""
    host, _, port = endpoint.rpartition(":")
    if not host or not port.isdecimal() or not 0 <= int(port) < 2**16:
        raise ConfigError("no place to meet", where="--rdzv-endpoint", found=endpoint, allowed="HOST:PORT")
    return host.strip("[]"), int(port)


class _Meeting:
    """Maps what the rendezvous raises to TrainingError."""

    def __init__(self, endpoint: str | None, run_id: str) -> None:
        self._where = f"run {run_id!r} at {endpoint}" if endpoint else "this machine"

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        from torch.distributed.elastic.rendezvous import (
            RendezvousClosedError,
            RendezvousConnectionError,
            RendezvousError,
            RendezvousTimeoutError,
        )

        if not isinstance(error, RendezvousError):
            return
        reasons: dict[type[RendezvousError], tuple[str, str]] = {
            RendezvousClosedError: (
                "the run is over for all machines",
                "Give another --rdzv-id to begin again; a saved state is gone on from.",
            ),
            RendezvousTimeoutError: (
                f"too few machines have come within {_JOIN_SECONDS} s",
                "Start the others, or lower MIN of --nnodes MIN:MAX.",
            ),
            RendezvousConnectionError: (
                "the place where the machines meet can't be reached",
                (
                    "When it is there again, start the run again: it goes on from its newest saved state. "
                    "To outlive any machine of the run, keep the place with drivetrain rendezvous on another."
                ),
            ),
        }
        what, hint = reasons.get(type(error), (f"the machines can't meet: {error}", ""))
        raise TrainingError(what, where=self._where, hint=hint or None) from error
