"""torchrun's elastic agent, with eyes for processes that hang and for errors that no new start would mend."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from torch.distributed.elastic.agent.server import WorkerSpec
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from drivetrain.training.pulse import Pulses

LOST = 75
"""Exit status of a process that could not go on without the others: starting anew may help. EX_TEMPFAIL, sysexits.h."""

TOLD = (1, 2)
"""Exit statuses of a process that has told what is wrong: it would say the same again."""


class Agent(LocalElasticAgent):
    """Starts the processes of this machine, watches them, and starts all of them anew when one is lost."""

    def __init__(
        self,
        spec: WorkerSpec,
        logs: DefaultLogsSpecs,
        timeout_seconds: float,
        pulses: Pulses,
        say: Callable[[str], None],
        *,
        is_alone: bool,
    ) -> None:
        super().__init__(spec, logs, exit_barrier_timeout=timeout_seconds)
        self._pulses, self._say, self._is_alone = pulses, say, is_alone
        self._stuck: set[int] = set()

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self._pulses.reset(worker_group.spec.local_world_size)
        self._stuck.clear()
        if not self._is_alone:
            ranks, machines = worker_group.workers[0].world_size, worker_group.group_world_size
            self._say(f"ranks: {ranks}, machines: {machines}")
        started: dict[int, Any] = super()._start_workers(worker_group)
        return started

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        self._end_stuck(worker_group)
        result = super()._monitor_workers(worker_group)
        if result.is_failed():
            self._judge(result.failures)
        return result

    def _end_stuck(self, worker_group: WorkerGroup) -> None:
        """End processes without progress. Ranks wait for each other, so that mostly all of them stand still."""
        for worker in worker_group.workers:
            if self._pulses.is_stuck(worker.local_rank) and worker.global_rank not in self._stuck:
                self._stuck.add(worker.global_rank)
                with suppress(ProcessLookupError):
                    os.kill(int(worker.id), signal.SIGKILL)

    def _judge(self, failures: dict[int, ProcessFailure]) -> None:
        """Say what became of the processes; when one has told an error, there is no new start."""
        if any(failure.exitcode in TOLD for failure in failures.values()):
            self._remaining_restarts = 0
            return
        seconds = f"{self._pulses.timeout_seconds:g} s"
        # The agent itself ends the others by SIGTERM once one is lost.
        culprits = {rank: failure for rank, failure in failures.items() if failure.exitcode != -signal.SIGTERM}
        told = [
            f"rank {rank} made no step for {seconds} and was ended"
            if rank in self._stuck
            else f"rank {rank} {_fate(failure.exitcode)}"
            for rank, failure in sorted((culprits or failures).items())
        ]
        most = self._worker_group.spec.max_restarts
        number = most - self._remaining_restarts + 1
        if self._remaining_restarts > 0:
            self._say(f"{'; '.join(told)}; starting anew from the newest saved state ({number} of {most} times)")
        else:
            self._say(f"{'; '.join(told)}; it was started anew {most} times, which is all that --max-restarts allows")


def _fate(exit_code: int) -> str:
    if exit_code == LOST:
        return "could not go on without the others"
    if exit_code < 0:
        with suppress(ValueError):
            return f"was ended by {signal.Signals(-exit_code).name}"
    return f"ended with status {exit_code}"
