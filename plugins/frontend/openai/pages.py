"""The chat page, the reference at /docs, and the OpenAPI document behind it. Nothing is loaded from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import re
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema
from starlette.responses import HTMLResponse, Response

from drivetrain.plugins.frontend.openai.guard import OPEN_PATHS
from drivetrain.plugins.frontend.openai.schemas import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    RequestBody,
    TokenizeBody,
)

_REF = "#/components/schemas/{model}"
_BODIES: tuple[type[RequestBody], ...] = (ChatBody, CompletionBody, TokenizeBody, DetokenizeBody)
_ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string", "description": "What went wrong, and the next move."},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"], "description": "Path of the parameter that it is about."},
                "code": {"type": ["string", "null"], "description": "A stable word for programs."},
            },
        }
    },
}
_ERRORS = {
    "400": "A parameter, the prompt or the JSON is malformed, unknown or not supported",
    "401": "The API key is missing or wrong",
    "404": "No such model",
    "408": "The request ran out of time before its first token, or its body did not arrive in time",
    "413": "The body is too large",
    "415": "The body is not declared as JSON, or is compressed",
    "429": "The queue is full; try again after Retry-After seconds",
    "500": "The engine failed on this request",
    "503": "The server is draining",
}


def json_body(schema: type[RequestBody]) -> dict[str, Any]:
    """What the OpenAPI document says of a route that reads ``schema``."""
    content = {"application/json": {"schema": {"$ref": _REF.format(model=schema.__name__)}}}
    error = {"application/json": {"schema": {"$ref": _REF.format(model="Error")}}}
    return {
        "requestBody": {"required": True, "content": content},
        "responses": {status: {"description": text, "content": error} for status, text in _ERRORS.items()},
    }


def install_openapi(app: FastAPI) -> None:
    """Let ``app`` describe itself, request bodies and keys included."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _describe(app)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _describe(app: FastAPI) -> dict[str, Any]:
    document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    _, bodies = models_json_schema([(body, "validation") for body in _BODIES], ref_template=_REF)
    components = document.setdefault("components", {})
    components["schemas"] = bodies["$defs"] | {"Error": _ERROR_SCHEMA}
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, methods in document["paths"].items():
        for operation in methods.values():
            operation["responses"].pop("422", None)
            if path not in OPEN_PATHS:
                operation["security"] = [{"key": []}, {}]
    return document


def page(name: str) -> Response:
    """One of the pages beside this file, allowed to run its own script and to call this server, and nothing else."""
    html = importlib.resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
    scripts = " ".join(_hash(script) for script in re.findall(r"<script>(.*?)</script>", html, re.DOTALL))
    policy = (
        f"default-src 'none'; script-src {scripts}; style-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {"content-security-policy": policy, "referrer-policy": "no-referrer", "x-content-type-options": "nosniff"}
    return HTMLResponse(html, headers=headers)


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
