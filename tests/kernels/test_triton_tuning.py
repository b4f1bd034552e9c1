"""The record of block sizes: the fastest is kept, for good, by any number of processes; what can't be read is told."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from drivetrain.kernels.triton.tuning import RECORD_VERSION, Blocks, Tuner, TuningRecord, rows_class

SMALL, MIDDLE, LARGE = (Blocks.of(num_warps=warps, BLOCK=warps * 256) for warps in (1, 4, 8))
CANDIDATES = (SMALL, MIDDLE, LARGE)


class Stopwatch:
    """Takes what a launch returns for its milliseconds, and counts."""

    def __init__(self) -> None:
        self.num_timed = 0

    def __call__(self, launch: Callable[[], object]) -> float:
        self.num_timed += 1
        return float(launch())  # type: ignore[arg-type]


def record(folder: Path, device: str = "NVIDIA H100 80GB HBM3") -> TuningRecord:
    return TuningRecord(folder, device, "3.6.0")


@pytest.fixture
def no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: False)


def duration(blocks: Blocks) -> float:
    return {SMALL: 3.0, MIDDLE: 1.0, LARGE: 2.0}[blocks]


@pytest.mark.usefixtures("no_graph")
def test_the_fastest_is_chosen_and_not_measured_again(tmp_path: Path) -> None:
    watch = Stopwatch()
    tuner = Tuner(record(tmp_path), watch)
    assert tuner.choose("norm/576", CANDIDATES, duration) == MIDDLE
    assert tuner.choose("norm/576", CANDIDATES, duration) == MIDDLE
    assert Tuner(record(tmp_path), watch).choose("norm/576", CANDIDATES, duration) == MIDDLE
    assert watch.num_timed == len(CANDIDATES)
    entry = json.loads(record(tmp_path).path.read_text())["entries"]["norm/576"]
    assert entry == {"blocks": {"sizes": {"BLOCK": 1024}, "num_warps": 4, "num_stages": 2}, "ms": 1.0}


@pytest.mark.usefixtures("no_graph")
def test_a_recorded_choice_that_is_no_candidate_any_more_is_measured_anew(tmp_path: Path) -> None:
    record(tmp_path).add("norm/576", Blocks.of(BLOCK=77), 0.1)
    assert Tuner(record(tmp_path), Stopwatch()).choose("norm/576", CANDIDATES, duration) == MIDDLE


@pytest.mark.usefixtures("no_graph")
def test_blocks_that_do_not_fit_are_passed_over(tmp_path: Path) -> None:
    tuner = Tuner(record(tmp_path), lambda launch: float(launch()))  # type: ignore[arg-type]
    choice = tuner.choose("big", CANDIDATES, lambda blocks: 9.0 if blocks == LARGE else float("inf"))
    assert choice == LARGE


@pytest.mark.usefixtures("no_graph")
def test_where_nothing_fits_the_launch_itself_says_so(tmp_path: Path) -> None:
    tuner = Tuner(record(tmp_path), lambda launch: float("inf"))
    assert tuner.choose("huge", CANDIDATES, duration) == SMALL
    assert record(tmp_path).find("huge", CANDIDATES) is None


@pytest.mark.usefixtures("no_graph")
@pytest.mark.parametrize("wrong", [1.1, float("nan"), None])
def test_a_candidate_that_gives_other_numbers_is_told_of_and_not_taken(tmp_path: Path, wrong: float | None) -> None:
    """Also one that writes nothing at all."""
    output = torch.zeros(100)

    def launch(blocks: Blocks) -> float:
        if blocks != MIDDLE:
            output.copy_(torch.arange(100) * (1 if blocks == SMALL else 1.001))
        elif wrong is not None:
            output.copy_(torch.arange(100)).mul_(wrong)
        return duration(blocks)

    tuner = Tuner(record(tmp_path), Stopwatch())
    with pytest.warns(UserWarning, match=r"norm/576: the kernel with \{'BLOCK': 1024, .* gives other numbers"):
        assert tuner.choose("norm/576", CANDIDATES, launch, output=output) == LARGE


@pytest.mark.usefixtures("no_graph")
@pytest.mark.parametrize("special", [0.0, float("inf"), float("nan")])
def test_candidates_that_give_the_same_numbers_are_compared_by_their_time(tmp_path: Path, special: float) -> None:
    output = torch.zeros(100)

    def launch(blocks: Blocks) -> float:
        output.fill_(special)
        return duration(blocks)

    assert Tuner(record(tmp_path), Stopwatch()).choose("norm/576", CANDIDATES, launch, output=output) == MIDDLE


def test_without_a_clock_the_first_candidate_is_taken() -> None:
    assert Tuner().choose("norm/576", CANDIDATES, duration) == SMALL


@pytest.mark.usefixtures("no_graph")
def test_a_use_that_is_too_small_to_tell_anything_decides_nothing(tmp_path: Path) -> None:
    tuner = Tuner(record(tmp_path), Stopwatch())
    assert tuner.choose("norm/576", CANDIDATES, duration, worth_it=False) == SMALL
    assert tuner.choose("norm/576", CANDIDATES, duration) == MIDDLE
    assert Tuner(record(tmp_path), Stopwatch()).choose("norm/576", CANDIDATES, duration, worth_it=False) == MIDDLE


def test_nothing_is_timed_while_a_graph_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: True)
    watch = Stopwatch()
    assert Tuner(record(tmp_path), watch).choose("norm/576", CANDIDATES, duration) == SMALL
    assert watch.num_timed == 0


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"entries": 3}',
        '{"version": 999, "device": "NVIDIA H100 80GB HBM3", "compiler": "3.6.0", "entries": {}}',
    ],
)
def test_a_file_that_cannot_be_read_is_set_aside_with_a_warning(tmp_path: Path, content: str) -> None:
    path = record(tmp_path).path
    path.write_text(content)
    with pytest.warns(UserWarning, match="set aside as nvidia-h100"):
        assert record(tmp_path).find("norm/576", CANDIDATES) is None
    assert path.with_suffix(".unreadable").read_text() == content
    record(tmp_path).add("norm/576", MIDDLE, 1.0)
    assert record(tmp_path).find("norm/576", CANDIDATES) == MIDDLE


def test_each_device_and_version_has_a_file_of_its_own(tmp_path: Path) -> None:
    record(tmp_path).add("norm/576", MIDDLE, 1.0)
    assert record(tmp_path, "AMD Instinct MI300X").find("norm/576", CANDIDATES) is None
    assert record(tmp_path).path.name == "nvidia-h100-80gb-hbm3-triton-3.6.0.json"
    assert json.loads(record(tmp_path).path.read_text())["version"] == RECORD_VERSION


def test_processes_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    code = """import sys
from pathlib import Path
from drivetrain.kernels.triton.tuning import Blocks, TuningRecord
record = TuningRecord(Path(sys.argv[1]), "device", "3.6.0")
for index in range(20):
    record.add(f"{sys.argv[2]}/{index}", Blocks.of(BLOCK=index), 1.0)
"""
    children = [subprocess.Popen([sys.executable, "-P", "-c", code, str(tmp_path), str(n)]) for n in range(3)]
    assert [child.wait(60) for child in children] == [0, 0, 0]
    entries = json.loads(TuningRecord(tmp_path, "device", "3.6.0").path.read_text())["entries"]
    assert set(entries) == {f"{n}/{index}" for n in range(3) for index in range(20)}
    assert not [path for path in tmp_path.iterdir() if path.suffix not in (".json", ".lock")]


def test_a_record_has_a_name_that_is_its_folders_in_every_process(tmp_path: Path) -> None:
    """By it an operator of torch finds its tuner, also from a graph that an earlier process has compiled."""
    names = [Tuner(record(folder)).name for folder in (tmp_path / "a", tmp_path / "b", tmp_path / "a")]
    assert names[0] == names[2] != names[1]
    assert Tuner(record(Path("/var/cache/drivetrain"))).name == "record_a1b0e174"
    assert Tuner().name == "untuned"


def test_numbers_of_rows_fall_into_classes_by_powers_of_four() -> None:
    assert [rows_class(n) for n in (0, 1, 2, 4, 5, 16, 17, 64, 65, 4096)] == [1, 1, 4, 4, 16, 16, 64, 64, 256, 4096]
