"""What counts as a path, and what a path must lead to."""

from __future__ import annotations

from pathlib import Path

import pytest

from drivetrain.contracts.source import silent
from drivetrain.errors import ModelNotFoundError, SourceError
from drivetrain.plugins.source.catalogue import CatalogueSource
from drivetrain.plugins.source.hub import HubSource
from drivetrain.plugins.source.local import LocalSource
from drivetrain.plugins.source.pypi import PypiSource

SOURCES = (LocalSource, HubSource, PypiSource, CatalogueSource)


@pytest.fixture
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalSource:
    monkeypatch.chdir(tmp_path)
    return LocalSource(LocalSource.Config())


@pytest.mark.parametrize(
    ("name", "claimant"),
    [
        ("./models/x", LocalSource),
        ("../x", LocalSource),
        ("/models/x", LocalSource),
        ("~/models/x", LocalSource),
        (".", LocalSource),
        ("x.gguf", LocalSource),
        ("models/x.gguf", LocalSource),
        ("existing", LocalSource),
        ("org/existing", LocalSource),
        ("org/name", HubSource),
        ("org/name@main", HubSource),
        ("org/name@refs/pr/1", HubSource),
        ("org/name/x.gguf", HubSource),
        ("org/name@v1/sub/x.gguf", HubSource),
        ("pypi:dist==1.0/x.gguf", PypiSource),
        ("pypi:nonsense", PypiSource),
        ("smollm2-135m", CatalogueSource),
        ("smollm2-135", None),
        ("org/name/other", None),
        ("", None),
        ("hello world", None),
    ],
)
def test_every_name_is_claimed_by_one_source_at_most(name: str, claimant: type | None, local: LocalSource) -> None:
    Path("existing").mkdir()
    Path("org/existing").mkdir(parents=True)
    assert [source for source in SOURCES if source.claims(name)] == ([claimant] if claimant else [])


def test_a_file_and_a_folder_are_found_absolute(local: LocalSource) -> None:
    Path("x.gguf").write_bytes(b"GGUF")
    Path("folder").mkdir()
    Path("folder/model.safetensors").write_bytes(b"")
    assert local.locate("x.gguf") == Path.cwd() / "x.gguf"
    assert local.fetch("./folder", silent) == Path.cwd() / "folder"


def test_an_existing_folder_wins_over_the_same_name_elsewhere(local: LocalSource) -> None:
    Path("smollm2-135m").mkdir()
    assert LocalSource.claims("smollm2-135m")
    assert not CatalogueSource.claims("smollm2-135m")


def test_what_is_not_there_is_named(local: LocalSource) -> None:
    with pytest.raises(ModelNotFoundError, match=r"nowhere\.gguf.*no such file"):
        local.locate("./nowhere.gguf")


def test_a_folder_without_a_model_tells_what_it_holds(local: LocalSource) -> None:
    Path("folder").mkdir()
    with pytest.raises(SourceError, match=r"folder.*holds no model.*empty folder"):
        local.locate("./folder")
    Path("folder/notes.txt").write_text("")
    with pytest.raises(SourceError, match=r"holds no model.*notes\.txt.*config\.json"):
        local.locate("./folder")


def test_a_file_of_another_kind_is_no_model(local: LocalSource) -> None:
    Path("notes.txt").write_text("")
    with pytest.raises(SourceError, match=r"notes\.txt.*no model.*\.gguf"):
        local.locate("./notes.txt")


def test_a_device_file_is_no_model() -> None:
    with pytest.raises(SourceError, match="this file is no model"):
        LocalSource(LocalSource.Config()).locate("/dev/null")
