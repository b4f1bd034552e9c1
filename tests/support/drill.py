"""Runs in processes that are killed, stopped and started again while they train."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.training import read_figures

PATIENCE_SECONDS = 500.0
"""How long anything may take on a machine with much other work."""


def wait_for(what: str, condition: Callable[[], Any], seconds: float = PATIENCE_SECONDS) -> Any:
    """What ``condition`` gives, once that is true."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {seconds:g} s")
        time.sleep(0.02)
    return found


def steps_of(folder: Path) -> int:
    """The last step that the tracker ``jsonl`` was told of."""
    try:
        lines = (folder / "run" / "figures.jsonl").read_bytes().splitlines()
        return int(json.loads(lines[-1])["step"]) if lines else 0
    except (FileNotFoundError, ValueError):
        return 0


@dataclass
class Launched:
    """``drivetrain train`` as an agent, with the ranks below it."""

    process: subprocess.Popen[bytes]
    log: Path

    @classmethod
    def start(cls, settings: Mapping[str, Any], folder: Path, name: str, *arguments: str) -> Launched:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "run.yaml"
        file.write_text(json.dumps(settings), encoding="utf-8")
        log = folder / f"{name}.log"
        command = [sys.executable, "-m", "drivetrain", "train", str(file), *arguments]
        with log.open("wb") as out:
            process = subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, "OMP_NUM_THREADS": "1"})
        return cls(process, log)

    def ranks(self) -> dict[int, int]:
        """Local rank -> process id, of the ranks that run."""
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                try:
                    parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                    if parent != self.process.pid:
                        continue
                    environment = (entry / "environ").read_bytes().split(b"\0")
                except (OSError, IndexError):
                    continue  # it has ended meanwhile
                told = [item.partition(b"=")[2] for item in environment if item.startswith(b"LOCAL_RANK=")]
                if told:
                    found[int(told[0])] = int(entry.name)
        return found

    def hit(self, local_rank: int, how: signal.Signals = signal.SIGKILL) -> int:
        """Send a signal to a rank that runs, and return its process id."""
        pid: int = wait_for(f"rank {local_rank}", lambda: self.ranks().get(local_rank))
        os.kill(pid, how)
        return pid

    def is_connected(self, port: int) -> bool:
        """Whether it has a connection to this port of any machine."""
        try:
            own = {os.readlink(entry) for entry in Path(f"/proc/{self.process.pid}/fd").iterdir()}
        except OSError:  # a file was closed meanwhile
            return False
        lines = [line.split() for name in ("tcp", "tcp6") for line in Path("/proc/net", name).read_text().splitlines()]
        there = {f"socket:[{line[9]}]" for line in lines if line[2].endswith(f":{port:04X}") and line[3] == "01"}
        return not own.isdisjoint(there)

    def finish(self, seconds: float = PATIENCE_SECONDS) -> int:
        """Wait for the end; the exit status."""
        return self.process.wait(seconds)

    @property
    def told(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def end(self) -> None:
        """Kill what is left of it; its ranks end with it."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def is_running(pid: int) -> bool:
    """Whether there is such a process, other than as a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def curve(folder: Path) -> list[tuple[float, float, float]]:
    """Step, samples until then, and loss, of each step."""
    return [(figures["step"], figures["samples"], figures["loss"]) for figures in read_figures(folder)]
