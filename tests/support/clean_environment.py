"""Wheels of other people's packages, and an environment of their own that they are installed in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path

_IN_FORKS = """
import json, os, sys
import numpy, pytest, torch
for name, folder in json.load(sys.stdin).items():
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        log = os.open("log", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        status = pytest.main(["-q", "-p", "no:cacheprovider"])
        sys.stdout.flush()
        os._exit(status)
    print(json.dumps([name, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])]), flush=True)
"""

_PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]


def _run(command: Sequence[object], timeout_seconds: float, cwd: Path | None = None) -> str:
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, capture_output=True, text=True, timeout=timeout_seconds, check=False
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"
    return done.stdout


def build_wheels(packages: Sequence[Path], folder: Path, timeout_seconds: float = 240) -> list[Path]:
    """The wheels of source folders, built with what is installed here; nothing is fetched."""
    _run([*_PIP, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, *packages], timeout_seconds)
    return sorted(folder.glob("*.whl"))


class CleanEnvironment:
    """A new virtual environment. What this one has (torch, Drivetrain, pytest) can be imported in it, so that nothing
    large is installed twice; everything else is what was installed in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        venv.create(folder, with_pip=False)
        self.python = folder / "bin" / "python"
        # addsitedir rather than a plain path: an editable installation of Drivetrain is a .pth file there.
        lent = sysconfig.get_path("purelib")
        (self._site_packages / "lent.pth").write_text(f"import site; site.addsitedir({lent!r})\n")

    @property
    def _site_packages(self) -> Path:
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        return self.folder / "lib" / version / "site-packages"

    def install(self, wheels: Sequence[Path]) -> None:
        """Install wheels as they are, without what they depend on."""
        _run([*_PIP, "--python", self.python, "install", "-q", "--no-deps", "--no-index", *wheels], 120)

    def run(
        self, *arguments: object, cwd: Path | None = None, timeout_seconds: float = 120, stdin: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """Python of this environment with ``arguments``, to its end."""
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "PYTHON"))}
        # Two threads beside another busy process take many times longer than one.
        environment["OMP_NUM_THREADS"] = "1"
        return subprocess.run(
            [str(self.python), *map(str, arguments)],
            input=stdin,
            cwd=cwd or self.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
            check=False,
        )

    def run_tests(self, folders: Mapping[str, Path], timeout_seconds: float) -> dict[str, tuple[int, str]]:
        """What pytest comes to in each of these folders, by name: exit status and output. Each runs in a process of its
        own, a fork of one that has torch already."""
        asked = json.dumps({name: str(folder) for name, folder in folders.items()})
        done = self.run("-c", _IN_FORKS, timeout_seconds=timeout_seconds, stdin=asked)
        assert done.returncode == 0, done.stderr
        statuses = dict(map(json.loads, done.stdout.splitlines()))
        return {name: (statuses[name], (folder / "log").read_text()) for name, folder in folders.items()}

    def drivetrain(self, *arguments: object, timeout_seconds: float = 120) -> subprocess.CompletedProcess[str]:
        """The ``drivetrain`` command there; warnings are errors."""
        return self.run("-W", "error", "-m", "drivetrain", *arguments, timeout_seconds=timeout_seconds)
