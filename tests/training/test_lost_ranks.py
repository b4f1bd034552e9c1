"""Ranks are killed, stopped and taken away while they train: the run goes on, and its losses are as if nothing had
happened."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from support.drill import Launched, curve, is_running, steps_of, wait_for
from support.training import run_settings, train_in_processes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(sys.platform != "linux", reason="ranks are found through /proc"),
]

STUCK_SECONDS = 15.0


def drill_settings(model: Path, chats: Path, folder: Path, **trainer: Any) -> dict[str, Any]:
    settings = run_settings(model, chats, folder, export=False, **trainer)
    settings["store"] |= {"every": 4, "background": True, "keep": 2}
    return settings


@contextmanager
def ended(*launched: Launched) -> Iterator[None]:
    try:
        yield
    finally:
        for one in launched:
            one.end()


def test_a_run_that_loses_ranks_is_as_one_that_does_not(model: Path, chats: Path, tmp_path: Path) -> None:
    """Rank 1 and rank 0 are killed, and rank 1 stops for ever: bit for bit the losses and samples of a quiet run."""
    shape = {"steps": 32, "micro_batch": 1, "timeout_seconds": STUCK_SECONDS}
    quiet = train_in_processes(
        drill_settings(model, chats, tmp_path / "quiet", **shape), tmp_path / "quiet", 2, timeout=600
    )
    assert quiet.returncode == 0, quiet.stderr
    folder = tmp_path / "drill"
    settings = drill_settings(model, chats, folder, **shape)
    run = Launched.start(settings, folder, "agent", "--nproc-per-node", "2", "--max-restarts", "9")
    with ended(run):
        for step, rank, how in ((5, 1, signal.SIGKILL), (12, 0, signal.SIGKILL), (19, 1, signal.SIGSTOP)):
            wait_for(f"step {step}: {run.told}", lambda step=step: steps_of(folder) >= step)
            run.hit(rank, how)
        assert run.finish() == 0, run.told
    assert curve(folder) == curve(tmp_path / "quiet")
    assert "rank 1 was ended by SIGKILL; starting anew" in run.told
    assert "rank 0 was ended by SIGKILL; starting anew" in run.told
    assert f"made no step for {STUCK_SECONDS:g} s and was ended" in run.told
    assert "Traceback" not in run.told


def test_a_machine_is_lost_and_taken_back(model: Path, chats: Path, tmp_path: Path) -> None:
    """Two agents meet at a place that belongs to neither. One is killed, and its rank ends with it; the other goes on
    alone with as many samples a step, and takes it back when it returns. The losses are those of one process."""
    shape = {"steps": 60, "micro_batch": 1}
    alone = drill_settings(model, chats, tmp_path / "alone", **shape, batch=8)
    assert train_in_processes(alone, tmp_path / "alone", timeout=600).returncode == 0
    folder = tmp_path / "drill"
    settings = drill_settings(model, chats, folder, **shape, accumulate=4)
    command = [sys.executable, "-m", "drivetrain", "rendezvous", "127.0.0.1:0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as place:
        try:
            assert place.stdout is not None
            endpoint = place.stdout.readline().strip()
            options = ["--nnodes", "1:2", "--rdzv-endpoint", endpoint, "--rdzv-wait", "5", "--max-restarts", "9"]
            first = Launched.start(settings, folder, "first", *options)
            second = Launched.start(settings, folder, "second", *options)
            with ended(first, second):
                wait_for(f"two machines: {first.told} {second.told}", lambda: steps_of(folder) >= 6)
                (orphan,) = second.ranks().values()
                second.process.send_signal(signal.SIGKILL)
                wait_for("the orphan's end", lambda: not is_running(orphan), seconds=10)
                wait_for("one machine", lambda: "ranks: 1, machines: 1" in first.told)
                made = steps_of(folder)
                wait_for("a step alone", lambda: steps_of(folder) > made)
                survivor = first.hit(0, signal.SIGSTOP)  # or it makes all steps before the other has imported torch
                back = Launched.start(settings, folder, "back", *options)
                with ended(back):
                    port = int(endpoint.rpartition(":")[2])
                    wait_for(f"the return: {back.told}", lambda: back.is_connected(port) or back.process.poll())
                    os.kill(survivor, signal.SIGCONT)
                    assert back.finish() == 0, back.told
                    assert first.finish() == 0, first.told
        finally:
            place.kill()
    assert "ranks: 2, machines: 2" in back.told
    figures, wanted = curve(folder), curve(tmp_path / "alone")
    assert [figure[:2] for figure in figures] == [figure[:2] for figure in wanted]
    assert [figure[2] for figure in figures] == pytest.approx([figure[2] for figure in wanted], rel=2e-4)
