"""What holds for every platform plugin, and how the CPU is described, opened and measured here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from drivetrain.backends import accelerator, cpu, cuda, rocm, xpu
from drivetrain.backends.accelerator import AcceleratorPlatform
from drivetrain.contracts.platform import (
    CapturesPieces,
    MeasuresPeaks,
    Platform,
    PlatformFacts,
    SupportsGraphs,
    SupportsStreams,
)
from drivetrain.contracts.plugin import ProbeContext
from drivetrain.hardware import HostMemory, Processor, read_processor
from drivetrain.registry.discovery import discover, load
from drivetrain.testing.suites.platform import PlatformSuite
from support.card import Card

PLATFORMS: list[type[Platform]] = [cpu.CpuPlatform, cuda.CudaPlatform, rocm.RocmPlatform, xpu.XpuPlatform]


def test_every_platform_is_registered_and_keeps_the_contract() -> None:
    ours = [ref for ref in discover("platform") if ref.distribution == "drivetrain"]
    assert [load(ref) for ref in ours] == PLATFORMS


def test_the_preferences_name_installed_plugins() -> None:
    for platform in PLATFORMS:
        for kind, names in platform.preferences.items():
            assert set(names) <= {ref.name for ref in discover(kind)}, (platform, kind)


def test_an_ability_is_claimed_exactly_when_its_methods_are_there() -> None:
    for platform in PLATFORMS:
        assert ("streams" in platform.abilities()) == issubclass(platform, SupportsStreams)
        assert ("graphs" in platform.abilities()) == issubclass(platform, SupportsGraphs)
        assert ("graph_pieces" in platform.abilities()) == issubclass(platform, CapturesPieces)
        assert ("peaks" in platform.abilities()) == issubclass(platform, MeasuresPeaks)
    assert cpu.CpuPlatform.abilities() == frozenset()


def test_a_gpu_is_preferred_to_the_processor() -> None:
    assert all(platform.tier > cpu.CpuPlatform.tier for platform in PLATFORMS[1:])


def test_unknown_and_impossible_options_are_refused() -> None:
    for platform in PLATFORMS:
        with pytest.raises(ValidationError):
            platform.Config.model_validate({"no_such_option": 1})
    with pytest.raises(ValidationError):
        cpu.CpuPlatform.Config(threads=0)
    with pytest.raises(ValidationError):
        cuda.CudaPlatform.Config(device=-1)


_LAW_4 = """
import json, os, sys, threading
def state():
    open_devices = sorted(
        os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{n}")
    )
    devices = [path for path in open_devices if path.startswith("/dev/") and path != "/dev/null"]
    threads = len(os.listdir("/proc/self/task"))
    return [dict(os.environ), threads, threading.active_count(), devices]
import drivetrain.contracts.platform
before = state()
from drivetrain.backends import cpu, cuda, rocm, xpu
from drivetrain.contracts.plugin import ProbeContext
for platform in (cpu.CpuPlatform, cuda.CudaPlatform, rocm.RocmPlatform, xpu.XpuPlatform):
    probe = platform.probe(ProbeContext())
    if probe.ok:
        platform(platform.Config()).facts()
after = state()
print(json.dumps({"before": before, "after": after, "torch": "torch" in sys.modules}))
"""


def test_importing_probing_and_describing_leaves_no_trace() -> None:
    """Law 4: no device context, thread, subprocess or change of the environment; not even torch is imported."""
    done = subprocess.run([sys.executable, "-P", "-c", _LAW_4], capture_output=True, text=True, check=True)
    told = json.loads(done.stdout)
    assert told["before"] == told["after"]
    assert not told["torch"]


# --- the processor -------------------------------------------------------------------------------------------------


def make_cpu(**options: Any) -> cpu.CpuPlatform:
    return cpu.CpuPlatform(cpu.CpuPlatform.Config(**options))


@pytest.fixture
def restored_threads() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_processor_always_says_yes() -> None:
    assert cpu.CpuPlatform.probe(ProbeContext()).ok


def test_activating_sets_the_number_of_threads(restored_threads: None) -> None:
    make_cpu(threads=1).activate()
    assert torch.get_num_threads() == 1
    make_cpu().activate()
    assert torch.get_num_threads() == read_processor().usable_cores <= len(os.sched_getaffinity(0))


def test_the_processors_facts_are_printable_and_whole() -> None:
    facts = make_cpu().facts()
    assert (facts.name, facts.device_type, facts.device_count, facts.collective) == ("cpu", "cpu", 1, "gloo")
    assert {"float32", "bfloat16"} == facts.dtypes
    assert all(isinstance(text, str) for text in facts.details.values())
    memory = make_cpu().memory()
    assert 0 < memory.free_bytes <= memory.total_bytes == facts.total_memory_bytes
    assert make_cpu().device() == torch.device("cpu")
    make_cpu().synchronize()


def test_limits_of_the_control_group_are_shown() -> None:
    processor = Processor("a processor", "x86_64", ("avx2",), 8, 4, 2.5)
    facts = cpu.describe(processor, HostMemory(2**30, 2**29, is_limited=True))
    assert facts.architecture == "avx2"
    assert facts.total_memory_bytes == 2**30
    assert facts.details["cores"] == "2 usable of 8 logical"
    assert "2.5 cores" in facts.details["cpu_quota"]
    assert "1.0 GiB" in facts.details["memory_limit"]


def test_peak_memory_counts_what_was_held_once() -> None:
    before = make_cpu().peak_memory_bytes()
    size = before + 64 * 2**20
    block = torch.ones(size // 4, dtype=torch.float32)
    held = make_cpu().peak_memory_bytes()
    assert held >= size
    del block
    # The kernel sums its per-thread counters lazily, so the mark may move by some pages.
    assert make_cpu().peak_memory_bytes() >= held - 2**20


# --- graphs and devices --------------------------------------------------------------------------------------------


class _Memory:
    """What torch tells of a device's memory, of one that is played by the processor; each figure comes from a count."""

    def __init__(self, card: Card) -> None:
        self.card = card
        self.times_emptied = 0

    def memory_allocated(self, device: int) -> int:
        return self.card.held_bytes

    def max_memory_allocated(self, device: int) -> int:
        return self.card.peak_bytes

    def max_memory_reserved(self, device: int) -> int:
        return -(-self.card.peak_bytes // 2**21) * 2**21

    def memory_reserved(self, device: int) -> int:
        return -(-self.card.held_bytes // 2**21) * 2**21

    def mem_get_info(self, device: int) -> tuple[int, int]:
        return self.card.total_bytes - self.memory_reserved(device), self.card.total_bytes

    def reset_peak_memory_stats(self, device: int) -> None:
        self.card.peak_bytes = self.card.held_bytes

    def empty_cache(self) -> None:
        self.times_emptied += 1

    def synchronize(self, device: int) -> None: ...


class _OnTheProcessor(AcceleratorPlatform):
    """What the GPU platforms share, on such a device."""

    device_type = "cpu"
    memory_of_torch: _Memory

    @classmethod
    def abilities(cls) -> frozenset[str]:
        return frozenset({"peaks"})

    def facts(self) -> PlatformFacts:
        raise NotImplementedError

    def _module(self) -> Any:
        return self.memory_of_torch


class _PeakSuite(PlatformSuite):
    plugin = _OnTheProcessor
    allocation_bytes = 16 * 2**20


def test_a_measured_peak_is_that_of_the_work_and_the_one_since_the_start_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the test of the conformance suite, which runs on a GPU where one is."""
    monkeypatch.setattr(accelerator, "_FORGOTTEN_PEAKS", {})
    platform = _OnTheProcessor(AcceleratorPlatform.Config())
    with Card(2**30) as card:
        platform.memory_of_torch = _Memory(card)
        _PeakSuite().test_the_peak_of_work_is_what_it_takes_at_once(platform)
        assert card.peak_bytes < platform.peak_memory_bytes() == 80 * 2**20
        assert platform.memory_of_torch.times_emptied == 8


class _Graph:
    """Records calls the way a device graph does: it is written in a context and replayed later."""

    def __init__(self) -> None:
        self.is_capturing = False
        self.replays = 0

    @contextmanager
    def capturing(self) -> Any:
        self.is_capturing = True
        yield
        self.is_capturing = False

    def replay(self) -> None:
        self.replays += 1


def test_a_function_is_run_once_inside_the_capture_and_then_only_replayed() -> None:
    graph, seen = _Graph(), []
    replay = accelerator.record_graph(graph, graph.capturing(), lambda: seen.append(graph.is_capturing))
    replay()
    replay()
    assert (seen, graph.replays, graph.is_capturing) == ([True], 2, False)


class _Pieces:
    """Graphs that are begun and ended one after another."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self._count = 0

    def begin(self) -> _Pieces._One:
        self._count += 1
        self.log.append(f"begin {self._count}")
        return _Pieces._One(self, self._count)

    class _One:
        def __init__(self, pieces: _Pieces, number: int) -> None:
            self._log, self._number = pieces.log, number

        def capture_end(self) -> None:
            self._log.append(f"end {self._number}")

        def replay(self) -> None:
            self._log.append(f"replay {self._number}")


def test_pieces_are_replayed_with_the_work_between_them() -> None:
    pieces = _Pieces()

    def function(between: Any) -> None:
        for name in ("first", "second"):
            between(lambda name=name: pieces.log.append(name))

    replay = accelerator.record_pieces(pieces.begin, function)
    assert pieces.log == ["begin 1", "end 1", "begin 2", "end 2", "begin 3", "end 3"]
    pieces.log.clear()
    replay()
    assert pieces.log == ["replay 1", "first", "replay 2", "second", "replay 3"]


def test_a_piece_is_ended_where_recording_fails() -> None:
    pieces = _Pieces()

    def function(between: Any) -> None:
        between(lambda: None)
        raise ValueError("no such launch")

    with pytest.raises(ValueError, match="no such launch"):
        accelerator.record_pieces(pieces.begin, function)
    assert pieces.log == ["begin 1", "end 1", "begin 2", "end 2"]


@pytest.mark.skipif(not Path("/proc/driver/nvidia/version").exists(), reason="no NVIDIA driver on this machine")
@pytest.mark.skipif(torch.version.cuda is None, reason="torch was built without CUDA")
def test_a_real_gpu_is_described_opened_measured_and_captured() -> None:
    assert cuda.CudaPlatform.probe(ProbeContext()).ok
    platform: AcceleratorPlatform = cuda.CudaPlatform(cuda.CudaPlatform.Config())
    facts = platform.facts()
    assert not torch.cuda.is_initialized()
    platform.activate()
    assert torch.cuda.get_device_name(0) == facts.device_name
    assert 0 < platform.memory().free_bytes <= platform.memory().total_bytes
    x = torch.ones(1024, device=platform.device())
    with platform.stream():
        y = x * 2
    platform.synchronize()
    assert y.sum().item() == 2048
    assert isinstance(platform, SupportsGraphs)
    replay = platform.capture(lambda: x.add_(1))
    replay()
    replay()
    platform.synchronize()
    assert x[0].item() == 3
    assert platform.peak_memory_bytes() >= 8192
