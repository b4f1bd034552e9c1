"""Writes real installed distributions (metadata and modules) into a folder, and runs Python with them on its path."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

Groups = Mapping[str, Mapping[str, str]]


def write_distribution(
    folder: Path, name: str, groups: Groups, modules: Mapping[str, str] | None = None, version: str = "1.0"
) -> Path:
    """A distribution as pip would leave it in ``folder``; returns its dist-info folder.

    groups:  entry-point group -> name -> value.
    modules: file below ``folder`` -> source.
    """
    text = "".join(
        f"[{group}]\n" + "".join(f"{key} = {value}\n" for key, value in points.items())
        for group, points in groups.items()
    )
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(text, encoding="utf-8")
    for file, source in (modules or {}).items():
        target = folder / file
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(source, encoding="utf-8")
    return info


def run_python(code: str, *folders: Path, timeout_seconds: float = 60) -> str:
    """What ``code`` prints in a fresh interpreter that has ``folders`` at the head of its path."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(str(folder) for folder in folders)},
        capture_output=True,
        text=True,
        timeout=timeout_seconds,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
