"""``drivetrain serve``: a model behind a frontend, until it is told to stop."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer

from drivetrain.cli.console import note, show_progress
from drivetrain.cli.options import with_settings
from drivetrain.config import Settings
from drivetrain.contracts.kinds import KINDS
from drivetrain.errors import ConfigError
from drivetrain.registry import PartRequest


@with_settings("frontend")
def serve(
    settings: Settings,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on. Default: 127.0.0.1.", show_default=False)
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="Port; 0 takes a free one. Default: 8000.", show_default=False)
    ] = None,
    admin_token: Annotated[
        str | None, typer.Option(help="Allow drivetrain swap to whoever sends this token.", show_default=False)
    ] = None,
    api_key: Annotated[str | None, typer.Option(help="Key that clients must send.", show_default=False)] = None,
) -> None:
    """Serve a model over HTTP with the OpenAI API. SIGTERM lets running requests finish, then exits 0.

    Example: drivetrain serve --model smollm2-135m --port 8000
    """
    from drivetrain.assembly import build_engine, resolve_parts
    from drivetrain.contracts.frontend import ReservesAddress
    from drivetrain.observers import Observers
    from drivetrain.serving.async_engine import AsyncEngine

    if settings.model is None:
        raise ConfigError("no model is named", hint="Give one with --model NAME, for example --model smollm2-135m.")
    settings = with_frontend_options(settings, host=host, port=port, api_key=api_key, admin_token=admin_token)
    observers = Observers()
    observers.notify("config_settled", settings=settings)
    with show_progress() as progress:
        parts = resolve_parts(settings, observers=observers, progress=progress)
        if isinstance(parts.frontend, ReservesAddress):
            parts.frontend.reserve()
        stack = build_engine(parts, observers=observers, progress=progress)
    for selection in parts.report.selections:
        note(f"{selection.kind:<10} {selection.chosen.name:<12} {selection.reason}")
    for text in (*parts.report.fallbacks, *parts.notes):
        note(f"note: {text}")
    engine = AsyncEngine(stack)
    engine.start()
    try:
        parts.frontend.serve(engine)
    finally:
        engine.shutdown()


def with_frontend_options(settings: Settings, **given: Any) -> Settings:
    """Settings whose frontend has the options that were given on the command line."""
    options = {name: value for name, value in given.items() if value is not None}
    if not options:
        return settings
    asked = settings.parts.get("frontend") or PartRequest("frontend", KINDS["frontend"].default)
    places = dict(asked.places)
    places.update({(name,): "command line" for name in options})
    merged = dataclasses.replace(asked, options={**asked.options, **options}, places=places)
    return dataclasses.replace(settings, parts={**settings.parts, "frontend": merged})
