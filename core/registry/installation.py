"""What is wrong with how distributions are installed: shadowed copies, leftovers, files that are gone.

Reads metadata only; imports no plugin.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import importlib_metadata

from drivetrain.registry.discovery import PluginRef, is_module, normalized

_SHOWN_FILES = 1


@dataclass(frozen=True)
class Copy:
    """One installation of a distribution.

    folder: its metadata folder (``....dist-info`` or ``....egg-info``).
    points: its entry points in the ``drivetrain.`` groups.
    """

    distribution: str
    version: str
    folder: Path
    points: frozenset[tuple[str, str, str]]

    @property
    def is_leftover(self) -> bool:
        """Whether pip was interrupted while it removed this copy: until it is done the folder's name begins with ~."""
        return self.folder.name.startswith("~")

    def __str__(self) -> str:
        return f"{self.distribution} {self.version} in {self.folder}"


@dataclass(frozen=True)
class Shadowed:
    """A copy of a distribution that an earlier one on the path hides, and that is not the same."""

    used: Copy
    hidden: Copy


@dataclass(frozen=True)
class Stale:
    """A distribution whose metadata promises files that are not there.

    missing: entry points whose module can't be found (``KIND/NAME: module``), and files of its RECORD that are gone.
    """

    distribution: str
    version: str
    missing: tuple[str, ...]


def find_copies() -> list[Copy]:
    """Every installed copy of a distribution that registers something of ours, in the order of the path."""
    copies: dict[Path, Copy] = {}
    for distribution in importlib_metadata.distributions():
        folder = getattr(distribution, "_path", None)  # the only way to it that importlib-metadata offers
        if not isinstance(folder, Path):
            continue
        try:
            copy = _copy_of(distribution, folder.resolve())
        except Exception:  # unreadable metadata is reported by discovery.foreign_groups
            continue
        if copy.points:
            copies.setdefault(copy.folder, copy)
    return list(copies.values())


def _copy_of(distribution: Any, folder: Path) -> Copy:
    text = distribution.read_text("entry_points.txt") or ""
    points: Iterable[Any] = distribution.entry_points if "drivetrain." in text else ()
    ours = frozenset(
        (point.group, point.name, point.value) for point in points if point.group.startswith("drivetrain.")
    )
    return Copy(distribution.metadata["Name"], distribution.version, folder, ours)


def find_shadowed(copies: Iterable[Copy]) -> list[Shadowed]:
    """Copies that differ from the one of the same name that is used: in version or entry points, or by being left over.

    The egg-info folder that an editable install keeps beside its sources says the same as what is installed, and is no
    finding; one that says something else is stale.
    """
    used: dict[str, Copy] = {}
    found = []
    for copy in copies:
        first = used.setdefault(normalized(copy.distribution), copy)
        differs = (copy.version, copy.points) != (first.version, first.points)
        if first is not copy and (differs or copy.is_leftover or first.is_leftover):
            found.append(Shadowed(first, copy))
    return found


def find_stale(refs: Iterable[PluginRef]) -> list[Stale]:
    """Distributions of ``refs`` whose modules or recorded files are gone."""
    missing: dict[tuple[str, str], list[str]] = {}
    for ref in refs:
        gone = missing.setdefault((ref.distribution, ref.version), [])
        module = ref.target.partition(":")[0]
        if module and not is_module(module):
            gone.append(f"{ref.kind}/{ref.name}: no module {module}")
    for (distribution, _), gone in missing.items():
        gone += _gone_files(distribution)
    return [Stale(distribution, version, tuple(gone)) for (distribution, version), gone in missing.items() if gone]


def _gone_files(name: str) -> list[str]:
    try:
        distribution = importlib_metadata.distribution(name)
    except importlib_metadata.PackageNotFoundError:
        return []  # the reference was given by a caller and is of nothing installed
    rows = csv.reader((distribution.read_text("RECORD") or "").splitlines())
    files = [row[0] for row in rows if row and not row[0].endswith(".pyc")]
    gone = [file for file in files if not Path(str(distribution.locate_file(file))).exists()]
    if not gone:
        return []
    return [f"{len(gone)} of the {len(files)} files in its RECORD, first {', '.join(gone[:_SHOWN_FILES])}"]
