"""Safetensors files that are written tensor by tensor, with no more than one tensor in memory.

The format wants its header before the data and no holes in it, and readers want each tensor at a multiple of its item's
size. So tensors of one item size go into a file of their own first, and a shard is these files behind each other, the
widest first (https://github.com/huggingface/safetensors, "Format").
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import torch

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
}
_SIZES = (8, 4, 2, 1)
_ALIGNMENT = 8
_COPY_BYTES = 1 << 20


class ShardWriter:
    """Writes ``model.safetensors``, or shards and their index, into a folder.

    max_bytes: a shard is closed before a tensor would take it over so many bytes of data.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._shards: list[list[str]] = []
        self._total = 0
        self._begin()

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Append one tensor."""
        num_bytes = tensor.numel() * tensor.element_size()
        if self._headers and self._in_shard + num_bytes > self._max_bytes:
            self._finish_shard()
            self._begin()
        size = tensor.element_size()
        # Read byte by byte, because numpy has no bfloat16 and no float8.
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        self._spools[size].write(data.numpy().data)
        begin = self._filled[size]
        self._filled[size] += num_bytes
        self._in_shard += num_bytes
        self._headers[name] = (size, begin, {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape)})

    def finish(self) -> None:
        """Close the last shard, and name all of them."""
        self._finish_shard()
        count = len(self._shards)
        names = [f"model-{place + 1:05}-of-{count:05}.safetensors" for place in range(count)]
        if count == 1:
            names = ["model.safetensors"]
        for place, name in enumerate(names):
            self._part(place).rename(self._folder / name)
        if count > 1:
            weight_map = {tensor: name for name, shard in zip(names, self._shards, strict=True) for tensor in shard}
            index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
            write_text(self._folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")

    def close(self) -> None:
        """Let go of the files, finished or not."""
        for spool in self._spools.values():
            spool.close()

    def _begin(self) -> None:
        self._headers: dict[str, tuple[int, int, dict[str, Any]]] = {}
        self._filled = dict.fromkeys(_SIZES, 0)
        self._in_shard = 0
        self._spools = {size: self._spool(size).open("wb") for size in _SIZES}

    def _finish_shard(self) -> None:
        self.close()
        starts, start = {}, 0
        for size in _SIZES:
            starts[size] = start
            start += self._filled[size]
        ordered = sorted(self._headers.items(), key=lambda item: (-item[1][0], item[1][1]))
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        for name, (size, begin, entry) in ordered:
            num_bytes = self._num_bytes(entry, size)
            offset = starts[size] + begin
            header[name] = {**entry, "data_offsets": [offset, offset + num_bytes]}
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-(8 + len(encoded)) % _ALIGNMENT)
        with self._part(len(self._shards)).open("wb") as file:
            file.write(struct.pack("<Q", len(encoded)) + encoded)
            for size in _SIZES:
                with self._spool(size).open("rb") as spool:
                    shutil.copyfileobj(spool, file, _COPY_BYTES)
                self._spool(size).unlink()
            _sync(file)
        self._shards.append(list(self._headers))
        self._total += self._in_shard

    @staticmethod
    def _num_bytes(entry: dict[str, Any], size: int) -> int:
        count = 1
        for dim in entry["shape"]:
            count *= dim
        return count * size

    def _spool(self, size: int) -> Path:
        return self._folder / f"spool-{size}"

    def _part(self, place: int) -> Path:
        return self._folder / f"part-{place}"


def write_text(path: Path, text: str) -> None:
    """Write a small file, and have it on the disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        _sync(file)


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
