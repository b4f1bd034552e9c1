"""A real engine on a tiny model, behind the real frontend."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from drivetrain import AsyncEngine
from drivetrain.config import load_settings
from support.command_fixtures import tiny
from support.live_server import LiveServer

__all__ = ["engine", "server", "tiny"]


@pytest.fixture(scope="module")
def engine(tiny: Path) -> Iterator[AsyncEngine]:
    torch.set_num_threads(1)
    settings = load_settings(None, {"model": str(tiny), "platform": {"name": "cpu", "threads": 1}})
    engine = AsyncEngine.from_settings(settings)
    engine.start()
    yield engine
    engine.shutdown()


@pytest.fixture(scope="module")
def server(engine: AsyncEngine) -> Iterator[LiveServer]:
    with LiveServer(engine) as running:
        yield running
