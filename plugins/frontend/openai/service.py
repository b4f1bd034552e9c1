"""What the routes share: the engine, the settings, and the names that the model answers to."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from starlette.requests import Request

from drivetrain.errors import InvalidRequestError, UnknownModelError
from drivetrain.plugins.frontend.openai.config import OpenAIConfig
from drivetrain.serving.tokenizer import LONG_TEXT

if TYPE_CHECKING:
    from drivetrain.serving.async_engine import AsyncEngine

T = TypeVar("T")


@dataclass(frozen=True)
class Service:
    """The engine and the settings of one server."""

    engine: AsyncEngine
    config: OpenAIConfig

    @property
    def names(self) -> tuple[str, ...]:
        """Names that the model answers to, its own first."""
        return tuple(dict.fromkeys((self.engine.model_name, *self.config.served_names)))

    def resolve_model(self, name: str | None) -> str:
        """The name to answer under. Raises UnknownModelError."""
        if name is None:
            return self.engine.model_name
        if name not in self.names:
            raise UnknownModelError(
                "this server does not serve that model", param="model", found=name[:200], allowed=self.names
            )
        return name

    def resolve_timeout(self, wanted: float | None) -> float | None:
        """Seconds that a request may live. Raises InvalidRequestError when it wants more than the server allows."""
        longest = self.config.request_timeout_seconds
        if wanted is not None and longest is not None and wanted > longest:
            raise InvalidRequestError(
                "timeout_seconds is longer than this server allows",
                param="timeout_seconds",
                found=wanted,
                allowed=f"at most {longest:g}",
            )
        return longest if wanted is None else wanted


async def done_aside(amount: int, work: Callable[[], T]) -> T:
    """The result of ``work``, which reads this many characters or tokens: in a thread where it would hold up the event
    loop, and with it every other client."""
    return await asyncio.to_thread(work) if amount > LONG_TEXT else work()


def service_of(request: Request) -> Service:
    """The service that ``request`` came to."""
    service = request.app.state.service
    assert isinstance(service, Service)
    return service
