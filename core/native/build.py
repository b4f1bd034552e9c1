"""From sources to an open library: described once, compiled by the first process that needs it, kept for the others."""

from __future__ import annotations

import ctypes
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from drivetrain.caching import exclusive, user_cache, write_whole
from drivetrain.contracts.source import Progress, silent
from drivetrain.errors import ConfigError, KernelBuildError
from drivetrain.native.compilers import Compiler, need_compiler, with_host
from drivetrain.native.jobs import run_recipes
from drivetrain.native.recipe import (
    FLAGS_THAT_FLUSH,
    FORMAT,
    Recipe,
    Step,
    base_flags,
    digest,
    heard_variables,
    link_flags,
    machine_identity,
    read_sources,
)

_log = logging.getLogger("drivetrain")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_LIBRARIES: dict[Path, ctypes.CDLL] = {}
_FAILED: dict[str, KernelBuildError] = {}
"""key -> why it did not compile: a model binds hundreds of operations, and waits for the compiler's answer once."""
_GUARD = threading.Lock()


@dataclass(frozen=True)
class Unit:
    """One source file with flags and defines of its own.

    The same file may be compiled several times into one library, for several instruction sets.
    """

    source: Path
    flags: tuple[str, ...] = ()
    defines: Mapping[str, str | int] = field(default_factory=dict)


@dataclass(frozen=True)
class SourceBuild:
    """A shared library that is made from sources: what its bytes depend on, and nothing else.

    name:            of the library, in file names and messages; letters, digits, ``-`` and ``_``.
    sources:         C++ or CUDA files; a Unit where one needs flags of its own.
    language:        ``"c++"`` (g++, c++ or clang++) or ``"cuda"`` (nvcc or hipcc).
    flags:           for the compiler, after ``-O3`` and the standard, for every source and the link.
    defines:         macros; a value of 1 is how a switch is written.
    headers:         files that sources read and that no ``#include`` names.
    include_folders: where ``#include`` looks beside the folder of the source.
    libraries:       for the end of the link: ``("-lm",)``.
    architectures:   of GPUs: ``"sm_90"`` needs nvcc, ``"gfx942"`` hipcc.
    standard:        of the language.
    limit_seconds:   time that one run of the compiler may take.

    Functions that Python calls are ``extern "C"`` and take pointers and numbers: such a library compiles in a second
    and fits every version of torch. What ``#include`` finds beside a source or in ``include_folders`` counts too.
    """

    name: str
    sources: tuple[Path | Unit, ...]
    language: str = "c++"
    flags: tuple[str, ...] = ()
    defines: Mapping[str, str | int] = field(default_factory=dict)
    headers: tuple[Path, ...] = ()
    include_folders: tuple[Path, ...] = ()
    libraries: tuple[str, ...] = ()
    architectures: tuple[str, ...] = ()
    standard: str = "c++17"
    limit_seconds: float = 600.0

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ConfigError("not a name for a library", found=self.name, allowed="letters, digits, - and _")
        if not self.sources:
            raise ConfigError("a library needs sources", where=f"native library {self.name}")
        vendors = {name[:3] for name in self.architectures}
        if len(vendors) > 1 or not vendors <= {"sm_", "gfx"}:
            raise ConfigError(
                "a library is built for GPUs of one maker, named one by one",
                where=f"native library {self.name}",
                found=", ".join(self.architectures),
                allowed="sm_NN (nvcc) or gfxNNN (hipcc)",
            )

    def build(
        self, *, compiler: str | Path | None = None, progress: Progress = silent, cache: Path | None = None
    ) -> Path:
        """The library's file, compiled if it was not here yet.

        compiler: a name on PATH or a path; by default the usual names are looked for.
        progress: told of compiling, and of waiting for another process that builds the same.
        cache:    the folder that libraries are kept in; by default ``drivetrain/native`` in the user's cache.

        Any number of threads and processes may ask at once: one compiles, the others wait for it. An interrupted build
        leaves nothing that is taken for a library. Raises KernelBuildError.
        """
        return build_all([self], compiler=compiler, progress=progress, cache=cache)[0]

    def library(
        self, *, compiler: str | Path | None = None, progress: Progress = silent, cache: Path | None = None
    ) -> ctypes.CDLL:
        """The library, built if need be, and opened once a process. Calls release the interpreter's lock.

        Keep what it returns: each call reads the sources again, to see whether they are the same. Raises
        KernelBuildError.
        """
        path = self.build(compiler=compiler, progress=progress, cache=cache)
        with _GUARD:
            if path not in _LIBRARIES:
                try:
                    _LIBRARIES[path] = ctypes.CDLL(str(path))
                except OSError as error:
                    raise KernelBuildError(
                        f"the library was built and can't be opened: {error}",
                        where=f"native library {self.name}",
                        hint="Check that what it is linked with is installed where it runs.",
                    ) from error
            return _LIBRARIES[path]

    def recipe(self, compiler: str | Path | None, cache: Path) -> Recipe:
        """How it is built here. Reads every source. Raises KernelBuildError without a compiler or a source."""
        only = {"sm_": ("nvcc",), "gfx": ("hipcc",)}.get(self.architectures[0][:3] if self.architectures else "", ())
        found = need_compiler(self.name, self.language, compiler, only)
        units = [source if isinstance(source, Unit) else Unit(source) for source in self.sources]
        flags = [*base_flags(found, self.standard, self.architectures), *self.flags]
        files = [*(unit.source for unit in units), *self.headers]
        key = digest(
            {
                "format": FORMAT,
                "name": self.name,
                "files": read_sources(files, self.include_folders, self.name),
                "units": [[unit.source.name, list(unit.flags), dict(unit.defines)] for unit in units],
                "flags": flags,
                "defines": dict(self.defines),
                "libraries": list(self.libraries),
                "compilers": [[compiler.path, compiler.version(cache)] for compiler in with_host(found)],
                "machine": machine_identity([*flags, *(flag for unit in units for flag in unit.flags)]),
                "variables": heard_variables(),
            }
        )
        steps = tuple(self._compile(found, flags, number, unit) for number, unit in enumerate(units))
        objects = [step.command[-1] for step in steps]
        safe = [flag for flag in flags if flag not in FLAGS_THAT_FLUSH]
        link = (found.path, *safe, *link_flags(found), *objects, *self.libraries, "-o", "library.so")
        return Recipe(self.name, key, found, steps, Step(link), self.limit_seconds)

    def _compile(self, compiler: Compiler, flags: Sequence[str], number: int, unit: Unit) -> Step:
        source = os.path.abspath(unit.source)
        defines = [f"-D{name}={value}" for name, value in {**self.defines, **unit.defines}.items()]
        folders = [f"-I{os.path.abspath(folder)}" for folder in self.include_folders]
        language = ["-x", "hip"] if compiler.is_hip else []
        command = (compiler.path, *flags, *unit.flags, *defines, *folders, *language, "-c", source)
        return Step((*command, "-o", f"{number}-{unit.source.stem}.o"), unit.source)


def build_all(
    builds: Sequence[SourceBuild],
    *,
    compiler: str | Path | None = None,
    progress: Progress = silent,
    cache: Path | None = None,
) -> tuple[Path, ...]:
    """The files of several libraries, in the order of ``builds``; what is missing is compiled at the same time.

    The arguments are those of :meth:`SourceBuild.build`. Raises the first KernelBuildError; the others are kept.
    """
    folder = cache if cache is not None else user_cache("native")
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        entries = [_Entry(folder, build.recipe(compiler, folder)) for build in builds]
        missing = {entry.recipe.key: entry for entry in entries if not entry.is_whole()}
        for key in missing:
            if key in _FAILED:
                raise _again(_FAILED[key])
        if missing:
            # Every process takes its locks in the order of their keys, so that no two wait for each other.
            _make([missing[key] for key in sorted(missing)], progress)
    except OSError as error:
        raise KernelBuildError(
            f"the cache of native libraries can't be written: {error.strerror or error}",
            where=str(error.filename or folder),
            hint="Free space or permissions there, or set XDG_CACHE_HOME to another folder.",
        ) from error
    return tuple(entry.library for entry in entries)


def _again(error: KernelBuildError) -> KernelBuildError:
    twin = type(error).__new__(type(error), *error.args)
    twin.__dict__.update(error.__dict__)
    return twin


@dataclass(frozen=True)
class _Entry:
    """One library in the cache, and the note beside it that tells whether it is whole."""

    folder: Path
    recipe: Recipe

    @property
    def stem(self) -> str:
        return f"{self.recipe.name}-{self.recipe.key[:24]}"

    @property
    def library(self) -> Path:
        return self.folder / f"{self.stem}.so"

    @property
    def note(self) -> Path:
        return self.folder / f"{self.stem}.json"

    def is_whole(self) -> bool:
        return self.damage() is None

    def damage(self) -> str | None:
        """None for a whole library; else what is wrong, which is empty when there is none."""
        if not self.note.exists() and not self.library.exists():
            return ""
        try:
            known = json.loads(self.note.read_text(encoding="utf-8"))
            found = hashlib.sha256(self.library.read_bytes()).hexdigest()
            return None if known["sha256"] == found else "its bytes are not those that were written"
        except (OSError, ValueError, KeyError, TypeError) as error:
            return f"{type(error).__name__}: {error}"

    def keep(self, made: Path) -> None:
        """Take the library that was just linked. The file first: without its note it is not taken for whole."""
        content = made.read_bytes()
        os.replace(made, self.library)
        facts = {
            "sha256": hashlib.sha256(content).hexdigest(),
            "key": self.recipe.key,
            "commands": [list(step.command) for step in (*self.recipe.units, self.recipe.link)],
        }
        write_whole(self.note, json.dumps(facts, indent=1) + "\n")


def _make(entries: Sequence[_Entry], progress: Progress) -> None:
    """Build what is missing, with the lock of each entry held; another process may have done it meanwhile."""
    with ExitStack() as held:
        for entry in entries:
            waiting = f"waiting for another process that builds {entry.recipe.name}"
            lock = entry.folder / f"{entry.stem}.lock"
            held.enter_context(exclusive(lock, lambda waiting=waiting: progress(waiting, 0, None)))  # type: ignore[misc]
        damages = [(entry, entry.damage()) for entry in entries]
        for entry, damage in damages:
            if damage:
                _log.warning("the cached library %s is damaged and is built again (%s)", entry.library, damage)
        missing = [entry for entry, damage in damages if damage is not None]
        places = {entry: _fresh_folder(held, entry) for entry in missing}
        errors = run_recipes([(entry.recipe, places[entry]) for entry in missing], progress)
        for entry, error in zip(missing, errors, strict=True):
            if error is None:
                entry.keep(places[entry] / "library.so")
            elif error.output:
                _FAILED[entry.recipe.key] = error
        for error in errors:
            if error is not None:
                raise _again(error)


def _fresh_folder(held: ExitStack, entry: _Entry) -> Path:
    """A folder to build in. What a killed build of the same left is removed: its lock is ours now."""
    prefix = f".tmp-{entry.stem}-"
    for leftover in entry.folder.glob(f"{prefix}*"):
        shutil.rmtree(leftover)
    return Path(held.enter_context(tempfile.TemporaryDirectory(prefix=prefix, dir=entry.folder)))
