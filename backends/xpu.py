"""Intel GPUs through torch's XPU build."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drivetrain.backends.accelerator import AcceleratorPlatform, record_graph, visible_indices
from drivetrain.contracts.platform import PlatformFacts
from drivetrain.contracts.plugin import Probe, ProbeContext
from drivetrain.hardware import INTEL, ROOT, PciDevice, TorchBuild, read_accelerators, read_text, read_torch_build

VISIBILITY = "ZE_AFFINITY_MASK"

_MATRIX_FAMILIES = frozenset({"pvc", "dg2", "bmg"})
_PRODUCTS = {
    0x0BD5: ("Intel Data Center GPU Max 1550", "pvc"),
    0x0BD6: ("Intel Data Center GPU Max 1550", "pvc"),
    0x0BDA: ("Intel Data Center GPU Max 1100", "pvc"),
    0x56A0: ("Intel Arc A770", "dg2"),
    0x56A1: ("Intel Arc A750", "dg2"),
    0x56A2: ("Intel Arc A580", "dg2"),
    0x56A5: ("Intel Arc A380", "dg2"),
    0x56A6: ("Intel Arc A310", "dg2"),
    0x56C0: ("Intel Data Center GPU Flex 170", "dg2"),
    0x56C1: ("Intel Data Center GPU Flex 140", "dg2"),
    0xE20B: ("Intel Arc B580", "bmg"),
    0xE20C: ("Intel Arc B570", "bmg"),
    0xE211: ("Intel Arc Pro B60", "bmg"),
}
"""PCI device id -> (product, family). Source: Linux, include/drm/intel/pciids.h, and Intel's product pages."""


def judge(root: Path, build: TorchBuild | None, visible: str | None) -> Probe:
    """Whether the machine under ``root`` can run this platform, from its kernel's files alone."""
    found = [device for device in read_accelerators(root) if device.vendor_id == INTEL]
    if not found:
        return Probe.no("no_device", "no Intel GPU on this machine", wanted="an Intel GPU", offered="none")
    if not any((root / "dev/dri").glob("renderD*")):
        return Probe.no(
            "no_driver",
            f"{found[0]} is there, but it has no render node",
            wanted="/dev/dri/renderD*",
            offered="none; load the i915 or xe driver, or start the container with --device /dev/dri",
        )
    if build is None or build.xpu is None:
        return Probe.no(
            "torch_without_xpu",
            "an Intel GPU is there, but the installed torch was built without XPU support",
            wanted="an XPU build of torch, see https://pytorch.org/get-started",
            offered=f"torch {build.version}" if build else "no torch",
        )
    if not _visible(read_intel_devices(root), visible):
        return Probe.no(
            "hidden",
            f"{VISIBILITY} hides every device from this process",
            wanted="a visible device",
            offered=f"{VISIBILITY}={visible!r}",
        )
    return Probe.yes(f"{len(found)} Intel GPU{'s' if len(found) > 1 else ''}, a driver, and torch with XPU {build.xpu}")


@dataclass(frozen=True)
class IntelDevice:
    """One Intel GPU as the kernel's files describe it.

    family:       ``"pvc"``, ``"dg2"``, ``"bmg"``; ``"unknown"`` for a device id that is not in the table.
    memory_bytes: local memory; None for a device that shares the host's, or whose driver does not tell.
    """

    name: str
    family: str
    slot: str
    driver: str
    memory_bytes: int | None


def read_intel_devices(root: Path) -> tuple[IntelDevice, ...]:
    """Intel display devices and accelerators, by slot."""
    found = (device for device in read_accelerators(root) if device.vendor_id == INTEL)
    return tuple(_describe_pci(root, device) for device in found)


def _describe_pci(root: Path, device: PciDevice) -> IntelDevice:
    name, family = _PRODUCTS.get(device.device_id, (f"Intel GPU {device.device_id:#06x}", "unknown"))
    return IntelDevice(name, family, device.slot, device.driver or "none", _local_memory(root, device.slot))


def _local_memory(root: Path, slot: str) -> int | None:
    """Local memory: xe lists each tile's below the device, i915 the whole device's below its card."""
    folder = root / "sys/bus/pci/devices" / slot
    for pattern in ("tile*/physical_vram_size_bytes", "drm/card*/lmem_total_bytes"):
        sizes = [(read_text(path) or "").strip() for path in sorted(folder.glob(pattern))]
        if sizes and all(size for size in sizes):
            return sum(int(size, 0) for size in sizes)
    return None


def _visible(devices: tuple[IntelDevice, ...], setting: str | None) -> tuple[IntelDevice, ...]:
    """Devices that the Level Zero mask leaves; an entry ``"1.0"`` names a tile of device 1."""
    if setting:
        whole = dict.fromkeys(entry.strip().partition(".")[0] for entry in setting.split(","))
        setting = ",".join(whole)
    # Unlike CUDA's variable, an empty mask hides nothing.
    indices = visible_indices(setting or None, [device.slot for device in devices])
    return tuple(devices[i] for i in indices)


def describe(
    devices: tuple[IntelDevice, ...], build: TorchBuild | None, visible: str | None
) -> tuple[PlatformFacts, ...]:
    """The facts of every visible device. Pure."""
    shown = _visible(devices, visible)
    return tuple(
        PlatformFacts(
            name="xpu",
            device_type="xpu",
            device_name=device.name,
            device_count=len(shown),
            dtypes=dtypes_of(device.family),
            architecture=device.family,
            collective="xccl",
            total_memory_bytes=device.memory_bytes,
            details={
                "torch_xpu": (build.xpu if build else None) or "none",
                "slot": device.slot,
                "kernel_driver": device.driver,
            },
        )
        for device in shown
    )


def dtypes_of(family: str) -> frozenset[str]:
    """Parameter dtypes at a useful speed: bfloat16 needs the matrix engines (XMX) of a family known to have them."""
    return frozenset({"float32", "float16", "bfloat16"} if family in _MATRIX_FAMILIES else {"float32", "float16"})


def _torch_has_graphs() -> bool:
    """Whether the installed torch records graphs on XPU, told without importing it."""
    import importlib.util

    spec = importlib.util.find_spec("torch")
    folders = list(spec.submodule_search_locations or []) if spec else []
    return any(Path(folder, "xpu/graphs.py").exists() for folder in folders)


class XpuPlatform(AcceleratorPlatform):
    """Intel GPUs through torch's XPU build."""

    device_type = "xpu"
    pci_vendors = frozenset({INTEL})

    @classmethod
    def probe(cls, context: ProbeContext) -> Probe:
        return judge(ROOT, read_torch_build(), os.environ.get(VISIBILITY))

    @classmethod
    def abilities(cls) -> frozenset[str]:
        claimed = super().abilities()
        return claimed if _torch_has_graphs() else claimed - {"graphs"}

    def facts(self) -> PlatformFacts:
        """Raises ConfigError when there is no device of this index."""
        return self.pick_device(describe(read_intel_devices(ROOT), read_torch_build(), os.environ.get(VISIBILITY)))

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        """Record into an XPU graph. Run ``function`` once before, so that nothing is left to compile."""
        import torch

        graph = torch.xpu.XPUGraph()
        return record_graph(graph, torch.xpu.graph(graph), function)

    def _module(self) -> Any:
        import torch

        return torch.xpu
