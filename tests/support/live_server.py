"""The real HTTP frontend on a free port of this machine, in a thread."""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import Any

import httpx
import openai

from drivetrain.plugins.frontend.openai import OpenAIFrontend


class LiveServer:
    """Serves ``engine`` while inside. ``options`` are fields of the frontend's Config."""

    def __init__(self, engine: Any, **options: Any) -> None:
        settings = {"port": 0, "log_level": "critical", "drain_seconds": 0.0} | options
        self.engine = engine
        self.frontend = OpenAIFrontend(OpenAIFrontend.Config(**settings))
        self.url = self.frontend.reserve()
        self._clients: dict[str, openai.OpenAI] = {}
        self.thread = threading.Thread(target=self.frontend.serve, args=(engine,), name="live-server")

    @property
    def model(self) -> str:
        return str(self.engine.model_name)

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def client(self, api_key: str = "none") -> openai.OpenAI:
        """The official client; one for each key, closed with the server."""
        if api_key not in self._clients:
            self._clients[api_key] = openai.OpenAI(
                base_url=f"{self.url}/v1", api_key=api_key, max_retries=0, timeout=60
            )
        return self._clients[api_key]

    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=60, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(self.url + path, timeout=60, **options)

    def seconds_until_idle(self, limit: float = 5.0) -> float:
        """How long it takes until the engine holds no request."""
        start = time.monotonic()
        while (waited := time.monotonic() - start) < limit:
            health = self.get("/health").json()
            if health["running"] + health["waiting"] == 0:
                return waited
            time.sleep(0.02)
        raise AssertionError(f"the engine still holds requests after {limit} s: {health}")

    def wait_until_busy(self, limit: float = 5.0) -> None:
        give_up = time.monotonic() + limit
        while not self.get("/health").json()["running"]:
            assert time.monotonic() < give_up, "no request reached the engine"
            time.sleep(0.01)

    def __enter__(self) -> LiveServer:
        self.thread.start()
        give_up = time.monotonic() + 20
        while True:
            try:
                self.get("/health")
                return self
            except httpx.ConnectError:
                assert time.monotonic() < give_up, "the server did not start"
                time.sleep(0.02)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for client in self._clients.values():
            client.close()
        self.frontend.stop()
        self.thread.join(timeout=20)
        assert not self.thread.is_alive(), "the server did not stop"
