"""Contract of a frontend: how requests reach the engine from outside the process."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from drivetrain.contracts.plugin import Plugin

if TYPE_CHECKING:
    from drivetrain.serving.async_engine import AsyncEngine


class Frontend(Plugin):
    """Serves an engine until told to stop."""

    kind = "frontend"

    @abstractmethod
    def serve(self, engine: AsyncEngine) -> None:
        """Block and serve until SIGTERM or SIGINT; then refuse new work, let running requests finish (drain), shut
        the engine down and return. Raises ConfigError when it can't start (a port in use, say)."""


@runtime_checkable
class ReservesAddress(Protocol):
    """Ability ``reserve``: the address is taken before the model is loaded, so that a port in use is told at once."""

    def reserve(self) -> str:
        """Bind the address; return the URL that will be served. Raises ConfigError when it can't be had."""
