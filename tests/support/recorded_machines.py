"""Machines written down as small JSON files, laid out again as a tree of the kernel's files that platforms can read.

``pci``: slot -> vendor, device, class, driver, and further files of the device. ``files``: path -> text, from the root.
``torch``: the build that is installed there. ``driver``: what NVIDIA's driver answers. ``expect``: the facts.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drivetrain.hardware import TorchBuild

RECORDED = Path(__file__).parent.parent / "backends" / "recorded"
NAMES = sorted(path.stem for path in RECORDED.glob("*.json"))


@dataclass(frozen=True)
class RecordedMachine:
    """A machine laid out under ``root``."""

    platform: str
    root: Path
    build: TorchBuild
    driver: dict[str, Any]
    expect: dict[str, Any]


def lay_out(name: str, root: Path) -> RecordedMachine:
    """Write the tree of the machine ``name`` under ``root``."""
    content = json.loads((RECORDED / f"{name}.json").read_text())
    for slot, device in content["pci"].items():
        folder = root / "sys/bus/pci/devices" / slot
        for file in ("vendor", "device", "class"):
            write(folder / file, device[file] + "\n")
        for path, text in device["files"].items():
            write(folder / path, text)
        driver = root / "sys/bus/pci/drivers" / device["driver"]
        driver.mkdir(parents=True, exist_ok=True)
        (folder / "driver").symlink_to(driver)
    for path, text in content["files"].items():
        write(root / path, text)
    build = TorchBuild(**content["torch"])
    return RecordedMachine(content["platform"], root, build, content.get("driver", {}), content["expect"])


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
