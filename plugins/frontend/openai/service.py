"""What the routes share: the engine, the settings, and the names that the model answers to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from starlette.requests import Request

from drivetrain.errors import InvalidRequestError, UnknownModelError
from drivetrain.plugins.frontend.openai.config import OpenAIConfig

if TYPE_CHECKING:
    from drivetrain.serving.async_engine import AsyncEngine


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


def service_of(request: Request) -> Service:
    """The service that ``request`` came to."""
    service = request.app.state.service
    assert isinstance(service, Service)
    return service
