"""The frontend over the fake engine, for every test of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.fake_engine import FakeEngine
from support.live_server import LiveServer


@pytest.fixture(scope="module")
def engine() -> FakeEngine:
    return FakeEngine(seconds_per_token=0.002)


@pytest.fixture(scope="module")
def server(engine: FakeEngine) -> Iterator[LiveServer]:
    with LiveServer(engine) as running:
        yield running
