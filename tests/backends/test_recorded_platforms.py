"""Each GPU platform answers from the kernel's files alone, and names the one thing that is missing."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from drivetrain.backends import cuda, rocm, xpu
from drivetrain.backends.nvml import NvidiaDevice, NvidiaDriver
from drivetrain.contracts.platform import PlatformFacts
from drivetrain.contracts.plugin import Probe
from drivetrain.errors import ConfigError
from drivetrain.hardware import TorchBuild, read_accelerators
from support.recorded_machines import NAMES, RecordedMachine, lay_out


def judge(machine: RecordedMachine, build: TorchBuild | None = None, visible: str | None = None) -> Probe:
    build = build or machine.build
    if machine.platform == "rocm":
        return rocm.judge(machine.root, build, {} if visible is None else {"HIP_VISIBLE_DEVICES": visible})
    judges: dict[str, Callable[[Path, TorchBuild | None, str | None], Probe]] = {"cuda": cuda.judge, "xpu": xpu.judge}
    return judges[machine.platform](machine.root, build, visible)


def describe(machine: RecordedMachine, visible: str | None = None) -> tuple[PlatformFacts, ...]:
    if machine.platform == "cuda":
        devices = [NvidiaDevice(**d | {"capability": tuple(d["capability"])}) for d in machine.driver["devices"]]
        return cuda.describe(NvidiaDriver(machine.driver["version"], tuple(devices)), machine.build, visible)
    if machine.platform == "rocm":
        environment = {} if visible is None else {"HIP_VISIBLE_DEVICES": visible}
        return rocm.describe(rocm.read_kfd_devices(machine.root), machine.build, environment)
    return xpu.describe(xpu.read_intel_devices(machine.root), machine.build, visible)


@pytest.fixture(params=NAMES)
def machine(request: pytest.FixtureRequest, tmp_path: Path) -> RecordedMachine:
    return lay_out(request.param, tmp_path)


def test_a_complete_machine_is_accepted(machine: RecordedMachine) -> None:
    probe = judge(machine)
    assert probe.ok, probe
    assert not probe.wanted


def test_its_facts_are_those_of_the_device(machine: RecordedMachine) -> None:
    facts = describe(machine)
    assert len(facts) == machine.expect["device_count"]
    assert facts[0].name == machine.platform
    for name, value in machine.expect.items():
        found = getattr(facts[0], name)
        assert (sorted(found) if name == "dtypes" else found) == value, name


def test_a_machine_without_the_device_is_refused(machine: RecordedMachine) -> None:
    shutil.rmtree(machine.root / "sys/bus/pci/devices")
    shutil.rmtree(machine.root / "dev")
    assert judge(machine).code == "no_device"


def test_a_machine_without_the_driver_is_refused(machine: RecordedMachine) -> None:
    shutil.rmtree(machine.root / "dev")
    shutil.rmtree(machine.root / "proc", ignore_errors=True)
    assert judge(machine).code == "no_driver"


def test_a_torch_built_for_something_else_is_refused(machine: RecordedMachine) -> None:
    probe = judge(machine, TorchBuild("2.13.0+cpu"))
    assert probe.code == f"torch_without_{machine.platform}"
    assert probe.offered == "torch 2.13.0+cpu"
    assert "pytorch.org" in probe.wanted


def test_a_hidden_device_is_refused_by_that_name(machine: RecordedMachine) -> None:
    probe = judge(machine, visible="-1")
    assert probe.code == "hidden"
    assert "VISIBLE" in probe.offered or "MASK" in probe.offered


def test_other_platforms_refuse_the_machine(machine: RecordedMachine) -> None:
    answers = {
        "cuda": cuda.judge(machine.root, machine.build, None),
        "rocm": rocm.judge(machine.root, machine.build, {}),
        "xpu": xpu.judge(machine.root, machine.build, None),
    }
    assert [name for name, probe in answers.items() if probe.ok] == [machine.platform]
    assert {probe.code for name, probe in answers.items() if name != machine.platform} == {"no_device"}


def test_a_servers_own_screen_is_no_accelerator(tmp_path: Path) -> None:
    machine = lay_out("h100", tmp_path)
    found = {device.vendor: device.can_compute for device in read_accelerators(machine.root)}
    assert found == {"NVIDIA": True, "ASPEED": False}
    assert {device.driver for device in read_accelerators(machine.root)} == {"nvidia", "ast"}


def test_visible_devices_are_chosen_by_index_and_by_identifier(tmp_path: Path) -> None:
    machine = lay_out("h100", tmp_path)
    uuids = [device["uuid"] for device in machine.driver["devices"]]
    for setting in ("3,1", f"{uuids[3]},{uuids[1][:12]}", "3, 1, 9, 2"):
        assert [facts.details["uuid"] for facts in describe(machine, setting)] == [uuids[3], uuids[1]], setting
        assert describe(machine, setting)[0].device_count == 2


def test_rocm_applies_the_runtimes_variable_before_hips(tmp_path: Path) -> None:
    machine = lay_out("mi300x", tmp_path)
    devices = rocm.read_kfd_devices(machine.root)
    environment = {"ROCR_VISIBLE_DEVICES": "1", "HIP_VISIBLE_DEVICES": "0"}
    assert [facts.details["slot"] for facts in rocm.describe(devices, machine.build, environment)] == ["0000:26:00.0"]
    assert not rocm.judge(machine.root, machine.build, {"ROCR_VISIBLE_DEVICES": ""}).ok


def test_an_xpu_mask_that_names_tiles_keeps_their_device(tmp_path: Path) -> None:
    machine = lay_out("max1550", tmp_path)
    assert len(describe(machine, "0.0,0.1")) == 1
    assert len(describe(machine, "")) == 1


def test_an_amd_device_without_a_compute_node_is_refused(tmp_path: Path) -> None:
    machine = lay_out("rx7900xtx", tmp_path)
    shutil.rmtree(machine.root / "sys/class/kfd")
    assert judge(machine).code == "no_compute_device"


@pytest.mark.parametrize(
    ("version", "target"),
    [(90402, "gfx942"), (90010, "gfx90a"), (110000, "gfx1100"), (100300, "gfx1030"), (120001, "gfx1201")],
)
def test_gfx_targets_are_spelled_as_the_compiler_spells_them(version: int, target: str) -> None:
    assert rocm.target_name(version) == target


@pytest.mark.parametrize(
    ("capability", "fast"),
    [((6, 0), {"float16"}), ((6, 1), set()), ((7, 5), {"float16"}), ((8, 0), {"float16", "bfloat16"})],
)
def test_cuda_lists_only_dtypes_that_compute_fast(capability: tuple[int, int], fast: set[str]) -> None:
    assert cuda.dtypes_of(capability) == fast | {"float32"}


def test_an_index_that_no_device_has_is_an_error_with_the_range(tmp_path: Path) -> None:
    platform = cuda.CudaPlatform(cuda.CudaPlatform.Config(device=8))
    with pytest.raises(ConfigError, match=r"found 8; allowed: 0 to 7"):
        platform.pick_device(describe(lay_out("h100", tmp_path)))
    with pytest.raises(ConfigError, match="no device is visible"):
        platform.pick_device(())
