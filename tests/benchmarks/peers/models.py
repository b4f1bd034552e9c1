"""The model in every format that a peer reads; all from the same dequantized weights, made once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from drivetrain.contracts.source import silent
from drivetrain.plugins.source.catalogue import CatalogueSource

from .child import PeerError, last_lines
from .install import Installer

MODEL = "smollm2-135m"
SOURCE_FORMAT = "Q4_1"
"""What the model is distributed in; llama.cpp's lines of this format read the file as it is."""

_FOLDER_SCRIPT = Path(__file__).parent / "drivers" / "hf_folder.py"


class Models:
    """Files under build/peers/models."""

    def __init__(self, installer: Installer) -> None:
        self._installer = installer
        self._root = installer.root / "models"

    def source(self) -> Path:
        """The GGUF file that everything starts from, fetched if need be."""
        catalogue = CatalogueSource(CatalogueSource.Config())
        return catalogue.locate(MODEL) or catalogue.fetch(MODEL, silent)

    def folder(self) -> Path:
        """A folder with float32 safetensors and the tokenizer."""
        folder = self._root / "float32"
        if not folder.is_dir():
            unfinished = self._root / "float32.unfinished"
            self._run([sys.executable, str(_FOLDER_SCRIPT), str(self.source()), str(unfinished)])
            unfinished.rename(folder)
        return folder

    def gguf(self, file_format: str) -> Path:
        """A GGUF file of another format, converted by llama.cpp's own program. Raises PeerError."""
        if file_format == SOURCE_FORMAT:
            return self.source()
        path = self._root / f"{MODEL}.{file_format}.gguf"
        if not path.is_file():
            unfinished = path.with_suffix(".unfinished")
            program = self._installer.binaries("llama.cpp") / "llama-quantize"
            self._run([str(program), "--allow-requantize", str(self.source()), str(unfinished), file_format])
            os.replace(unfinished, path)
        return path

    def _run(self, command: list[str]) -> None:
        log = self._installer.root / "logs" / "models.log"
        self._root.mkdir(parents=True, exist_ok=True)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as output:
            try:
                status = subprocess.run(command, stdout=output, stderr=output, check=False).returncode
            except OSError as error:
                raise PeerError(f"a model file can't be made: {error}") from error
        if status:
            raise PeerError(f"a model file can't be made: {command[0]} ended with {status}\n{last_lines(log)}")
