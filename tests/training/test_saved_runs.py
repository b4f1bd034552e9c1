"""What a saved state holds beside tensors, what happens when the number of ranks changes, and what can be done with
it; and the small parts that find a rank that hangs or is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import drivetrain
from drivetrain import Trainer
from drivetrain.errors import ConfigError, DamagedStateError, RankLostError, StateNotFoundError
from drivetrain.plugins.store.dcp import DcpStore
from drivetrain.training.launch import RESTARTS, Launch
from drivetrain.training.pulse import Pulse, Pulses, agent_of
from drivetrain.training.ranks import Ranks, joined_ranks
from drivetrain.training.saved import check_state
from drivetrain.training.trainer import Assembly
from support.drill import is_running, wait_for
from support.training import ONE_THREAD, run_settings


def trained(model: Path, chats: Path, folder: Path, **trainer: Any) -> tuple[dict[str, Any], DcpStore]:
    settings = run_settings(model, chats, folder, steps=3, export=False, **trainer)
    Trainer(**settings).run()
    return settings, DcpStore(DcpStore.Config(folder=str(folder / "state")))


# --- what is saved, and another number of ranks -----------------------------------------------------------------------


def test_a_state_tells_what_it_needs_to_go_on(model: Path, chats: Path, tmp_path: Path) -> None:
    """Position in the data, samples of a step, schedule and plan, beside random states and tensors."""
    _, store = trained(model, chats, tmp_path, accumulate=2)
    metadata = store.metadata(3)
    assert (metadata["step"], metadata["samples"], metadata["batch"], metadata["world_size"]) == (3, 12, 4, 1)
    assert (metadata["schedule"]["name"], metadata["schedule"]["steps"]) == ("cosine", 3)
    assert metadata["plan"]["parts"]["store"]["name"] == "dcp"
    assert metadata["loss_scale"] is None
    names = store.tensors(3)
    assert "rng.0.cpu" in names
    assert any(name.startswith("optimizer.") for name in names)


class _Shaped(Assembly):
    """The part of a run's assembly that says how large its steps are."""

    def __init__(self, settings: Any, store: DcpStore, world_size: int) -> None:
        self.settings, self.store, self.ranks = settings, store, Ranks(0, world_size)


@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 4), (2, 2), (4, 1)])
def test_a_step_keeps_its_samples_when_ranks_come_or_go(
    model: Path, chats: Path, tmp_path: Path, world_size: int, accumulate: int
) -> None:
    """Begun with four micro-batches on one rank: any other number of ranks makes steps of as many samples."""
    settings, store = trained(model, chats, tmp_path, micro_batch=1, accumulate=4)
    asked = Trainer(**settings).settings.trainer
    shape = _Shaped(asked, store, world_size)._step_shape()
    assert (shape.batch, shape.accumulate) == (4, accumulate)
    larger = asked.model_copy(update={"accumulate": 8})
    assert _Shaped(larger, store, world_size)._step_shape().batch == 8 * world_size, "what is asked for anew is made"
    never = asked.model_copy(update={"resume": "never"})
    assert _Shaped(never, store, world_size)._step_shape().batch == 4 * world_size


def test_a_number_of_ranks_that_does_not_divide_a_step_is_told(model: Path, chats: Path, tmp_path: Path) -> None:
    settings, store = trained(model, chats, tmp_path, micro_batch=1, accumulate=4)
    with pytest.raises(ConfigError, match=r"step of 4 samples .* among 3 ranks.*multiple of 3.*as divide it"):
        _Shaped(Trainer(**settings).settings.trainer, store, 3)._step_shape()


def test_a_run_that_ends_early_leaves_the_save_that_was_under_way(
    model: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever goes on in the same process finds it, however long the disk takes."""
    write = DcpStore._write

    def slowly(*arguments: Any) -> None:
        time.sleep(0.5)
        write(*arguments)

    monkeypatch.setattr(DcpStore, "_write", slowly)
    settings = run_settings(model, chats, tmp_path, steps=4, export=False)
    settings["store"] |= {"every": 2, "background": True}

    def stop(result: Any, steps: int) -> None:
        if result.step == 3:
            raise KeyError("of the caller")

    with pytest.raises(KeyError, match="of the caller"):
        Trainer(**settings).run(on_step=stop)
    assert DcpStore(DcpStore.Config(folder=str(tmp_path / "state"))).steps() == [2]
    assert len(Trainer(**settings).run().losses) == 2


# --- states on their own ----------------------------------------------------------------------------------------------


def test_a_state_is_listed_checked_and_exported(model: Path, chats: Path, tmp_path: Path, cli: Any) -> None:
    _, store = trained(model, chats, tmp_path)
    listed = cli("state", "list", store.folder)
    assert listed.out == f"step 3: {len(store.tensors(3))} tensors, 6 samples were trained on\n"
    assert "bytes are those that were saved" in cli("state", "check", store.folder).out
    output = tmp_path / "weights.safetensors"
    done = cli("state", "export", store.folder, output, "--match", "model.*")
    assert done.status == 0, done.err
    weights = load_file(output)
    into = {name: torch.empty(weights[name].shape) for name in weights}
    store.load(3, into)
    assert all(torch.equal(weights[name], into[name]) for name in into)
    assert not any(name.startswith("optimizer") for name in weights)
    with safe_open(output, "pt") as file:
        assert '"samples": 6' in file.metadata()["state"]
    assert cli("state", "check", store.folder, "--step", "2").status == 1
    assert "no tensor of such a name" in cli("state", "export", store.folder, output, "--match", "x.*").error
    assert "no such folder" in cli("state", "list", tmp_path / "nowhere").error
    assert "can't be written" in cli("state", "export", store.folder, chats / "below-a-file").error


def test_a_flipped_bit_is_found(model: Path, chats: Path, tmp_path: Path) -> None:
    _, store = trained(model, chats, tmp_path)
    (path,) = store.folder.rglob("rank-00000.bin")
    assert check_state(store, 3) == path.stat().st_size
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 16
    path.write_bytes(data)
    with pytest.raises(DamagedStateError, match=r"rank-00000\.bin"):
        check_state(store, 3)
    with pytest.raises(StateNotFoundError):
        check_state(store, 4)


# --- ranks that hang, are left behind, or are lost --------------------------------------------------------------------


def test_a_process_is_stuck_once_its_steps_stay_away(tmp_path: Path) -> None:
    """Not before its first step, nor after its last."""
    pulses, pulse = Pulses(tmp_path, timeout_seconds=0.2), Pulse(tmp_path, 1)
    assert not pulses.is_stuck(1)
    pulse.beat()
    assert not pulses.is_stuck(1)
    time.sleep(0.25)
    assert pulses.is_stuck(1)
    pulse.beat()
    assert not pulses.is_stuck(1)
    time.sleep(0.25)
    pulse.rest()
    assert not pulses.is_stuck(1)
    pulse.beat()
    pulses.reset(2)
    assert not pulses.is_stuck(1)
    assert agent_of(tmp_path) == os.getpid()
    assert agent_of(tmp_path / "gone") == 0


PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE, text=True)
print(child.stdout.readline().strip(), flush=True)
time.sleep(600)
"""
CHILD = """
import os, time
from drivetrain.training import orphan
{before}
orphan.end_with_parent(os.getppid())
print(os.getpid(), flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize(
    ("before", "is_stopped"), [("", False), ("", True), ("orphan._ask_kernel = lambda: False", False)]
)
def test_a_rank_ends_with_its_agent(before: str, is_stopped: bool) -> None:
    """By the kernel, though the rank be stopped; and where the kernel does not offer it, by a thread."""
    if sys.platform != "linux" and is_stopped:
        pytest.skip("only Linux ends a process that is stopped")
    command = [sys.executable, "-c", PARENT, CHILD.format(before=before)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        if is_stopped:
            os.kill(child, signal.SIGSTOP)
        assert is_running(child)
        parent.kill()
    wait_for("the child's end", lambda: not is_running(child), seconds=60)


def test_a_failed_collective_is_a_lost_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another error stays what it is."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    for error, wanted in (
        (RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer"), RankLostError),
        (RuntimeError("Application timeout caused pair closure"), RankLostError),
        (RuntimeError("Timed out waiting 15000ms for recv operation to complete"), RankLostError),
        (torch.distributed.DistNetworkError("gone"), RankLostError),
        (RuntimeError("shapes differ"), RuntimeError),
        (ConfigError("not gloo's fault"), ConfigError),
    ):
        monkeypatch.setenv("MASTER_PORT", str(_free_port()))
        with pytest.raises(wanted) as caught, joined_ranks(torch.device("cpu"), "gloo", 60):
            raise error
        assert type(caught.value) is wanted
    assert not torch.distributed.is_initialized()


def test_a_loop_that_can_not_be_prepared_leaves_the_other_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that it can be mended and tried again in the same process."""
    started = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}
    for name, value in {**started, "MASTER_PORT": str(_free_port())}.items():
        monkeypatch.setenv(name, value)
    foreign = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)
    with pytest.raises(ConfigError, match="1 parameters that the model does not have"):
        drivetrain.prepare(torch.nn.Linear(2, 2), foreign, {"platform": ONE_THREAD})
    assert not torch.distributed.is_initialized()


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port: int = probe.getsockname()[1]
        return port


def test_several_processes_are_started_anew_unless_told_otherwise() -> None:
    assert Launch.of(1, "1", None, None, None).needs_agent is False
    assert Launch.of(2, "1", None, None, None).max_restarts == RESTARTS
    assert Launch.of(2, "1", None, None, 0).max_restarts == 0
    assert Launch.of(1, "1", None, None, 5).needs_agent
    with pytest.raises(ConfigError, match="HOST:PORT"):
        Launch.of(1, "1:2", "nowhere", None, None)


def test_numbers_of_machines_that_can_not_share_a_step_are_told_beforehand() -> None:
    """Which they are, and a number of samples that all can share."""
    one_to_four = Launch.of(2, "1:4", "here:1", None, None)
    assert one_to_four.unshared(48, 2) is None
    assert "steps of 32 samples (trainer.batch) can't be shared out among 3 of 1 to 4" in str(
        one_to_four.unshared(32, 2)
    )
    assert "a multiple of 48 can" in str(one_to_four.unshared(32, 2))
    assert "with trainer.batch a multiple of 48 any number from 1 to 4" in str(one_to_four.unshared(None, 2))
    assert Launch.of(2, "3", "here:1", None, None).unshared(None, 2) is None


def test_a_place_that_is_taken_or_is_none_is_told(cli: Any) -> None:
    assert "allowed: HOST:PORT" in cli("rendezvous", "nowhere").error
