"""The CPU: cores, vector instructions and main memory, all within the limits of this process's control groups."""

from __future__ import annotations

import dataclasses
import os
import re
import resource
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from drivetrain.backends.placement import Pin, settle
from drivetrain.contracts.platform import MemoryInfo, Platform, PlatformFacts
from drivetrain.contracts.plugin import PluginConfig, Probe, ProbeContext, Tier
from drivetrain.errors import PlatformError
from drivetrain.hardware import ROOT, HostMemory, Processor, read_cores, read_memory, read_processor, read_text

if TYPE_CHECKING:
    import torch


def describe(processor: Processor, memory: HostMemory) -> PlatformFacts:
    """The facts of a machine's processor. Pure."""
    details = {
        "cores": f"{processor.usable_cores} usable of {processor.logical_cores} logical",
        "instruction_sets": " ".join(processor.instruction_sets) or "none known",
        "bfloat16": "on request only; float32 is the faster one on most processors",
    }
    if processor.quota_cores is not None:
        details["cpu_quota"] = f"{processor.quota_cores:g} cores, from the control group"
    if memory.is_limited:
        details["memory_limit"] = f"{memory.total_bytes / 2**30:.1f} GiB, from the control group"
    return PlatformFacts(
        name="cpu",
        device_type="cpu",
        device_name=processor.model,
        device_count=1,
        dtypes=frozenset({"float32", "bfloat16"}),
        architecture=processor.architecture,
        collective="gloo",
        total_memory_bytes=memory.total_bytes,
        details=details,
    )


class CpuPlatform(Platform):
    """The processor and main memory of this machine."""

    contract_version = "1.1"
    tier = Tier.PORTABLE
    preferences = {"precision": ("fp32",), "attention": ("paged-cpu", "sdpa"), "kernels": ("cpu",)}

    class Config(PluginConfig):
        threads: int | None = Field(
            None, ge=1, description="threads that compute; null takes the cores this process may use, at most its quota"
        )
        pin: Pin = Field(
            "auto",
            description="cores that threads are bound to: a list; none leaves it to the system; auto takes those of "
            "as few NUMA nodes as hold all threads, where there are several",
        )
        huge_pages: Literal["auto", "all", "off"] = Field(
            "auto",
            description="keep weights in pages of 2 MiB, where the system gives them on request; all: those too that "
            "are views of a file (GGUF), as copies, which no other process shares and the system can't take back",
        )

    config: Config

    @classmethod
    def probe(cls, context: ProbeContext) -> Probe:
        return Probe.yes("every machine has a processor")

    def facts(self) -> PlatformFacts:
        facts = describe(read_processor(), read_memory())
        _, why = self._placement()
        nodes = len({core.node for core in read_cores()})
        details = {**facts.details, "numa_nodes": str(nodes), "threads": f"{self._num_threads}, {why}"}
        return dataclasses.replace(facts, details=details)

    def activate(self) -> None:
        """Set the number of threads that torch computes with, and bind this thread and all that it starts from now on
        to the cores that ``pin`` leads to; they stay bound. Weights and cache are then made on their NUMA node."""
        import torch

        num_threads = self._num_threads
        cores, why = self._placement()
        torch.set_num_threads(num_threads)
        if cores is not None:
            try:
                os.sched_setaffinity(0, cores)
            except (AttributeError, OSError) as error:
                raise PlatformError(
                    f"threads could not be bound: {error}", where="platform.pin", found=why, hint="Set pin to none."
                ) from error

    def place_weights(self, tensors: Iterable[torch.Tensor]) -> str:
        """Into large pages, where these are to be had."""
        from drivetrain.backends.huge_pages import move, why_no_huge_pages

        reason = "they are switched off in the settings" if self.config.huge_pages == "off" else why_no_huge_pages()
        if reason is not None:
            return f"no large pages: {reason}"
        moved = move(tensors, takes_views=self.config.huge_pages == "all")
        return f"{moved / 2**20:.1f} MiB in large pages"

    @property
    def _num_threads(self) -> int:
        return self.config.threads or read_processor().usable_cores

    def _placement(self) -> tuple[tuple[int, ...] | None, str]:
        return settle(self.config.pin, read_cores(), self._num_threads)

    def device(self) -> torch.device:
        import torch

        return torch.device("cpu")

    def memory(self) -> MemoryInfo:
        memory = read_memory()
        return MemoryInfo(total_bytes=memory.total_bytes, free_bytes=memory.available_bytes)

    def peak_memory_bytes(self) -> int:
        """The high-water mark of the resident set."""
        # VmHWM belongs to this program alone; getrusage also counts what the process held before its last exec.
        match = re.search(r"^VmHWM:\s+(\d+) kB", read_text(ROOT / "proc/self/status") or "", re.MULTILINE)
        return int(match[1]) * 1024 if match else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
