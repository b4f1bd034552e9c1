"""The application: routes, and the layers that every request passes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

import drivetrain
from drivetrain.observers import Observers
from drivetrain.plugins.frontend.openai import admin, chat, completions, operations
from drivetrain.plugins.frontend.openai.config import OpenAIConfig
from drivetrain.plugins.frontend.openai.errors import install_handlers
from drivetrain.plugins.frontend.openai.guard import Guard
from drivetrain.plugins.frontend.openai.pages import install_openapi, page
from drivetrain.plugins.frontend.openai.service import Service

if TYPE_CHECKING:
    from drivetrain.serving.async_engine import AsyncEngine

_DESCRIPTION = (
    "One model behind the OpenAI API. Parameters marked *Extension* are this server's own. What the API knows and this "
    "server does not implement is refused by name when it would change the answer."
)


def create_app(engine: AsyncEngine, config: OpenAIConfig) -> FastAPI:
    """The ASGI application that serves ``engine``."""
    app = FastAPI(
        title="Drivetrain",
        version=drivetrain.__version__,
        description=_DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.service = Service(engine, config)
    for part in (chat, completions, operations):
        app.include_router(part.router)
    if config.admin is not None:
        app.include_router(admin.router)
    _add_pages(app, config)
    Observers().notify("add_routes", app=app)
    install_handlers(app)
    install_openapi(app)
    # The last one added is the outermost: a refusal at the door carries the headers that let a web page read it.
    app.add_middleware(Guard, keys=config.keys)
    if config.allow_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.allow_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-request-id"],
            expose_headers=["x-request-id", "retry-after"],
        )
    return app


def _add_pages(app: FastAPI, config: OpenAIConfig) -> None:
    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return page("docs.html")

    @app.get("/favicon.ico", include_in_schema=False)
    async def favicon() -> Response:
        return Response(status_code=204)

    if config.chat_page:

        @app.get("/", include_in_schema=False)
        async def chat_page() -> Response:
            return page("chat.html")
