"""One saved state is one folder: a file of raw bytes for each rank, and an index that is written last.

    step-00000100/rank-00000.bin   tensors, one after the other
    step-00000100/state.json       what is where, with checksums; metadata; a digest of the index itself

A state is written in a folder of another name and renamed when all of it is on the disk, so that a folder named
``step-...`` with an index in it is complete, at whatever moment a process is killed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from drivetrain.errors import DamagedStateError, StateNotFoundError, StoreError

INDEX = "state.json"
FORMAT = 1

_COMPLETE = re.compile(r"step-(\d{8,})")
_SAVING, _DELETING = ".saving-", ".deleting-"


@dataclass(frozen=True)
class Chunk:
    """A rectangular piece of a tensor.

    offsets, sizes:   where it lies in the whole tensor.
    file, at, length: its bytes, in row order.
    crc32:            of the bytes.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    at: int
    length: int
    crc32: int


@dataclass(frozen=True)
class Entry:
    """A whole tensor and the chunks that it is made of."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class Index:
    """What a state holds."""

    metadata: dict[str, Any]
    tensors: dict[str, Entry]

    def to_json(self) -> str:
        content = {
            "format": FORMAT,
            "metadata": self.metadata,
            "tensors": {n: asdict(e) for n, e in self.tensors.items()},
        }
        return json.dumps({"sha256": _digest(content), "content": content})

    @classmethod
    def read(cls, folder: Path) -> Index:
        """The index of a state. Raises DamagedStateError."""
        path = folder / INDEX
        try:
            written = json.loads(path.read_bytes())
            content = written["content"]
            if written["sha256"] != _digest(content):
                raise ValueError("it is not what was written")
            if content["format"] != FORMAT:
                raise ValueError(f"it has format {content['format']}, and this version reads {FORMAT}")
            return cls(content["metadata"], {name: _entry(entry) for name, entry in content["tensors"].items()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedStateError(f"the index of the state can't be read: {error}", where=str(path)) from error


def _entry(entry: Mapping[str, Any]) -> Entry:
    chunks = [
        Chunk(**{**chunk, "offsets": tuple(chunk["offsets"]), "sizes": tuple(chunk["sizes"])})
        for chunk in entry["chunks"]
    ]
    return Entry(entry["dtype"], tuple(entry["shape"]), tuple(chunks))


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def check_metadata(metadata: Mapping[str, Any]) -> None:
    """Raise StoreError unless JSON gives back what was given."""
    try:
        copy = json.loads(json.dumps(metadata, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise StoreError(f"metadata must be something that JSON can hold: {error}", where="metadata") from error
    if copy != dict(metadata):
        raise StoreError(
            "metadata must come back from JSON as it was",
            where="metadata",
            hint="Use lists in place of tuples, and texts as keys.",
        )


class StateFolders:
    """The states of one run, side by side in one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def complete(self, step: int) -> Path:
        return self.root / f"step-{step:08d}"

    def unfinished(self, step: int) -> Path:
        return self.root / f"{_SAVING}{step:08d}"

    def steps(self) -> list[int]:
        """Of the complete states. Raises StoreError for a folder that may not be read."""
        if not self.root.is_dir():
            return []
        try:
            found = [(match, path) for path in self.root.iterdir() if (match := _COMPLETE.fullmatch(path.name))]
            return sorted(int(match[1]) for match, path in found if (path / INDEX).is_file())
        except OSError as error:
            raise StoreError(f"the states can't be listed: {error.strerror or error}", where=str(self.root)) from error

    def find(self, step: int) -> Path:
        """The folder of a complete state. Raises StateNotFoundError."""
        folder = self.complete(step)
        if not (folder / INDEX).is_file():
            raise StateNotFoundError(
                f"there is no complete state of step {step}", where=str(self.root), allowed=self.steps() or "none"
            )
        return folder

    def begin(self, step: int) -> Path:
        """An empty folder to write the state of ``step`` in. Raises StoreError when there is such a state.

        What a process that was killed has left behind goes away here.
        """
        there = self.complete(step)
        if there.exists():
            is_state = step in self.steps()
            raise StoreError(
                f"there is a state of step {step} already"
                if is_state
                else "something that is no complete state is in the way",
                where=str(there),
                hint="Delete it first, or save to another folder." if is_state else "Remove it.",
            )
        with writing(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            for path in self.root.iterdir():
                if path.name.startswith((_SAVING, _DELETING)):
                    shutil.rmtree(path)
            self.unfinished(step).mkdir()
        return self.unfinished(step)

    def finish(self, step: int, index: Index) -> None:
        """Write the index and let the state be seen. All its files must be on the disk."""
        folder = self.unfinished(step)
        with writing(folder):
            with (folder / INDEX).open("x", encoding="utf-8") as file:
                file.write(index.to_json())
                flush(file.fileno(), file)
            flush_folder(folder)
            folder.rename(self.complete(step))
            flush_folder(self.root)

    def abandon(self, step: int) -> None:
        """Remove what was written of a state that can't be finished; what resists goes away with the next save."""
        shutil.rmtree(self.unfinished(step), ignore_errors=True)

    def delete(self, step: int) -> None:
        folder = self.find(step)
        hidden = self.root / f"{_DELETING}{step:08d}"
        with writing(folder):
            if hidden.exists():
                shutil.rmtree(hidden)
            folder.rename(hidden)
            flush_folder(self.root)
            shutil.rmtree(hidden)


def flush(descriptor: int, file: Any = None) -> None:
    """Have what was written reach the disk."""
    if file is not None:
        file.flush()
    os.fsync(descriptor)


def flush_folder(folder: Path) -> None:
    """Have names in a folder reach the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Maps what the file system raises to StoreError."""
    try:
        yield
    except OSError as error:
        raise StoreError(f"the state can't be written: {error.strerror or error}", where=str(path)) from error
