"""AMD GPUs through torch's ROCm build, which keeps the device type and module name ``cuda``."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drivetrain.backends.accelerator import AcceleratorPlatform, record_graph, visible_indices
from drivetrain.contracts.platform import PlatformFacts
from drivetrain.contracts.plugin import Probe, ProbeContext
from drivetrain.hardware import AMD, ROOT, TorchBuild, read_accelerators, read_text, read_torch_build

VISIBILITY = ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")
"""The runtime applies the first, and HIP one of the other two to what is left."""


def judge(root: Path, build: TorchBuild | None, environment: Mapping[str, str]) -> Probe:
    """Whether the machine under ``root`` can run this platform, from its kernel's files alone."""
    found = [device for device in read_accelerators(root) if device.vendor_id == AMD]
    if not found:
        return Probe.no("no_device", "no AMD GPU on this machine", wanted="an AMD GPU", offered="none")
    if not (root / "dev/kfd").exists():
        return Probe.no(
            "no_driver",
            f"{found[0]} is there, but the amdgpu compute driver is not",
            wanted="/dev/kfd",
            offered="no /dev/kfd; install the amdgpu driver, or start the container with --device /dev/kfd",
        )
    devices = read_kfd_devices(root)
    if not devices:
        return Probe.no(
            "no_compute_device",
            f"{found[0]} is there, but the driver lists no device that computes",
            wanted="a GPU node in /sys/class/kfd",
            offered="none",
        )
    if build is None or build.hip is None:
        return Probe.no(
            "torch_without_rocm",
            "an AMD GPU is there, but the installed torch was built without ROCm",
            wanted="a ROCm build of torch, see https://pytorch.org/get-started",
            offered=f"torch {build.version}" if build else "no torch",
        )
    if not _visible(devices, environment):
        set_ones = ", ".join(f"{name}={environment[name]!r}" for name in VISIBILITY if name in environment)
        return Probe.no(
            "hidden", "every AMD GPU is hidden from this process", wanted="a visible device", offered=set_ones
        )
    return Probe.yes(
        f"{len(devices)} AMD GPU{'s' if len(devices) > 1 else ''}, a driver, and torch with HIP {build.hip}"
    )


@dataclass(frozen=True)
class KfdDevice:
    """One GPU as the kernel's compute driver lists it.

    target:       ``"gfx942"``.
    slot:         PCI address.
    memory_bytes: video memory; None when the driver does not tell.
    unique_id:    ``"GPU-<hexadecimal>"``, as the visibility variables spell it.
    """

    name: str
    target: str
    slot: str
    memory_bytes: int | None
    unique_id: str


def read_kfd_devices(root: Path) -> tuple[KfdDevice, ...]:
    """GPU nodes of the compute driver's topology, in the runtime's order. CPU nodes have no gfx target.

    Source: Linux, drivers/gpu/drm/amd/amdkfd/kfd_topology.c.
    """
    folder = root / "sys/class/kfd/kfd/topology/nodes"
    if not folder.is_dir():
        return ()
    nodes = sorted((node for node in folder.iterdir() if node.name.isdigit()), key=lambda node: int(node.name))
    return tuple(device for node in nodes if (device := _read_node(root, node)) is not None)


def _read_node(root: Path, node: Path) -> KfdDevice | None:
    text = read_text(node / "properties") or ""
    numbers = {key: int(value) for key, value in re.findall(r"^(\w+) (\d+)$", text, re.MULTILINE)}
    if not numbers.get("gfx_target_version"):
        return None
    location = numbers.get("location_id", 0)
    slot = f"{numbers.get('domain', 0):04x}:{location >> 8:02x}:{location >> 3 & 0x1F:02x}.{location & 7}"
    pci = root / "sys/bus/pci/devices" / slot
    product = (read_text(pci / "product_name") or "").strip()
    memory = (read_text(pci / "mem_info_vram_total") or "").strip()
    return KfdDevice(
        name=product or f"AMD device {numbers.get('device_id', 0):#06x}",
        target=target_name(numbers["gfx_target_version"]),
        slot=slot,
        memory_bytes=int(memory) if memory.isdigit() else None,
        unique_id=f"GPU-{numbers.get('unique_id', 0):x}",
    )


def target_name(version: int) -> str:
    """The compiler's name of a gfx_target_version: 90402 (major, minor and step in two digits each) is ``"gfx942"``."""
    major, minor, step = version // 10_000, version // 100 % 100, version % 100
    return f"gfx{major}{minor:x}{step:x}"


def dtypes_of(target: str) -> frozenset[str]:
    """Parameter dtypes that a gfx target computes at a useful speed.

    float16 is fast on all targets that ROCm supports; bfloat16 on CDNA (gfx908, gfx90a, gfx94x, gfx95x) and from RDNA 3
    (gfx11). Source: AMD's matrix instruction calculator and the instruction set guides of each family.
    """
    has_bfloat16 = target in ("gfx908", "gfx90a") or target.startswith(("gfx94", "gfx95", "gfx11", "gfx12"))
    return frozenset({"float32", "float16", "bfloat16"} if has_bfloat16 else {"float32", "float16"})


def _visible(devices: tuple[KfdDevice, ...], environment: Mapping[str, str]) -> tuple[KfdDevice, ...]:
    runtime, hip, cuda = (environment.get(name) for name in VISIBILITY)
    for setting in (runtime, hip if hip is not None else cuda):
        devices = tuple(devices[i] for i in visible_indices(setting, [device.unique_id for device in devices]))
    return devices


def describe(
    devices: tuple[KfdDevice, ...], build: TorchBuild | None, environment: Mapping[str, str]
) -> tuple[PlatformFacts, ...]:
    """The facts of every visible device. Pure."""
    visible = _visible(devices, environment)
    return tuple(
        PlatformFacts(
            name="rocm",
            device_type="cuda",
            device_name=device.name,
            device_count=len(visible),
            dtypes=dtypes_of(device.target),
            architecture=device.target,
            # torch's ROCm build registers RCCL under NCCL's name.
            collective="nccl",
            total_memory_bytes=device.memory_bytes,
            details={"torch_hip": (build.hip if build else None) or "none", "slot": device.slot},
        )
        for device in visible
    )


class RocmPlatform(AcceleratorPlatform):
    """AMD GPUs through ROCm."""

    device_type = "cuda"
    pci_vendors = frozenset({AMD})

    @classmethod
    def probe(cls, context: ProbeContext) -> Probe:
        return judge(ROOT, read_torch_build(), os.environ)

    def facts(self) -> PlatformFacts:
        """Raises ConfigError when there is no device of this index."""
        return self.pick_device(describe(read_kfd_devices(ROOT), read_torch_build(), os.environ))

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        """Record into a HIP graph. Run ``function`` once before, so that nothing is left to compile."""
        import torch

        graph = torch.cuda.CUDAGraph()
        return record_graph(graph, torch.cuda.graph(graph), function)

    def _module(self) -> Any:
        import torch

        return torch.cuda
