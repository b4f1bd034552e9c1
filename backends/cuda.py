"""NVIDIA GPUs through torch's CUDA build."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from drivetrain.backends.accelerator import (
    AcceleratorConfig,
    AcceleratorPlatform,
    record_graph,
    record_pieces,
    visible_indices,
)
from drivetrain.backends.nvml import NvidiaDevice, NvidiaDriver, read_driver
from drivetrain.contracts.platform import PlatformFacts
from drivetrain.contracts.plugin import Probe, ProbeContext
from drivetrain.errors import ConfigError
from drivetrain.hardware import NVIDIA, ROOT, TorchBuild, read_accelerators, read_torch_build

VISIBILITY = "CUDA_VISIBLE_DEVICES"


def judge(root: Path, build: TorchBuild | None, visible: str | None) -> Probe:
    """Whether the machine under ``root`` can run this platform, from its kernel's files alone.

    visible: text of the driver's visibility variable; None when it is not set.
    """
    nodes = sorted((root / "dev").glob("nvidia[0-9]*"))
    found = [device for device in read_accelerators(root) if device.vendor_id == NVIDIA]
    if not found and not nodes:
        return Probe.no("no_device", "no NVIDIA device on this machine", wanted="an NVIDIA GPU", offered="none")
    if not (root / "proc/driver/nvidia/version").exists() and not (root / "dev/nvidiactl").exists():
        return Probe.no(
            "no_driver",
            f"{found[0] if found else nodes[0].name} is there, but the NVIDIA kernel driver is not loaded",
            wanted="/proc/driver/nvidia/version",
            offered="no driver; install the NVIDIA driver, or start the container with its GPU runtime",
        )
    if build is None or build.cuda is None:
        return Probe.no(
            "torch_without_cuda",
            "an NVIDIA GPU is there, but the installed torch was built without CUDA",
            wanted="a CUDA build of torch, see https://pytorch.org/get-started",
            offered=f"torch {build.version}" if build else "no torch",
        )
    if visible is not None and visible.strip() in ("", "-1"):
        return Probe.no(
            "hidden",
            f"{VISIBILITY} hides every device from this process",
            wanted="a visible device",
            offered=f"{VISIBILITY}={visible!r}",
        )
    count = len(nodes) or len(found)
    return Probe.yes(f"{count} NVIDIA device{'s' if count > 1 else ''}, a driver, and torch with CUDA {build.cuda}")


def dtypes_of(capability: tuple[int, int]) -> frozenset[str]:
    """Parameter dtypes that a compute capability computes at a useful speed.

    Half precision is fast on 6.0 and from 7.0 (not on 6.1), bfloat16 from 8.0. Source: CUDA C++ Programming Guide,
    table "Throughput of Native Arithmetic Instructions".
    """
    names = {"float32"}
    if capability == (6, 0) or capability >= (7, 0):
        names.add("float16")
    if capability >= (8, 0):
        names.add("bfloat16")
    return frozenset(names)


def architecture_of(capability: tuple[int, int]) -> str:
    """``"sm_90"``, as NVIDIA's compilers name it."""
    return f"sm_{capability[0]}{capability[1]}"


def describe(driver: NvidiaDriver, build: TorchBuild | None, visible: str | None) -> tuple[PlatformFacts, ...]:
    """The facts of every visible device, in the order in which CUDA numbers equal ones. Pure."""
    indices = visible_indices(visible, [device.uuid for device in driver.devices])
    return tuple(_facts(driver.devices[i], driver.version, build, len(indices)) for i in indices)


def _facts(device: NvidiaDevice, driver_version: str, build: TorchBuild | None, count: int) -> PlatformFacts:
    return PlatformFacts(
        name="cuda",
        device_type="cuda",
        device_name=device.name,
        device_count=count,
        dtypes=dtypes_of(device.capability),
        architecture=architecture_of(device.capability),
        collective="nccl",
        total_memory_bytes=device.memory_bytes,
        details={
            "driver": driver_version,
            "torch_cuda": (build.cuda if build else None) or "none",
            "slot": device.slot,
            "uuid": device.uuid,
        },
    )


class CudaPlatform(AcceleratorPlatform):
    """NVIDIA GPUs through CUDA."""

    device_type = "cuda"
    preferences = {**AcceleratorPlatform.preferences, "attention": ("paged-triton", "sdpa")}
    pci_vendors = frozenset({NVIDIA})

    def __init__(self, config: AcceleratorConfig) -> None:
        super().__init__(config)
        self._graph_memory: Any = None
        self._piece_stream: Any = None

    @classmethod
    def probe(cls, context: ProbeContext) -> Probe:
        return judge(ROOT, read_torch_build(), os.environ.get(VISIBILITY))

    def facts(self) -> PlatformFacts:
        """Raises PlatformError when the driver does not answer, ConfigError when there is no device of this index."""
        return self.pick_device(describe(read_driver(), read_torch_build(), os.environ.get(VISIBILITY)))

    def activate(self) -> None:
        super().activate()
        expected = self.facts()
        opened = architecture_of(self._module().get_device_capability(self.config.device))
        if opened != expected.architecture:
            # Unless told otherwise CUDA numbers the fastest device first and the driver by bus, so with unlike
            # devices the one described and the one opened can differ, and with them the dtypes chosen.
            raise ConfigError(
                f"the driver and CUDA number the devices differently: {expected.device_name} was expected",
                where=f"platform.device={self.config.device}",
                found=opened,
                allowed=expected.architecture,
                hint="Set CUDA_DEVICE_ORDER=PCI_BUS_ID, so that both number the devices alike.",
            )

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        """Record into a CUDA graph. Run ``function`` once before, so that nothing is left to compile.

        What is recorded on this platform shares its memory, but for tensors that are still held: it is good until
        anything recorded is replayed again. Other threads may work on the device meanwhile.
        """
        import torch

        graph = torch.cuda.CUDAGraph()
        capturing = torch.cuda.graph(graph, pool=self._shared_memory(), capture_error_mode="thread_local")
        return record_graph(graph, capturing, function)

    def capture_pieces(self, function: Callable[[Callable[[Callable[[], None]], None]], None]) -> Callable[[], None]:
        """The same in several graphs. See :meth:`capture` for what holds of their memory."""
        import torch

        def begin() -> torch.cuda.CUDAGraph:
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(pool=self._shared_memory(), capture_error_mode="thread_local")
            return graph

        if self._piece_stream is None:
            self._piece_stream = torch.cuda.Stream(self.config.device)
        with torch.cuda.stream(self._piece_stream):
            return record_pieces(begin, function)

    def _shared_memory(self) -> Any:
        import torch

        if self._graph_memory is None:
            self._graph_memory = torch.cuda.graph_pool_handle()
        return self._graph_memory

    def _module(self) -> Any:
        import torch

        return torch.cuda
