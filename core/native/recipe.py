"""What a library is made of and how: the command lines, and the key under which the result is kept."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from drivetrain.errors import KernelBuildError
from drivetrain.hardware import ROOT, read_text
from drivetrain.native.compilers import VARIABLES, Compiler

FORMAT = 2
"""Raised when the same description would be built in another way than before."""

FLAGS_THAT_FLUSH = frozenset({"-ffast-math", "-Ofast", "-funsafe-math-optimizations"})
"""At the link, gcc takes them for the wish that the whole process flush subnormal numbers to zero from the moment the
library is opened: Python's and torch's numbers too. They are for the compiler only."""

_INCLUDE = re.compile(rb'^[ \t]*#[ \t]*include[ \t]*(?:"([^"\n]+)"|<([^>\n]+)>)', re.MULTILINE)
_FIRST_PROCESSOR_BYTES = 8192


@dataclass(frozen=True)
class Step:
    """One run of the compiler in the build's folder; ``source`` is None for the link."""

    command: tuple[str, ...]
    source: Path | None = None


@dataclass(frozen=True)
class Recipe:
    """How one library is built: its units at the same time, and the link after them.

    key: SHA-256, in hex, of everything that the library's bytes depend on.
    """

    name: str
    key: str
    compiler: Compiler
    units: tuple[Step, ...]
    link: Step
    limit_seconds: float


def digest(parts: Mapping[str, object]) -> str:
    """SHA-256 in hex of a JSON document."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def read_sources(files: Iterable[Path], folders: Sequence[Path], name: str) -> dict[str, str]:
    """Every file that a build reads beside the compiler's own -> SHA-256: sources, headers, and what these include.

    Conditions are not evaluated: a header that is left out on this machine counts too. One whose name a macro holds is
    not seen; a build lists it among its headers. Raises KernelBuildError for a source that is not there.
    """
    found: dict[str, str] = {}
    waiting = [Path(os.path.abspath(file)) for file in files]
    for file in waiting:
        if not file.is_file():
            raise KernelBuildError("a source file is missing", where=f"native library {name}", found=str(file))
    seen = set(waiting)
    base = os.path.commonpath([str(file.parent) for file in waiting]) if waiting else ""
    while waiting:
        file = waiting.pop()
        try:
            content = file.read_bytes()
        except OSError as error:
            raise KernelBuildError(
                f"a source file can't be read: {error.strerror or error}",
                where=f"native library {name}",
                found=str(file),
            ) from error
        # Relative names: the same package in two virtual environments shares its libraries.
        found[os.path.relpath(file, base)] = hashlib.sha256(content).hexdigest()
        for included in _included(content, file.parent, folders):
            if included not in seen:
                seen.add(included)
                waiting.append(included)
    return found


def _included(content: bytes, beside: Path, folders: Sequence[Path]) -> Iterator[Path]:
    for quoted, angled in _INCLUDE.findall(content):
        places = [beside, *folders] if quoted else folders
        for place in places:
            candidate = Path(os.path.abspath(place / os.fsdecode(quoted or angled)))
            if candidate.is_file():
                yield candidate
                break


def machine_identity(flags: Iterable[str]) -> dict[str, str]:
    """What the library's bytes, and whether it runs, depend on of this machine.

    The processor itself counts only where a flag asks the compiler to look at it (``-march=native``): a cache in a home
    folder that several machines share then holds a library for each of them.
    """
    identity = {"system": sys.platform, "machine": platform.machine(), "libc": _libc()}
    if any(flag.endswith("=native") for flag in flags):
        text = (read_text(ROOT / "proc/cpuinfo", _FIRST_PROCESSOR_BYTES) or "").partition("\n\n")[0]
        told = re.findall(r"^(model name|flags|Features|CPU implementer|CPU part)\s*:\s*(.+)$", text, re.MULTILINE)
        identity["processor"] = "; ".join(f"{name}: {value}" for name, value in told) or platform.processor()
    return identity


def _libc() -> str:
    names = getattr(os, "confstr_names", {})
    return os.confstr("CS_GNU_LIBC_VERSION") or "" if "CS_GNU_LIBC_VERSION" in names else ""


def heard_variables() -> dict[str, str]:
    """The variables of the environment that compilers themselves listen to, where they are set."""
    return {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}


def base_flags(compiler: Compiler, standard: str, architectures: Sequence[str]) -> list[str]:
    """The flags that every unit and the link get before a build's own."""
    if compiler.language == "c++":
        return [f"-std={standard}", "-O3", "-fPIC"]
    if compiler.is_hip:
        return [f"-std={standard}", "-O3", "-fPIC", *(f"--offload-arch={name}" for name in architectures)]
    chosen = [f"-gencode=arch=compute_{name[3:]},code=sm_{name[3:]}" for name in architectures]
    return [f"-std={standard}", "-O3", "-Xcompiler", "-fPIC", *chosen]


def link_flags(compiler: Compiler) -> list[str]:
    """A symbol that nothing defines is an error of the build, where it is explained, and not of the first call."""
    if not sys.platform.startswith("linux"):
        return ["-shared"]
    if compiler.language == "cuda" and not compiler.is_hip:
        return ["-shared", "-Xlinker", "-z", "-Xlinker", "defs"]
    return ["-shared", "-Wl,-z,defs"]
