"""The lock file: exactly which distributions may register plugins, with their versions and the hashes of their files.

``drivetrain plugins lock`` writes it; ``--locked FILE`` and the setting ``plugins.lock`` refuse whatever differs before
any plugin is imported.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import importlib_metadata

from drivetrain.errors import ConfigError, PluginError
from drivetrain.registry.differences import ABSENT, Difference, DifferencesError
from drivetrain.registry.discovery import normalized, registering_distributions

DEFAULT_FILE = "plugins.lock"
_FORMAT = 1
_OF_THE_INSTALLER = ("INSTALLER", "REQUESTED", "RECORD", "direct_url.json")
_SHOWN_CHARACTERS = 12
_CHUNK_BYTES = 2**20


@dataclass(frozen=True)
class LockedDistribution:
    """What the lock file says of one distribution.

    record:      SHA-256 over what its RECORD says of the files that came in its wheel: their names, hashes and sizes.
                 Lines of the installer's own (scripts, which hold this machine's paths; bytecode) are left out, so that
                 one wheel has one hash on every machine. None when there is no RECORD or the install is editable.
    is_editable: installed from a folder of sources that may change at any time: locked by its version only.
    """

    version: str
    record: str | None
    is_editable: bool = False

    def __str__(self) -> str:
        if self.is_editable:
            return f"{self.version} editable"
        return f"{self.version} {self.record[:_SHOWN_CHARACTERS] if self.record else 'without RECORD'}"


Lock = Mapping[str, LockedDistribution]
"""Name of a distribution, in its normal form -> what is locked of it."""


def read_installed() -> dict[str, LockedDistribution]:
    """Every installed distribution that registers a plugin or an observer, as a lock file would hold it."""
    return {
        normalized(distribution.metadata["Name"]): _locked_form(distribution)
        for distribution in registering_distributions()
    }


def write_lock(file: Path) -> dict[str, LockedDistribution]:
    """Lock what is installed; returns what was written. Raises ConfigError, PluginError as :func:`check_lock` does."""
    installed = read_installed()
    changed = [f"{name}: {problem}" for name, problem in _changed_files().items()]
    if changed:
        raise PluginError(
            f"what is installed differs from its own RECORD ({'; '.join(changed)})",
            where=str(file),
            hint="Reinstall it with pip install --force-reinstall, then lock.",
        )
    content = {
        "format": _FORMAT,
        "distributions": {
            name: {"version": locked.version, "record": locked.record, "editable": locked.is_editable}
            for name, locked in sorted(installed.items())
        },
    }
    try:
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"can't write the lock file: {error.strerror}", where=str(file)) from error
    return installed


def read_lock(file: Path) -> dict[str, LockedDistribution]:
    """What a lock file holds. Raises ConfigError when it can't be read or is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            raise ValueError(f"format {content['format']!r} instead of {_FORMAT}")
        return {name: _entry(entry) for name, entry in content["distributions"].items()}
    except OSError as error:
        raise ConfigError(
            f"can't read the lock file: {error.strerror}",
            where=str(file),
            hint=f"Run: drivetrain plugins lock --file {file}",
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"no lock file of Drivetrain: {type(error).__name__}: {error}",
            where=str(file),
            hint=f"Run: drivetrain plugins lock --file {file}",
        ) from error


def _entry(entry: Mapping[str, Any]) -> LockedDistribution:
    locked = LockedDistribution(entry["version"], entry["record"], entry["editable"])
    if not isinstance(locked.version, str) or not isinstance(locked.record, str | None):
        raise TypeError("version and record must be strings")
    if not isinstance(locked.is_editable, bool):
        raise TypeError("editable must be true or false")
    return locked


def compare_lock(lock: Lock) -> list[Difference]:
    """What is locked (ours) against what is installed (theirs), for each distribution that differs."""
    installed = read_installed()
    differences = {
        name: Difference(name, _shown(lock.get(name)), _shown(installed.get(name)))
        for name in lock.keys() | installed.keys()
        if lock.get(name) != installed.get(name)
    }
    for name, problem in _changed_files().items():
        if name not in differences:
            differences[name] = Difference(name, _shown(lock.get(name)), problem)
    return [differences[name] for name in sorted(differences)]


def check_lock(file: Path | str) -> None:
    """Refuse to go on unless exactly what ``file`` locks is installed.

    Raises DifferencesError, a PluginError whose message ends with a table of what differs; ConfigError when the file
    can't be read.
    """
    differences = compare_lock(read_lock(Path(file)))
    if differences:
        raise DifferencesError(
            f"{len(differences)} of the distributions that register plugins differ from what is locked",
            differences,
            columns=("distribution", "locked", "installed"),
            where=str(file),
            hint=f"Install what is locked, or accept what is installed with: drivetrain plugins lock --file {file}",
        )


def _shown(locked: LockedDistribution | None) -> str:
    return str(locked) if locked else ABSENT


# --- what is installed ---------------------------------------------------------------------------------------------


def _locked_form(distribution: importlib_metadata.Distribution) -> LockedDistribution:
    if _is_editable(distribution):
        return LockedDistribution(distribution.version, None, True)
    rows = sorted(_record_rows(distribution))
    if not rows:
        return LockedDistribution(distribution.version, None)
    text = "".join(f"{name},{digest},{size}\n" for name, digest, size in rows)
    return LockedDistribution(distribution.version, hashlib.sha256(text.encode()).hexdigest())


def _is_editable(distribution: importlib_metadata.Distribution) -> bool:
    text = distribution.read_text("direct_url.json")
    if text is None:
        return False
    try:
        origin = json.loads(text)
    except ValueError as error:
        raise PluginError(
            f"its direct_url.json is no JSON: {error}", where=distribution.metadata["Name"], hint="Reinstall it."
        ) from error
    info = origin.get("dir_info") if isinstance(origin, dict) else None
    return isinstance(info, dict) and info.get("editable") is True


def _record_rows(distribution: importlib_metadata.Distribution) -> Iterator[tuple[str, str, str]]:
    """Name, hash and size of each file that came in the wheel."""
    for row in csv.reader((distribution.read_text("RECORD") or "").splitlines()):
        if len(row) != 3 or not row[1] or row[0].startswith(("../", "/")) or row[0].endswith(".pyc"):
            continue
        folder, _, name = row[0].rpartition("/")
        if not (folder.endswith(".dist-info") and name in _OF_THE_INSTALLER):
            yield row[0], row[1], row[2]


def _changed_files() -> dict[str, str]:
    """Distribution -> what is wrong with its files, for those whose files are not what their RECORD says."""
    found = {}
    for distribution in registering_distributions():
        if _is_editable(distribution):
            continue
        rows = _record_rows(distribution)
        changed = [name for name, digest, _ in rows if not _matches(Path(str(distribution.locate_file(name))), digest)]
        if changed:
            more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
            found[normalized(distribution.metadata["Name"])] = f"{distribution.version}, {changed[0]}{more} changed"
    return found


def _matches(path: Path, digest: str) -> bool:
    """Whether a file has the hash of its RECORD line (``sha256=`` and URL-safe base64 without padding, PEP 376)."""
    algorithm, _, wanted = digest.partition("=")
    try:
        hasher = hashlib.new(algorithm)
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                hasher.update(chunk)
    except (OSError, ValueError):  # gone, unreadable, or hashed in a way that can't be checked: not as recorded
        return False
    return base64.urlsafe_b64encode(hasher.digest()).rstrip(b"=").decode() == wanted
