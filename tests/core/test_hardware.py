"""The machine is read from the kernel's files: cores within affinity and quota, memory within the control groups."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from drivetrain.backends.accelerator import visible_indices
from drivetrain.hardware import (
    TorchBuild,
    parse_torch_build,
    read_accelerators,
    read_cache_bytes,
    read_machine,
    read_memory,
    read_processor,
    read_torch_build,
)
from support.recorded_machines import write

GIB = 2**30
_X86 = (
    "processor\t: 0\nvendor_id\t: GenuineIntel\nmodel name\t: Some Processor 9000\n"
    "flags\t\t: fpu sse2 avx2 fma avx512f avx512_bf16 amx_tile\n"
)
_ARM = "processor\t: 0\nBogoMIPS\t: 243.75\nFeatures\t: fp asimd aes asimddp\nCPU implementer\t: 0x41\n"


def lay_out_cores(root: Path, core_ids: list[int], cpuinfo: str = _X86) -> None:
    """A processor whose logical core i belongs to core ``core_ids[i]`` of one package."""
    write(root / "proc/cpuinfo", cpuinfo)
    for logical, core in enumerate(core_ids):
        topology = root / f"sys/devices/system/cpu/cpu{logical}/topology"
        write(topology / "core_id", f"{core}\n")
        write(topology / "physical_package_id", "0\n")


def lay_out_memory(root: Path, total: int, available: int) -> None:
    write(root / "proc/meminfo", f"MemTotal: {total // 1024} kB\nMemFree: 1 kB\nMemAvailable: {available // 1024} kB\n")


def test_the_largest_cache_is_the_last_level(tmp_path: Path) -> None:
    assert read_cache_bytes(tmp_path) == 0
    for index, size in enumerate(("32K", "32K", "1024K", "32768K")):
        write(tmp_path / f"sys/devices/system/cpu/cpu0/cache/index{index}/size", f"{size}\n")
    assert read_cache_bytes(tmp_path) == 32 * 2**20


def test_threads_of_one_core_count_once(tmp_path: Path) -> None:
    lay_out_cores(tmp_path, [0, 0, 1, 1, 2, 2, 3, 3])
    processor = read_processor(tmp_path, affinity=range(8))
    assert (processor.model, processor.machine) == ("Some Processor 9000", "x86_64")
    assert processor.vendor == "GenuineIntel"
    assert (processor.logical_cores, processor.physical_cores, processor.usable_cores) == (8, 4, 4)
    assert read_processor(tmp_path, affinity=[2, 3, 4]).usable_cores == 2


def test_cores_of_an_unknown_topology_count_each(tmp_path: Path) -> None:
    write(tmp_path / "proc/cpuinfo", _X86)
    assert read_processor(tmp_path, affinity=range(6)).usable_cores == 6


def test_the_widest_instruction_set_names_the_architecture(tmp_path: Path) -> None:
    lay_out_cores(tmp_path, [0])
    processor = read_processor(tmp_path, affinity=[0])
    assert processor.architecture == "avx512"
    assert processor.instruction_sets == ("avx2", "fma", "avx512f", "avx512_bf16", "amx_tile")
    lay_out_cores(tmp_path, [0], _ARM)
    processor = read_processor(tmp_path, affinity=[0])
    assert (processor.architecture, processor.machine, processor.model) == ("neon", "aarch64", "aarch64 processor")


@pytest.mark.parametrize(("quota", "usable"), [("max", 4), ("250000", 2), ("50000", 1), ("900000", 4)])
def test_a_quota_of_version_2_bounds_the_cores(tmp_path: Path, quota: str, usable: int) -> None:
    lay_out_cores(tmp_path, [0, 1, 2, 3])
    write(tmp_path / "proc/self/cgroup", "0::/pod/box\n")
    write(tmp_path / "sys/fs/cgroup/cgroup.controllers", "cpu memory\n")
    write(tmp_path / "sys/fs/cgroup/pod/cpu.max", f"{quota} 100000\n")
    write(tmp_path / "sys/fs/cgroup/pod/box/cpu.max", "max 100000\n")
    assert read_processor(tmp_path, affinity=range(4)).usable_cores == usable


def test_a_quota_of_version_1_is_found_where_a_container_sees_it(tmp_path: Path) -> None:
    """/proc names the host's path while the container's own group is mounted as the root."""
    lay_out_cores(tmp_path, [0, 1, 2, 3])
    write(tmp_path / "proc/self/cgroup", "4:memory:/docker/abc\n2:cpu,cpuacct:/docker/abc\n")
    write(tmp_path / "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "300000\n")
    write(tmp_path / "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us", "100000\n")
    processor = read_processor(tmp_path, affinity=range(4))
    assert (processor.quota_cores, processor.usable_cores) == (3.0, 3)
    write(tmp_path / "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "-1\n")
    assert read_processor(tmp_path, affinity=range(4)).quota_cores is None


def test_memory_without_limits_is_the_machines(tmp_path: Path) -> None:
    lay_out_memory(tmp_path, 64 * GIB, 60 * GIB)
    memory = read_memory(tmp_path)
    assert (memory.total_bytes, memory.available_bytes, memory.is_limited) == (64 * GIB, 60 * GIB, False)


def test_the_tightest_limit_of_version_2_bounds_memory_and_file_cache_can_be_reclaimed(tmp_path: Path) -> None:
    lay_out_memory(tmp_path, 64 * GIB, 60 * GIB)
    write(tmp_path / "proc/self/cgroup", "0::/pod/box\n")
    groups = tmp_path / "sys/fs/cgroup"
    write(groups / "cgroup.controllers", "cpu memory\n")
    write(groups / "pod/memory.max", f"{8 * GIB}\n")
    write(groups / "pod/memory.current", f"{5 * GIB}\n")
    write(groups / "pod/memory.stat", f"anon 1\ninactive_file {2 * GIB}\nactive_file 7\n")
    write(groups / "pod/box/memory.max", "max\n")
    memory = read_memory(tmp_path)
    assert (memory.total_bytes, memory.available_bytes, memory.is_limited) == (8 * GIB, 5 * GIB, True)


def test_no_limit_of_version_1_is_a_huge_number(tmp_path: Path) -> None:
    lay_out_memory(tmp_path, 64 * GIB, 60 * GIB)
    write(tmp_path / "proc/self/cgroup", "4:memory:/\n")
    write(tmp_path / "sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")
    write(tmp_path / "sys/fs/cgroup/memory/memory.usage_in_bytes", f"{GIB}\n")
    assert not read_memory(tmp_path).is_limited
    write(tmp_path / "sys/fs/cgroup/memory/memory.limit_in_bytes", f"{2 * GIB}\n")
    memory = read_memory(tmp_path)
    assert (memory.total_bytes, memory.available_bytes) == (2 * GIB, GIB)


def test_a_group_over_its_limit_has_nothing_left(tmp_path: Path) -> None:
    lay_out_memory(tmp_path, 64 * GIB, 60 * GIB)
    write(tmp_path / "proc/self/cgroup", "4:memory:/\n")
    write(tmp_path / "sys/fs/cgroup/memory/memory.limit_in_bytes", f"{GIB}\n")
    write(tmp_path / "sys/fs/cgroup/memory/memory.usage_in_bytes", f"{2 * GIB}\n")
    assert read_memory(tmp_path).available_bytes == 0


def test_only_displays_and_accelerators_are_listed(tmp_path: Path) -> None:
    for slot, vendor, code in (
        ("0000:00:00.0", "0x8086", "0x060000"),
        ("0000:01:00.0", "0x1234", "0x030000"),
        ("0000:02:00.0", "0x1e52", "0x120000"),
        ("0000:03:00.0", "0x8086", "0x020000"),
    ):
        folder = tmp_path / "sys/bus/pci/devices" / slot
        for name, text in (("vendor", vendor), ("device", "0x0001"), ("class", code)):
            write(folder / name, text + "\n")
    # A slot whose files can't be read is a slot nothing is known of.
    (tmp_path / "sys/bus/pci/devices/0000:04:00.0").mkdir()
    found = read_accelerators(tmp_path)
    assert [(device.vendor, device.can_compute) for device in found] == [("QEMU", False), ("Tenstorrent", True)]
    assert str(found[1]) == "Tenstorrent device 0x0001 at 0000:02:00.0"


def test_devices_have_the_names_that_their_drivers_give_them(tmp_path: Path) -> None:
    for slot, vendor in (("0000:01:00.0", "0x10de"), ("0000:02:00.0", "0x1002"), ("0000:03:00.0", "0x1002")):
        for name, text in (("vendor", vendor), ("device", "0x2330"), ("class", "0x030200")):
            write(tmp_path / "sys/bus/pci/devices" / slot / name, text + "\n")
    told = "Model: \t\t NVIDIA H100 80GB HBM3\nIRQ:   \t\t 41\n"
    write(tmp_path / "proc/driver/nvidia/gpus/0000:01:00.0/information", told)
    write(tmp_path / "sys/bus/pci/devices/0000:02:00.0/product_name", "AMD Instinct MI300X OAM\n")
    write(tmp_path / "sys/bus/pci/devices/0000:03:00.0/product_name", "\n")
    assert [str(device) for device in read_accelerators(tmp_path)] == [
        "NVIDIA H100 80GB HBM3 at 0000:01:00.0",
        "AMD Instinct MI300X OAM at 0000:02:00.0",
        "AMD device 0x2330 at 0000:03:00.0",
    ]


def test_an_empty_tree_still_describes_a_machine(tmp_path: Path) -> None:
    machine = read_machine(tmp_path, affinity=[0])
    assert machine.processor.usable_cores == 1
    assert machine.accelerators == ()
    assert machine.memory.total_bytes == 0


def test_this_machine_is_read_whole() -> None:
    machine = read_machine()
    assert machine.processor.usable_cores >= 1
    assert machine.memory.total_bytes > 2**28
    assert 0 < machine.memory.available_bytes <= machine.memory.total_bytes


def test_the_build_of_torch_is_read_without_importing_it() -> None:
    build = read_torch_build()
    assert build is not None
    assert (build.version, build.cuda, build.hip) == (torch.__version__, torch.version.cuda, torch.version.hip)
    text = "__version__ = '2.13.0+cu130'\ndebug = False\ncuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n"
    assert parse_torch_build(text) == TorchBuild("2.13.0+cu130", cuda="13.0")


@pytest.mark.parametrize(
    ("setting", "left"),
    [(None, (0, 1, 2)), ("", ()), ("-1", ()), ("2,0", (2, 0)), ("0,7,1", (0,)), ("1,1", (1,)), ("b", (1,)), ("c", ())],
)
def test_a_visibility_setting_leaves_devices_in_its_order(setting: str | None, left: tuple[int, ...]) -> None:
    """An entry that names no device, one twice or several at once ends the list."""
    assert visible_indices(setting, ["a", "b0", "cx"] if setting != "c" else ["a", "c0", "c1"]) == left
