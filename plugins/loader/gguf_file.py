"""The GGUF container: metadata and tensor directory, read with every length checked against the file.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. All numbers are little endian.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from drivetrain.errors import LoaderError

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_STRING, _ARRAY = 8, 9
_SCALARS: Mapping[int, str] = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
_MAX_DIMS = 4


@dataclass(frozen=True)
class GgufTensor:
    """One entry of the tensor directory.

    shape:  as torch orders it, the fastest dimension last (GGUF itself lists it first).
    offset: of its data, from the start of the file.
    """

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


class GgufFile:
    """An opened GGUF file: ``metadata`` by key, ``tensors`` by name. The data stays on disk until it is asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            self._size = path.stat().st_size
            if self._size < 24:
                raise self._error(f"the file has {self._size} bytes, too few for a GGUF header")
            # A private, writable mapping: numpy and torch refuse or warn about read-only memory, and nothing written
            # to it ever reaches the file.
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self._position = 0
        num_tensors, num_keys = self._read_head()
        self.metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self._read_string()
            self.metadata[key] = self._read_value(self._read_number("<I"))
        self.tensors = self._read_directory(num_tensors)

    def data(self, tensor: GgufTensor) -> np.ndarray:
        """The tensor's bytes as uint8 [..., bytes of a row], sharing the mapping."""
        flat = np.frombuffer(self._map, np.uint8, tensor.num_bytes, tensor.offset)
        return flat.reshape(*tensor.shape[:-1], -1)

    def _error(self, what: str, hint: str | None = "Fetch it again", **parts: Any) -> LoaderError:
        return LoaderError(what, where=str(self.path), hint=hint, **parts)

    def _read_head(self) -> tuple[int, int]:
        magic = self._take(4)
        if magic != MAGIC:
            raise self._error("this is no GGUF file: it starts with the wrong bytes", found=magic, allowed=repr(MAGIC))
        version = self._read_number("<I")
        if version not in _VERSIONS:
            swapped = struct.unpack(">I", struct.pack("<I", version))[0]
            if swapped in _VERSIONS:
                raise self._error("the file is in big-endian byte order", hint="Use a little-endian version of it")
            raise self._error(
                "this version of GGUF is not known", found=version, allowed=_VERSIONS, hint="Use a file made since 2023"
            )
        return self._read_number("<Q"), self._read_number("<Q")

    def _take(self, num_bytes: int) -> bytes:
        end = self._position + num_bytes
        if end > self._size:
            raise self._cut_short(end)
        taken = self._map[self._position : end]
        self._position = end
        return taken

    def _read_number(self, form: str) -> int:
        return int(struct.unpack(form, self._take(struct.calcsize(form)))[0])

    def _read_string(self) -> str:
        # Some vocabularies hold pieces of characters; they must not make the whole file unreadable.
        return self._take(self._read_number("<Q")).decode("utf-8", errors="replace")

    def _read_strings(self, count: int) -> list[str]:
        """As many strings as a vocabulary has: a hundred thousand, read without a call for each part of each."""
        position, size, data = self._position, self._size, self._map
        length_at = struct.Struct("<Q").unpack_from
        strings: list[str] = []
        for _ in range(count):
            begin = position + 8
            position = begin + length_at(data, position)[0] if begin <= size else size + 1
            if position > size:
                raise self._cut_short(max(begin, position))
            strings.append(data[begin:position].decode("utf-8", errors="replace"))
        self._position = position
        return strings

    def _cut_short(self, end: int) -> LoaderError:
        return self._error(
            f"the file is cut short: its header goes on to byte {end}, but it has only {self._size} bytes"
        )

    def _read_value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._read_string()
        if kind == _ARRAY:
            item, count = self._read_number("<I"), self._read_number("<Q")
            if item in _SCALARS:
                return self._read_scalars(item, count).tolist()
            if item != _STRING or count > self._size:
                raise self._error(f"an array of {count} entries of type {item} makes no sense here")
            return self._read_strings(count)
        if kind in _SCALARS:
            return _plain(self._read_scalars(kind, 1)[0])
        raise self._error(f"metadata of unknown type {kind} near byte {self._position}")

    def _read_scalars(self, kind: int, count: int) -> np.ndarray:
        dtype = np.dtype(_SCALARS[kind])
        return np.frombuffer(self._take(count * dtype.itemsize), dtype)

    def _read_directory(self, count: int) -> dict[str, GgufTensor]:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        entries = []
        for _ in range(count):
            name = self._read_string()
            num_dims = self._read_number("<I")
            if num_dims > _MAX_DIMS:
                raise self._error(f"tensor {name!r} claims {num_dims} dimensions; the directory is damaged")
            shape = tuple(self._read_number("<Q") for _ in range(num_dims))[::-1]
            entries.append((name, shape, self._read_number("<I"), self._read_number("<Q")))
        alignment = self.metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise self._error("general.alignment makes no sense", found=alignment)
        start = -(-self._position // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for name, shape, code, offset in entries:
            if name in tensors:
                raise self._error(f"tensor {name!r} is listed twice")
            try:
                kind = GGMLQuantizationType(code)
            except ValueError as error:
                raise self._error(
                    f"tensor {name!r} is stored in a type that the gguf package does not know",
                    found=code,
                    hint="Run: pip install --upgrade gguf",
                ) from error
            block, block_bytes = GGML_QUANT_SIZES[kind]
            row = shape[-1] if shape else 1
            if row % block:
                raise self._error(
                    f"tensor {name!r}: rows of {row} are no whole number of {kind.name} blocks of {block}"
                )
            num_bytes = math.prod(shape) // block * block_bytes
            if start + offset + num_bytes > self._size:
                raise self._error(
                    f"the file is cut short: tensor {name!r} ends at byte {start + offset + num_bytes}, but the file"
                    f" has only {self._size} bytes"
                )
            tensors[name] = GgufTensor(name, kind, shape, start + offset, num_bytes)
        return tensors


def _plain(value: Any) -> Any:
    """A Python number. Float32 becomes the shortest decimal that means it: 1e-05 and not 9.99999974e-06."""
    return float(str(value)) if isinstance(value, np.float32) else value.item()
