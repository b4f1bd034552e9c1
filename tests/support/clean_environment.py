"""Wheels of other people's packages, and an environment of their own that they are installed in."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Self

_FORKS = Path(__file__).with_name("fork_commands.py")

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


def _environment() -> dict[str, str]:
    """Without what is said to this pytest and its interpreter."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "PYTHON"))}
    # Two threads beside another busy process take many times longer than one.
    return kept | {"OMP_NUM_THREADS": "1"}


class CleanEnvironment:
    """A new virtual environment. What this one has (torch, Drivetrain, pytest) can be imported in it, so that nothing
    large is installed twice; everything else is what was installed in it. To be closed: it has a process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._server: subprocess.Popen[str] | None = None
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
        return subprocess.run(
            [str(self.python), *map(str, arguments)],
            input=stdin,
            cwd=cwd or self.folder,
            env=_environment(),
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
            check=False,
        )

    def run_tests(
        self, folder: Path, *arguments: str, timeout_seconds: float = 240
    ) -> subprocess.CompletedProcess[str]:
        """``pytest`` in a folder, in a fork of a process that has torch already; so is ``drivetrain`` below."""
        return self._in_fork("pytest", ["-q", "-p", "no:cacheprovider", *arguments], folder, timeout_seconds)

    def drivetrain(self, *arguments: object, timeout_seconds: float = 120) -> subprocess.CompletedProcess[str]:
        """The ``drivetrain`` command there; warnings are errors."""
        return self._in_fork("drivetrain", [str(word) for word in arguments], self.folder, timeout_seconds)

    def _in_fork(
        self, command: str, words: Sequence[str], folder: Path, timeout_seconds: float
    ) -> subprocess.CompletedProcess[str]:
        server = self._started()
        assert server.stdin is not None
        assert server.stdout is not None
        with tempfile.TemporaryDirectory() as name:
            output, errors = Path(name, "output"), Path(name, "errors")
            request = {"command": command, "words": words, "folder": str(folder)}
            try:
                server.stdin.write(json.dumps(request | {"output": str(output), "errors": str(errors)}) + "\n")
                server.stdin.flush()
                child = int(server.stdout.readline())
                late = threading.Timer(timeout_seconds, os.killpg, (child, signal.SIGKILL))
                late.start()
                status = int(server.stdout.readline())
                late.cancel()
            except BaseException:  # pytest's time limit: what the server says next would answer another question
                server.kill()
                server.communicate()
                self._server = None
                raise
            out, err = (path.read_text(errors="replace") if path.exists() else "" for path in (output, errors))
        return subprocess.CompletedProcess([command, *words], status, out, err)

    def _started(self) -> subprocess.Popen[str]:
        if self._server is None:
            command = [str(self.python), "-P", str(_FORKS)]
            self._server = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=_environment(), text=True
            )
        return self._server

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._server is not None:
            self._server.communicate(timeout=60)
