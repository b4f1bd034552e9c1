"""The heartbeat of a process in training: it beats when a step is made, and so tells work from waiting for ever.

Each process has a file that it touches, in a folder of the agent that has started it. The first step arms it: how long
reading data and loading a model take is not known beforehand. A process that hangs earlier keeps the others waiting,
and they end after the same time.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path

_AGENT, _STARTS = "agent", "starts"


class Pulse:
    """The heartbeat of this process."""

    def __init__(self, folder: Path, local_rank: int) -> None:
        self._folder, self._path = folder, folder / _name(local_rank)

    @property
    def is_restart(self) -> bool:
        """Whether the agent has started its processes before, in this run."""
        return _number(self._folder / _STARTS) > 1

    def beat(self) -> None:
        """Tell that there was progress."""
        self._path.touch()

    def rest(self) -> None:
        """No more steps are to come."""
        self._path.unlink(missing_ok=True)


def agent_of(folder: Path) -> int:
    """The process id of the agent whose folder this is; 0 when it is gone."""
    return _number(folder / _AGENT)


def _number(file: Path) -> int:
    try:
        return int(file.read_text(encoding="ascii"))
    except (FileNotFoundError, ValueError):
        return 0


@dataclass
class Pulses:
    """The heartbeats of the processes on this machine, as their agent sees them.

    timeout_seconds: from the last beat until a process counts as stuck.
    """

    folder: Path
    timeout_seconds: float
    _seen: dict[int, tuple[int, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        (self.folder / _AGENT).write_text(str(os.getpid()), encoding="ascii")

    def reset(self, processes: int) -> None:
        """Forget them: the processes are started, for the first time or anew."""
        self._seen.clear()
        starts = self.folder / _STARTS
        starts.write_text(str(_number(starts) + 1), encoding="ascii")
        for local_rank in range(processes):
            (self.folder / _name(local_rank)).unlink(missing_ok=True)

    def is_stuck(self, local_rank: int) -> bool:
        """Whether this process has been making steps and makes none any more. Ask often: a beat is dated when it is
        seen, by a clock that nobody sets."""
        try:
            beat = os.stat(self.folder / _name(local_rank)).st_mtime_ns
        except FileNotFoundError:
            self._seen.pop(local_rank, None)
            return False
        now = time.monotonic()
        last, since = self._seen.setdefault(local_rank, (beat, now))
        if beat != last:
            self._seen[local_rank] = (beat, now)
            return False
        return now - since > self.timeout_seconds


def _name(local_rank: int) -> str:
    return f"pulse-{local_rank}"
