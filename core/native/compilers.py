"""Finds compilers, and says which one it is: the part of a library's identity that the sources don't tell."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from drivetrain.caching import write_whole
from drivetrain.contracts.plugin import Probe
from drivetrain.errors import ConfigError, KernelBuildError, nearest

_log = logging.getLogger("drivetrain")

_NAMES = {"c++": ("g++", "c++", "clang++"), "cuda": ("nvcc", "hipcc")}
"""Language -> names that are looked for on PATH, in this order."""

_USUAL_PLACES = {"nvcc": "/usr/local/cuda/bin/nvcc", "hipcc": "/opt/rocm/bin/hipcc"}
"""Where an installer puts a compiler without adding the folder to PATH."""

_PACKAGES = {"c++": "g++ or clang", "cuda": "the CUDA toolkit (nvcc) or ROCm (hipcc)"}

_VERSION_LIMIT_SECONDS = 30.0

VARIABLES = (
    *("CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH", "LIBRARY_PATH", "GCC_EXEC_PREFIX", "CCC_OVERRIDE_OPTIONS"),
    *("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "NVCC_CCBIN", "HIPCC_COMPILE_FLAGS_APPEND", "HIPCC_LINK_FLAGS_APPEND"),
)
"""Variables that compilers themselves read. What they hold changes the library, so it is part of the library's key."""


@dataclass(frozen=True)
class Compiler:
    """One compiler on this machine.

    path:     the program, as it is called.
    language: ``"c++"`` or ``"cuda"``.
    """

    path: str
    language: str

    @property
    def name(self) -> str:
        return Path(self.path).name

    @property
    def is_hip(self) -> bool:
        return "hip" in self.name

    def version(self, notes: Path) -> str:
        """What it says its version is. Starts it, unless ``notes``, a folder, tells of this very file.

        A script, or a program that starts another one (ccache), may change what it starts: it is asked every time.
        Raises KernelBuildError when it does not answer.
        """
        program = Path(self.path).resolve()
        if not any(word in program.name for word in ("g++", "c++", "clang", "nvcc", "hipcc")) or _is_script(program):
            return self._ask()
        status = program.stat()
        identity = {"path": str(program), "size": status.st_size, "changed_ns": status.st_mtime_ns}
        note = notes / f"compiler-{str(program).strip('/').replace('/', '-')}.json"
        known = _read_note(note)
        if known is not None and {key: known.get(key) for key in identity} == identity:
            return str(known["version"])
        version = self._ask()
        if os.access(notes, os.W_OK):  # libraries that somebody else has built are used from a folder that is not ours
            write_whole(note, json.dumps({**identity, "version": version}, indent=1) + "\n")
        return version

    def _ask(self) -> str:
        try:
            done = subprocess.run(
                [self.path, "--version"],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                env=plain_environment(),
                timeout=_VERSION_LIMIT_SECONDS,
                check=True,
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise KernelBuildError(
                f"the compiler does not tell its version: {error}",
                where=self.path,
                hint=f"Install {_PACKAGES[self.language]} anew, or name another compiler.",
            ) from error
        return done.stdout.strip()


def find_compiler(
    language: str = "c++", wanted: str | Path | None = None, names: Sequence[str] = ()
) -> Compiler | None:
    """The compiler for ``language``, or None. Looks for files only: starts nothing, so a probe may call it.

    wanted: a name on PATH or a path; by default the usual names are looked for.
    names:  look for these only.

    Raises ConfigError for an unknown language.
    """
    if language not in _NAMES:
        close = nearest(language, _NAMES)
        raise ConfigError(
            "no compiler is known for this language",
            found=language,
            allowed=_NAMES,
            hint=f"Did you mean {close!r}?" if close else None,
        )
    for name in [str(wanted)] if wanted is not None else names or _NAMES[language]:
        path = shutil.which(name) or shutil.which(_USUAL_PLACES.get(name, name))
        if path is not None:
            return Compiler(os.path.abspath(path), language)
    return None


def probe_compiler(language: str = "c++", wanted: str | Path | None = None, names: Sequence[str] = ()) -> Probe:
    """Whether :func:`find_compiler` finds one, as a probe's answer."""
    compiler = find_compiler(language, wanted, names)
    if compiler is not None:
        return Probe.yes(f"{compiler.path} compiles {language}")
    looked_for = str(wanted) if wanted is not None else ", ".join(names or _NAMES[language])
    return Probe.no("no_compiler", f"no {language} compiler is here", wanted=looked_for, offered="none of them on PATH")


def need_compiler(name: str, language: str, wanted: str | Path | None, names: Sequence[str] = ()) -> Compiler:
    """The compiler that builds library ``name``. Raises KernelBuildError when there is none."""
    compiler = find_compiler(language, wanted, names)
    if compiler is not None:
        return compiler
    probe = probe_compiler(language, wanted, names)
    raise KernelBuildError(
        probe.reason,
        where=f"native library {name}",
        found=probe.offered,
        allowed=probe.wanted,
        hint=f"Install {_PACKAGES[language]}, or name the compiler by its path.",
    )


def with_host(compiler: Compiler) -> tuple[Compiler, ...]:
    """The compiler, and the one of C++ that a compiler of CUDA hands the host's half of a source to."""
    host = find_compiler("c++") if compiler.language == "cuda" else None
    return (compiler,) if host is None else (compiler, host)


def plain_environment() -> dict[str, str]:
    """The environment with messages in English, which is how errors are found among them."""
    return {**os.environ, "LC_ALL": "C", "LANGUAGE": ""}


def _is_script(program: Path) -> bool:
    with program.open("rb") as file:
        return file.read(2) == b"#!"


def _read_note(path: Path) -> dict[str, object] | None:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        _log.warning("the note %s can't be read and is written anew: %s", path, error)
        return None
    return known if isinstance(known, dict) and "version" in known else None
