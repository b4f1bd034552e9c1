"""Models that are already on this machine."""

from __future__ import annotations

import re
from pathlib import Path

from drivetrain.contracts.source import Progress, Source
from drivetrain.errors import ModelNotFoundError, SourceError

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_HUB_FILE = re.compile(r"[^/]+/[^/]+/.+\.gguf")


def is_local(name: str) -> bool:
    """True when ``name`` means a path: it exists, starts like one (``./ ../ / ~``), or ends in ``.gguf``.

    Names with a scheme (``pypi:...``) never do. ``org/name/file.gguf`` is a file on the hub unless it exists here.
    """
    if not name or _SCHEME.match(name):
        return False
    if name in (".", "..") or name.startswith(("./", "../", "/", "~")):
        return True
    if Path(name).exists():
        return True
    return name.endswith(".gguf") and _HUB_FILE.fullmatch(name) is None


class LocalSource(Source):
    """A folder with a checkpoint, or one .gguf file, on this machine."""

    @classmethod
    def claims(cls, name: str) -> bool:
        return is_local(name)

    def locate(self, name: str) -> Path:
        """The absolute path. Raises ModelNotFoundError when there is nothing, SourceError when it holds no model."""
        try:
            path = Path(name).expanduser().resolve()
        except RuntimeError as error:
            raise SourceError("the home folder in this path is unknown", where=name, hint="Give a full path") from error
        if not path.exists():
            raise ModelNotFoundError(
                "there is no such file or folder",
                where=str(path),
                hint="Check the path; a model on the Hugging Face hub is named org/name, without ./ or .gguf",
            )
        if not path.is_dir():
            if not path.is_file() or path.suffix != ".gguf":
                raise SourceError(
                    "this file is no model",
                    where=str(path),
                    allowed="a .gguf file, or the folder that holds config.json and model.safetensors",
                )
            return path
        self._check_folder(path)
        return path

    def fetch(self, name: str, progress: Progress) -> Path:
        return self.locate(name)

    @staticmethod
    def _check_folder(path: Path) -> None:
        files = sorted(entry.name for entry in path.iterdir())
        weights = [
            file for file in files if file.endswith((".safetensors", ".safetensors.index.json", ".gguf", ".bin"))
        ]
        # A configuration alone is a model for the loader that makes weights up; without its seed that loader refuses.
        if weights or "config.json" in files:
            return
        shown = ", ".join(files[:8]) + (", ..." if len(files) > 8 else "")
        raise SourceError(
            "this folder holds no model",
            where=str(path),
            found=shown or "an empty folder",
            allowed="config.json with model.safetensors (or its shards and index), or a .gguf file",
        )
