"""Calls of the CPU kernels' C interface, written down once and made on two machines: this one and an emulated one.

What a call works on is a blob of memory; blobs may hold pointers to others. ``foreign_calls.cpp`` makes the calls
there.
"""

from __future__ import annotations

import ctypes
import shutil
import struct
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from drivetrain.kernels.cpu.library import SOURCES, source_build

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
INSTALL = "apt-get install g++-aarch64-linux-gnu qemu-user-static"

DRIVER = Path(__file__).with_name("foreign_calls.cpp")

_DEPENDS_ON_VARIANT = ("rounded",)
"""Sources whose code differs between NEON with and without dot products."""


def missing() -> str | None:
    """Why nothing can be run for arm64 here, or None."""
    absent = [name for name in (COMPILER, EMULATOR) if shutil.which(name) is None]
    return f"no {' and no '.join(absent)} here: {INSTALL}" if absent else None


@dataclass(frozen=True)
class Blob:
    """A piece of memory of a :class:`Calls`."""

    index: int


Value = int | float | None | Blob
_Pointer = tuple[int, Blob]


class Calls:
    """Blobs, and calls that work on them."""

    def __init__(self) -> None:
        self._blobs: list[tuple[bytes, tuple[_Pointer, ...]]] = []
        self._calls: list[tuple[str, tuple[Value, ...]]] = []

    def put(self, content: torch.Tensor | bytes, *pointers: _Pointer) -> Blob:
        """pointers: where in the blob there is one, and to what."""
        if isinstance(content, torch.Tensor):
            dense = content.detach().contiguous()
            content = ctypes.string_at(dense.data_ptr(), dense.numel() * dense.element_size())
        self._blobs.append((content, pointers))
        return Blob(len(self._blobs) - 1)

    def put_fields(self, fields: ctypes.Structure, *tensors: torch.Tensor) -> Blob:
        """A structure; those of its pointers that are not null lead to one of ``tensors``."""
        return self.put_all(fields, *tensors)[0]

    def put_all(self, fields: ctypes.Structure, *tensors: torch.Tensor) -> list[Blob]:
        """The same; the structure, and a blob for each of ``tensors``."""
        blobs = {tensor.data_ptr(): self.put(tensor) for tensor in tensors}
        pointers = []
        for name, kind, *_ in fields._fields_:
            address = getattr(fields, name)
            if kind is ctypes.c_void_p and address is not None:
                pointers.append((getattr(type(fields), name).offset, blobs[address]))
        return [self.put(bytes(fields), *pointers), *blobs.values()]

    def call(self, name: str, *arguments: Value) -> None:
        """A function of the library."""
        self._calls.append((name, arguments))

    def here(self, library: ctypes.CDLL) -> list[bytes]:
        """Make the calls on this machine; every blob afterwards."""
        memory = [ctypes.create_string_buffer(content, len(content)) for content, _ in self._blobs]
        for buffer, (_, pointers) in zip(memory, self._blobs, strict=True):
            for place, to in pointers:
                struct.pack_into("<q", buffer, place, ctypes.addressof(memory[to.index]))
        for name, arguments in self._calls:
            given = [ctypes.addressof(memory[a.index]) if isinstance(a, Blob) else a for a in arguments]
            assert not getattr(library, name)(*given), name
        return [buffer.raw for buffer in memory]

    def there(self, program: Path, processor: str) -> list[bytes]:
        """Make the calls on an emulated ``processor``; every blob afterwards. Raises CalledProcessError."""
        file, out = program.with_suffix(".in"), program.with_suffix(".out")
        file.write_bytes(self._packed())
        command = [EMULATOR, "-cpu", processor, str(program), str(file), str(out)]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
        content, found, at = out.read_bytes(), [], 0
        for blob, _ in self._blobs:
            found.append(content[at : at + len(blob)])
            at += -(-len(blob) // 8) * 8
        return found

    def _packed(self) -> bytes:
        parts = [struct.pack("<q", len(self._blobs))]
        for content, pointers in self._blobs:
            parts.append(struct.pack("<qq", len(content), len(pointers)))
            parts += [struct.pack("<qq", place, to.index) for place, to in pointers]
            parts.append(content.ljust(-(-len(content) // 8) * 8, b"\0"))
        parts.append(struct.pack("<q", len(self._calls)))
        for name, arguments in self._calls:
            parts.append(struct.pack("<32sq", name.encode(), len(arguments)))
            parts += [_argument(value) for value in arguments]
        return b"".join(parts)


def _argument(value: Value) -> bytes:
    """As ``Argument`` of ``foreign_calls.cpp``."""
    if value is None:
        return struct.pack("<qq", 3, 0)
    if isinstance(value, Blob):
        return struct.pack("<qq", 2, value.index)
    return struct.pack("<qd", 1, value) if isinstance(value, float) else struct.pack("<qq", 0, value)


def build(folder: Path, variants: tuple[str, ...]) -> dict[str, Path]:
    """Variant -> a program of all sources, with the flags of the provider but less optimized, which compiles faster."""

    def compile_one(source: Path, variant: str) -> Path:
        out = folder / f"{source.stem}-{variant}.o"
        flags = ("-std=c++17", "-O1", *source_build(variant).flags)
        subprocess.run([COMPILER, *flags, "-c", str(source), "-o", str(out)], check=True)
        return out

    first, *others = variants
    wanted = [(source, first) for source in (*sorted(SOURCES.glob("*.cpp")), DRIVER)]
    wanted += [(SOURCES / f"{name}.cpp", variant) for name in _DEPENDS_ON_VARIANT for variant in others]
    with ThreadPoolExecutor(2) as pool:
        objects = dict(zip(wanted, pool.map(lambda one: compile_one(*one), wanted), strict=True))
    programs = {}
    for variant in variants:
        own = [
            objects.get((source, variant), found) for (source, made_for), found in objects.items() if made_for == first
        ]
        programs[variant] = folder / variant
        command = [COMPILER, "-static", "-pthread", *map(str, own), "-o", str(programs[variant])]
        subprocess.run(command, check=True)
    return programs
