"""What the store ``dcp`` does beyond what every store has to: its files, its faults, its option."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from drivetrain.errors import StoreError
from drivetrain.plugins.store.dcp import DcpStore

LIMITED = """
import resource, signal, sys, torch
from drivetrain.errors import StoreError
from drivetrain.plugins.store.dcp import DcpStore

store = DcpStore(DcpStore.Config(folder=sys.argv[1], background=sys.argv[2] == "background"))
store.save(1, {"a": torch.ones(8)}, {}).wait()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))
try:
    store.save(2, {"a": torch.ones(2**20)}, {}).wait()
except StoreError as error:
    print(error)
print(list(store.steps()), sorted(path.name for path in store.folder.iterdir()))
"""


def made(folder: Path, **options: Any) -> DcpStore:
    return DcpStore(DcpStore.Config(folder=str(folder), **options))


def test_a_state_is_one_folder_with_an_index_that_people_can_read(tmp_path: Path) -> None:
    made(tmp_path).save(12, {"a": torch.ones(2, 3)}, {"plan": "p"}).wait()
    folder = tmp_path / "step-00000012"
    assert sorted(path.name for path in folder.iterdir()) == ["rank-00000.bin", "state.json"]
    content = json.loads((folder / "state.json").read_text())["content"]
    assert content["metadata"] == {"plan": "p"}
    assert (content["tensors"]["a"]["shape"], content["tensors"]["a"]["dtype"]) == ([2, 3], "float32")
    assert (folder / "rank-00000.bin").read_bytes() == torch.ones(6).numpy().tobytes()


def test_in_the_foreground_a_save_is_over_when_it_returns(tmp_path: Path) -> None:
    store = made(tmp_path, background=False)
    assert store.save(1, {"a": torch.ones(3)}, {}).is_done
    assert store.steps() == [1]
    with pytest.raises(StoreError, match="step 1 already"):
        store.save(1, {"a": torch.ones(3)}, {})


def test_what_is_in_the_way_or_may_not_be_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = made(tmp_path)
    (tmp_path / "step-00000001").mkdir()
    with pytest.raises(StoreError, match=r"step-00000001: something that is no complete state is in the way"):
        store.save(1, {"a": torch.ones(3)}, {}).wait()

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(StoreError, match="the states can't be listed: Permission denied"):
        store.steps()


def test_a_failed_save_is_its_own_caller_s_matter(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The next save takes place; the error is logged, and waits for whoever asked for the first."""
    store = made(tmp_path)
    store.save(1, {"a": torch.ones(3)}, {}).wait()
    failing = store.save(1, {"a": torch.ones(3)}, {})
    store.save(2, {"a": torch.ones(3)}, {}).wait()
    assert store.steps() == [1, 2]
    with pytest.raises(StoreError, match="step 1 already"):
        failing.wait()
    assert "could not be saved" in caplog.text


def test_what_a_killed_process_left_goes_away_with_the_next_save(tmp_path: Path) -> None:
    for name in (".saving-00000003", ".deleting-00000002"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rank-00000.bin").write_bytes(b"torn")
    (tmp_path / "notes.txt").write_text("mine")
    store = made(tmp_path)
    assert store.steps() == []
    store.save(4, {"a": torch.ones(1)}, {}).wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "step-00000004"]


@pytest.mark.parametrize("where", ["background", "foreground"])
def test_a_full_disk_leaves_the_states_that_were_there(tmp_path: Path, where: str) -> None:
    """Played by a limit on the size of files: an error, the old state whole, and nothing of the new one."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", LIMITED, str(tmp_path / "states"), where],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    message, left = done.stdout.splitlines()
    assert "the state can't be written: File too large" in message
    assert left == "[1] ['step-00000001']"


@pytest.mark.parametrize("folder", ["", "  ", "a\0b"])
def test_a_folder_that_is_none_is_refused(folder: str) -> None:
    with pytest.raises(ValueError, match="must be the path of a folder"):
        DcpStore.Config(folder=folder)


def test_a_home_folder_and_a_relative_one_are_told_in_full(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert made(Path("~/states")).folder == made(Path("states")).folder == tmp_path / "states"


def test_values_without_bytes_of_their_own_are_refused(tmp_path: Path) -> None:
    for tensor in (torch.ones(2, device="meta"), torch.eye(2).to_sparse()):
        with pytest.raises(StoreError, match="no plain bytes"):
            made(tmp_path).save(1, {"a": tensor}, {})


def test_a_save_waits_for_other_ranks_no_longer_than_a_step_does(tmp_path: Path) -> None:
    """torch's default for a group of its own is half an hour, for which a rank would not end after the others are
    lost."""
    meeting = tmp_path / "meeting"
    timeout = timedelta(seconds=17)
    torch.distributed.init_process_group("gloo", f"file://{meeting}", timeout, world_size=1, rank=0)
    try:
        store = made(tmp_path / "state")
        store.save(1, {"a": torch.ones(2)}, {}).wait()
        assert store._group._get_backend(torch.device("cpu")).options._timeout == timeout
    finally:
        torch.distributed.destroy_process_group()
