"""What hardware this machine has, read from the kernel's files: no driver library, no device context, no torch.

Every reader takes the root folder of the files (``/``), so that a recorded machine can be read as well as this one.
Platform plugins decide from it whether they can work here; ``drivetrain doctor`` prints it.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import platform
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")

NVIDIA, AMD, INTEL = 0x10DE, 0x1002, 0x8086
"""PCI vendor ids of the makers whose display devices compute too."""

_VENDORS = {
    NVIDIA: "NVIDIA",
    AMD: "AMD",
    INTEL: "Intel",
    0x1D0F: "Amazon",
    0x1AE0: "Google",
    0x1DA3: "Habana",
    0x1E52: "Tenstorrent",
    0x19E5: "Huawei",
    0x17CB: "Qualcomm",
    0x1A03: "ASPEED",
    0x102B: "Matrox",
    0x1AF4: "virtio",
    0x1234: "QEMU",
    0x15AD: "VMware",
    0x1414: "Microsoft",
}
_DISPLAY_CLASS, _ACCELERATOR_CLASS = 0x03, 0x12


@dataclass(frozen=True)
class PciDevice:
    """A display controller or processing accelerator on the PCI bus.

    slot:       ``"0000:17:00.0"``.
    class_code: 24 bits: base class, subclass, interface.
    driver:     kernel driver bound to it; None when there is none.
    model:      what its driver calls it; None where it tells nothing.
    """

    slot: str
    vendor_id: int
    device_id: int
    class_code: int
    driver: str | None = None
    model: str | None = None

    @property
    def vendor(self) -> str:
        return _VENDORS.get(self.vendor_id, f"vendor {self.vendor_id:#06x}")

    @property
    def can_compute(self) -> bool:
        """False for plain display controllers: virtual screens, and the management processor of a server."""
        return self.class_code >> 16 == _ACCELERATOR_CLASS or self.vendor_id in (NVIDIA, AMD, INTEL)

    def __str__(self) -> str:
        return f"{self.model or f'{self.vendor} device {self.device_id:#06x}'} at {self.slot}"


@dataclass(frozen=True)
class Processor:
    """The CPU as this process may use it.

    model:            product name.
    machine:          ``"x86_64"``, ``"aarch64"``.
    instruction_sets: those that kernels care about, by the names the Linux kernel uses.
    logical_cores:    logical cores this process may run on.
    physical_cores:   distinct cores among them.
    quota_cores:      cores' worth of time the control group grants; None without a quota.
    vendor:           its maker as an x86 processor gives it, ``"GenuineIntel"``; empty elsewhere.
    """

    model: str
    machine: str
    instruction_sets: tuple[str, ...]
    logical_cores: int
    physical_cores: int
    quota_cores: float | None
    vendor: str = ""

    @property
    def usable_cores(self) -> int:
        """Threads that can compute at once without sharing a core or running into the quota; at least 1."""
        if self.quota_cores is None:
            return self.physical_cores
        return max(1, min(self.physical_cores, int(self.quota_cores)))

    @property
    def architecture(self) -> str:
        """The widest vector instruction set: ``"avx512"``, ``"avx2"``, ``"neon"``; else the machine's name."""
        for flag, name in (("avx512f", "avx512"), ("avx2", "avx2"), ("sve", "sve"), ("asimd", "neon")):
            if flag in self.instruction_sets:
                return name
        return self.machine


@dataclass(frozen=True)
class HostMemory:
    """Bytes of main memory, as bounded by the control groups of this process.

    total_bytes:     physical memory, or the tightest limit when that is less.
    available_bytes: what can be given out without swapping or running into a limit.
    is_limited:      True when a control group's limit is below the physical memory.
    """

    total_bytes: int
    available_bytes: int
    is_limited: bool


@dataclass(frozen=True)
class TorchBuild:
    """What the installed torch was compiled for: versions of CUDA, HIP and the XPU runtime, None where it was not."""

    version: str
    cuda: str | None = None
    hip: str | None = None
    xpu: str | None = None


@dataclass(frozen=True)
class Machine:
    """One machine: what its kernel's files say. ``root`` lets a platform read files of its own."""

    root: Path
    processor: Processor
    memory: HostMemory
    accelerators: tuple[PciDevice, ...]

    def devices_of(self, vendor_id: int) -> tuple[PciDevice, ...]:
        """PCI devices of one vendor, by slot."""
        return tuple(device for device in self.accelerators if device.vendor_id == vendor_id)


def read_machine(root: Path = ROOT, affinity: Collection[int] | None = None) -> Machine:
    """Everything about the machine under ``root``. ``affinity`` overrides the cores this process may run on."""
    return Machine(root, read_processor(root, affinity), read_memory(root), read_accelerators(root))


# --- PCI -----------------------------------------------------------------------------------------------------------


def read_accelerators(root: Path = ROOT) -> tuple[PciDevice, ...]:
    """Display controllers and processing accelerators, by slot. Empty where there is no PCI bus to read."""
    bus = root / "sys/bus/pci/devices"
    if not bus.is_dir():
        return ()
    found = (_read_pci_device(root, entry) for entry in sorted(bus.iterdir()))
    return tuple(device for device in found if device is not None)


def _read_pci_device(root: Path, entry: Path) -> PciDevice | None:
    class_code = _read_number(entry / "class")
    vendor_id, device_id = _read_number(entry / "vendor"), _read_number(entry / "device")
    if class_code is None or vendor_id is None or device_id is None:
        return None
    if class_code >> 16 not in (_DISPLAY_CLASS, _ACCELERATOR_CLASS):
        return None
    driver = entry / "driver"
    name = driver.resolve().name if driver.exists() else None
    return PciDevice(entry.name, vendor_id, device_id, class_code, name, _read_model(root, entry))


def _read_model(root: Path, entry: Path) -> str | None:
    """The name that NVIDIA's and AMD's drivers give a device."""
    told = read_text(root / "proc/driver/nvidia/gpus" / entry.name / "information") or ""
    names = [line.partition(":")[2].strip() for line in told.splitlines() if line.startswith("Model:")]
    return next(filter(None, [*names, (read_text(entry / "product_name") or "").strip()]), None)


# --- processor -----------------------------------------------------------------------------------------------------

_INSTRUCTION_SETS = (
    *(
        "avx2",
        "fma",
        "f16c",
        "avx_vnni",
        "avx512f",
        "avx512bw",
        "avx512dq",
        "avx512vl",
        "avx512_vnni",
        "avx512_bf16",
        "avx512_fp16",
    ),
    *("amx_tile", "amx_int8", "amx_bf16"),
    *("asimd", "asimddp", "atomics", "i8mm", "bf16", "sve", "sve2"),
)


def read_processor(root: Path = ROOT, affinity: Collection[int] | None = None) -> Processor:
    """The processor, from /proc/cpuinfo, the topology in /sys, this process's affinity and its CPU quota."""
    text = read_text(root / "proc/cpuinfo") or ""
    flags = set((_cpuinfo_field(text, "flags") or _cpuinfo_field(text, "Features") or "").split())
    machine = platform.machine() if not flags else ("aarch64" if "asimd" in flags else "x86_64")
    cores = sorted(_affinity(text) if affinity is None else affinity)
    topology = {_core_identity(root, core) for core in cores}
    return Processor(
        model=_cpuinfo_field(text, "model name") or f"{machine} processor",
        machine=machine,
        instruction_sets=tuple(name for name in _INSTRUCTION_SETS if name in flags),
        logical_cores=len(cores),
        physical_cores=len(topology),
        quota_cores=_cpu_quota(root),
        vendor=_cpuinfo_field(text, "vendor_id") or "",
    )


@dataclass(frozen=True)
class Core:
    """One logical core. physical: (package, core), shared by logical cores that are threads of one. node: of memory."""

    number: int
    physical: tuple[int, int]
    node: int


def read_cores(root: Path = ROOT, affinity: Collection[int] | None = None) -> tuple[Core, ...]:
    """The logical cores that this process may run on, from the topology in /sys."""
    numbers = sorted(_affinity(read_text(root / "proc/cpuinfo") or "") if affinity is None else affinity)
    nodes: dict[int, int] = {}
    for folder in sorted((root / "sys/devices/system/node").glob("node[0-9]*")):
        for number in _parse_cores(read_text(folder / "cpulist") or ""):
            nodes[number] = int(folder.name.removeprefix("node"))
    return tuple(Core(number, _core_identity(root, number), nodes.get(number, 0)) for number in numbers)


def _parse_cores(text: str) -> list[int]:
    """``0-2,5`` as 0, 1, 2, 5: the kernel's form of a list of cores."""
    numbers: list[int] = []
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first.isdigit():
            numbers += range(int(first), int(last or first) + 1)
    return numbers


def _cpuinfo_field(text: str, name: str) -> str | None:
    match = re.search(rf"^{name}\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1].strip() if match else None


def _affinity(cpuinfo: str) -> Collection[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return range(max(1, len(re.findall(r"^processor\s*:", cpuinfo, re.MULTILINE))))


def _core_identity(root: Path, core: int) -> tuple[int, int]:
    """(package, core) of a logical core; where the kernel does not tell, each logical core counts as one of its own."""
    topology = root / f"sys/devices/system/cpu/cpu{core}/topology"
    package, number = _read_number(topology / "physical_package_id"), _read_number(topology / "core_id")
    return (package or 0, number) if number is not None else (-1, core)


def read_cache_bytes(root: Path = ROOT) -> int:
    """Bytes of the largest cache that the first core sees; 0 where the kernel does not tell."""
    sizes = [read_text(path) or "" for path in root.glob("sys/devices/system/cpu/cpu0/cache/index*/size")]
    return max((int(match[1]) * 1024 for size in sizes if (match := re.match(r"(\d+)K", size))), default=0)


# --- control groups ------------------------------------------------------------------------------------------------


def _control_groups(root: Path, controller: str) -> tuple[int, list[Path]]:
    """(version, folders from this process's own group up to the mount) for ``controller``; version 0 without one.

    A container often sees its own group mounted as the root while /proc still names the host's path, so only folders
    that exist are returned.
    """
    mount = root / "sys/fs/cgroup"
    own_v2 = None
    for line in (read_text(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            for name in (controllers, controller):
                if (mount / name).is_dir():
                    return 1, _ancestors(mount / name, path)
        if not controllers:
            own_v2 = path
    if own_v2 is not None and (mount / "cgroup.controllers").exists():
        return 2, _ancestors(mount, own_v2)
    return 0, []


def _ancestors(mount: Path, path: str) -> list[Path]:
    parts = [part for part in path.split("/") if part not in ("", "..")]
    folders = [mount.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]
    return [folder for folder in folders if folder.is_dir()]


def _cpu_quota(root: Path) -> float | None:
    """Cores' worth of CPU time granted by the tightest control group; None without a quota."""
    version, folders = _control_groups(root, "cpu")
    quotas = []
    for folder in folders:
        if version == 2:
            quota, _, period = (read_text(folder / "cpu.max") or "max").strip().partition(" ")
            if quota != "max":
                quotas.append(int(quota) / int(period or 100_000))
        else:
            micros, every = _read_number(folder / "cpu.cfs_quota_us"), _read_number(folder / "cpu.cfs_period_us")
            if micros is not None and every and micros > 0:
                quotas.append(micros / every)
    return min(quotas, default=None)


def read_memory(root: Path = ROOT) -> HostMemory:
    """Main memory now, from /proc/meminfo and the memory control groups."""
    text = read_text(root / "proc/meminfo") or ""
    fields = {name: int(kib) * 1024 for name, kib in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}
    physical = fields.get("MemTotal", 0)
    total, available = physical, fields.get("MemAvailable", fields.get("MemFree", 0))
    version, folders = _control_groups(root, "memory")
    for folder in folders:
        limit, used = _memory_limit(folder, version)
        # Version 1 writes "no limit" as a number near 2^63.
        if limit is not None and limit < physical:
            total = min(total, limit)
            available = min(available, max(0, limit - used))
    return HostMemory(total, available, is_limited=total < physical)


def _memory_limit(folder: Path, version: int) -> tuple[int | None, int]:
    """(limit, bytes in use that can't be reclaimed) of one memory group."""
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    limit, used = _read_number(folder / names[0]), _read_number(folder / names[1])
    key = "inactive_file" if version == 2 else "total_inactive_file"
    cache = re.search(rf"^{key} (\d+)$", read_text(folder / "memory.stat") or "", re.MULTILINE)
    return limit, max(0, (used or 0) - (int(cache[1]) if cache else 0))


# --- torch ---------------------------------------------------------------------------------------------------------


def read_torch_build() -> TorchBuild | None:
    """What the installed torch was compiled for, read from its version file; None when torch is not installed.

    torch itself is not imported: that takes seconds, and a probe needs only these four words.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return None
    text = read_text(Path(next(iter(spec.submodule_search_locations)), "version.py"))
    return parse_torch_build(text) if text else None


def parse_torch_build(text: str) -> TorchBuild:
    """The build described by the text of ``torch/version.py``."""
    values: dict[str, object] = {}
    for node in ast.parse(text).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        value = getattr(node, "value", None)
        if isinstance(target, ast.Name) and isinstance(value, ast.Constant):
            values[target.id] = value.value
    named = {name: str(values[name]) if values.get(name) else None for name in ("cuda", "hip", "xpu")}
    return TorchBuild(str(values.get("__version__", "unknown")), **named)


# --- small readers -------------------------------------------------------------------------------------------------


def read_text(path: Path, limit_bytes: int = -1) -> str | None:
    """Text of a file of the kernel; None when it is not there or not ours to read, which both mean "not known".

    limit_bytes: read no more than the file's head; the kernel writes such files while they are read, part by part.
    """
    try:
        with path.open("rb") as file:
            return file.read(limit_bytes).decode("utf-8", errors="replace")
    except OSError:
        return None


def _read_number(path: Path) -> int | None:
    text = (read_text(path) or "").strip()
    return int(text, 0) if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)", text) else None
