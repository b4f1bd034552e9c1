"""docs/structures.md is a whole and true map: every folder and every module of the core, one sentence each."""

from __future__ import annotations

import re
from collections import Counter

from support.doc_pages import ROOT, paths_named

PAGE = ROOT / "docs" / "structures.md"
FOLDERS = ("core", "plugins", "backends", "kernels")

_ROW = re.compile(r"^\| (`[^|]+) \| (.+) \|$", re.MULTILINE)


def rows() -> dict[str, str]:
    """Path -> its sentence; a row may name several paths."""
    text = PAGE.read_text(encoding="utf-8")
    named = [(path, sentence) for cell, sentence in _ROW.findall(text) for path in re.findall(r"`([^`]+)`", cell)]
    assert [path for path, count in Counter(path for path, _ in named).items() if count > 1] == []
    return dict(named)


def test_every_folder_with_code_has_its_sentence() -> None:
    folders = {path.parent for name in FOLDERS for path in (ROOT / name).rglob("*.py")}
    assert sorted({f"{folder.relative_to(ROOT).as_posix()}/" for folder in folders} - rows().keys()) == []


def test_every_module_of_the_core_has_its_sentence() -> None:
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "core").rglob("*.py") if path.stem != "__init__"}
    assert sorted(modules - rows().keys()) == []


def test_every_path_of_the_map_exists_and_folders_end_in_a_slash() -> None:
    for name in {*rows(), *paths_named(PAGE)}:
        assert (ROOT / name).exists(), name
        assert (ROOT / name).is_dir() == name.endswith("/"), name


def test_every_sentence_is_one() -> None:
    for path, sentence in rows().items():
        assert sentence.endswith("."), path
        assert not re.search(r"\. [A-Z]", sentence), path


def test_the_life_of_a_request_has_eight_steps_that_each_name_a_file_of_the_code() -> None:
    text = PAGE.read_text(encoding="utf-8")
    life = text.partition("## The life of a request")[2].partition("\n## ")[0]
    steps = re.split(r"^\d+\. ", life, flags=re.MULTILINE)[1:]
    assert len(steps) == 8
    for step in steps:
        assert re.search(r"`(?:core|plugins|kernels)/[\w/]+\.py`", step), step
