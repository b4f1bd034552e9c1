"""The rules of the API, over the real engine; and after all of them, nothing is left behind in it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from drivetrain import AsyncEngine
from support.live_server import LiveServer
from support.openai_contract import OpenAIContract


class TestOverTheRealEngine(OpenAIContract):
    """Every rule of the contract."""

    @pytest.fixture(autouse=True)
    def _leaves_nothing_behind(self, server: LiveServer, engine: AsyncEngine) -> Iterator[None]:
        yield
        server.seconds_until_idle()
        health = engine.health()
        assert (health.state, health.running, health.waiting) == ("idle", 0, 0)
        assert engine.stack.engine.kv.usage == 0
