"""Platforms with one fault each, and the test of the kit that must catch it."""

from __future__ import annotations

import dataclasses
import threading
import warnings
from collections.abc import Callable

import torch

from drivetrain.backends.cpu import CpuPlatform
from drivetrain.contracts.platform import MemoryInfo, PlatformFacts
from drivetrain.contracts.plugin import Plugin, Probe, ProbeContext


class FallsBackToTheCpu(CpuPlatform):
    """Tells of a GPU, and silently places everything in main memory."""

    def facts(self) -> PlatformFacts:
        return dataclasses.replace(super().facts(), device_type="cuda")


class FreeBeyondTotal(CpuPlatform):
    """Counts free memory in the wrong unit."""

    def memory(self) -> MemoryInfo:
        memory = super().memory()
        return MemoryInfo(memory.total_bytes, memory.free_bytes * 1024)


class PeakIsCurrent(CpuPlatform):
    """Reports as the peak a figure that was read once and is never updated."""

    def peak_memory_bytes(self) -> int:
        return 1 << 20


class CountsWhatWasThere(CpuPlatform):
    """Takes the peak of the whole process for the peak of a piece of work."""

    @classmethod
    def abilities(cls) -> frozenset[str]:
        return frozenset({"peaks"})

    def peak_of(self, work: Callable[[], object]) -> int:
        work()
        return self.peak_memory_bytes()


class MadeUpDtype(CpuPlatform):
    """Lists a type that torch does not have."""

    def facts(self) -> PlatformFacts:
        facts = super().facts()
        return dataclasses.replace(facts, dtypes=facts.dtypes | {"float12"})


class ClaimsGraphs(CpuPlatform):
    """Claims an ability whose methods it does not have."""

    @classmethod
    def abilities(cls) -> frozenset[str]:
        return frozenset({"graphs"})


class OpensTheDeviceInItsProbe(CpuPlatform):
    """Tries the device instead of asking the driver, and hides that it failed."""

    @classmethod
    def probe(cls, context: ProbeContext) -> Probe:
        try:
            torch.cuda.init()
        except (AssertionError, RuntimeError) as error:
            return Probe.yes(f"works without ({type(error).__name__})")
        return Probe.yes("the device answers")


class WatchesFromAThread(CpuPlatform):
    """Starts a thread when it is probed."""

    @classmethod
    def probe(cls, context: ProbeContext) -> Probe:
        thread = threading.Thread(target=lambda: None)
        thread.start()
        thread.join()
        return Probe.yes("watched")


class SilencesWarnings(CpuPlatform):
    """Turns off everybody's warnings when it is probed."""

    @classmethod
    def probe(cls, context: ProbeContext) -> Probe:
        warnings.simplefilter("ignore")
        return Probe.yes("all is quiet")


ZOO: dict[type[Plugin], str] = {
    FallsBackToTheCpu: "test_device_is_of_the_type_that_the_facts_tell",
    FreeBeyondTotal: "test_memory_makes_sense",
    PeakIsCurrent: "test_peak_sees_an_allocation",
    CountsWhatWasThere: "test_the_peak_of_work_is_what_it_takes_at_once",
    MadeUpDtype: "test_dtypes_exist",
    ClaimsGraphs: "test_claims_match_methods",
    OpensTheDeviceInItsProbe: "test_import_and_probe_open_no_device",
    WatchesFromAThread: "test_import_and_probe_start_no_thread",
    SilencesWarnings: "test_import_and_probe_leave_the_process",
}
"""Faulty platform -> the test that must fail for it."""
