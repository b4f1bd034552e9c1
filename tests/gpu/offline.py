"""Takes the GPU tests to a machine that has a GPU, torch and triton, but no network.

    $ python tests/gpu/offline.py fetch build/gpu-wheels --python 3.12    # where there is a network
    $ python3 tests/gpu/offline.py install build/gpu-wheels               # there, in a copy of the repository

``fetch`` downloads wheels for Linux on x86-64 of all that the package, ``tests/gpu`` and ``tests/benchmarks/gpu``
need but torch and triton. ``install`` makes the virtual environment ``.venv`` from them, on top of what that machine
has, so that ``make test-gpu`` and ``make bench-gpu`` (or ``.venv/bin/pytest tests/gpu``) find everything there. It
needs nothing but Python and pip.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OF_THE_MACHINE = ("torch", "triton")
TOOLS = ("pytest", "pytest-timeout", "pytest-xdist", "transformers")
"""Of the extra ``test``: what the GPU's tests and benchmarks import."""

GLIBC = (34, 31, 28, 27, 24, 17, 12, 5)
"""Wheels for these versions 2.x run with the newest."""


def name_of(requirement: str) -> str:
    """The distribution that a requirement asks for."""
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0].lower()


def requirements(pyproject: Path) -> Iterator[str]:
    """What has to be fetched: the package's dependencies, the tools, and what builds the package."""
    found = tomllib.loads(pyproject.read_text(encoding="utf-8"))
    project = found["project"]
    yield from (one for one in project["dependencies"] if name_of(one) not in OF_THE_MACHINE)
    yield from (one for one in project["optional-dependencies"]["test"] if name_of(one) in TOOLS)
    yield from found["build-system"]["requires"]


def run(command: Sequence[str]) -> None:
    done = subprocess.run(command, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with status {done.returncode}; see above for the reason")


def fetch(folder: Path, python: str) -> None:
    """Download the wheels for that version of Python."""
    platforms = [f"--platform=manylinux_2_{minor}_x86_64" for minor in GLIBC] + ["--platform=manylinux2014_x86_64"]
    target = [f"--python-version={python}", "--implementation=cp", *platforms, "--only-binary=:all:"]
    run(
        [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "-d",
            str(folder),
            *target,
            *requirements(ROOT / "pyproject.toml"),
        ]
    )
    wheels = list(folder.glob("*.whl"))
    print(
        f"{len(wheels)} wheels, {sum(one.stat().st_size for one in wheels) >> 20} MiB, for Python {python} in {folder}"
    )


def make_environment(folder: Path) -> None:
    """A virtual environment that sees the packages of this Python, which may be in an environment of its own."""
    # Without pip of its own: some distributions leave out what would put it there.
    run([sys.executable, "-m", "venv", "--system-site-packages", "--without-pip", str(folder)])
    if sys.prefix != sys.base_prefix:  # venv itself goes by the Python that this one was made from
        own = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}))
        others = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
        (own / "of_the_machine.pth").write_text("\n".join(others) + "\n", encoding="utf-8")


def install(folder: Path) -> None:
    """Make ``.venv``, on top of this Python's own packages, with the package in editable form."""
    if not any(folder.glob("*.whl")):
        sys.exit(f"{folder} holds no wheels; fill it with: python tests/gpu/offline.py fetch {folder}")
    venv = ROOT / ".venv"
    make_environment(venv)
    tools = [one for one in requirements(ROOT / "pyproject.toml") if name_of(one) in (*TOOLS, "setuptools")]
    pip = [sys.executable, "-m", "pip", "--python", str(venv / "bin" / "python"), "install", "-q", "--no-compile"]
    offline = ["--no-index", f"--find-links={folder}"]
    # Even where the machine has them: .venv/bin/pytest has to be there. Of the rest, what it lacks.
    run(
        [
            *pip,
            *offline,
            "--ignore-installed",
            "--no-deps",
            *(one for one in tools if name_of(one).startswith("pytest")),
        ]
    )
    run([*pip, *offline, *tools])
    run([*pip, *offline, "--no-build-isolation", "-e", str(ROOT)])
    for stamp in (".base", ".dev"):  # what the Makefile looks at
        (venv / stamp).touch()
    print(f"{venv} is ready: make test-gpu, make bench-gpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("fetch", "install"):
        command = commands.add_parser(name)
        command.add_argument("folder", type=Path)
        if name == "fetch":
            command.add_argument("--python", default="3.12", help="version of the GPU machine's Python")
    given = parser.parse_args()
    if given.command == "fetch":
        fetch(given.folder, given.python)
    else:
        install(given.folder)


if __name__ == "__main__":
    main()
