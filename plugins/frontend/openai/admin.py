"""The operator's door: exchange parts of the running engine. There only when an admin token was given."""

from __future__ import annotations

import hmac
from collections.abc import Callable
from threading import TIMEOUT_MAX
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from drivetrain.errors import ConfigError, InvalidRequestError, PluginError, SwapError
from drivetrain.plugins.frontend.openai.body import read_json
from drivetrain.plugins.frontend.openai.errors import InvalidKeyError, SwapRefusedError
from drivetrain.plugins.frontend.openai.service import service_of
from drivetrain.serving.swap import read_parts

router = APIRouter(prefix="/v1/admin")


@router.post("/swap", tags=["operations"], summary="Exchange parts while requests are in flight")
async def swap(request: Request) -> Response:
    """Kinds and what is asked for, ``{"attention": "sdpa"}``, with ``dry_run``, ``probation_steps`` and
    ``timeout_seconds`` if wanted.

    200 tells how it ended, a roll-back included; 400 names what can't be chosen, 409 a swap that changed nothing.
    """
    service = service_of(request)
    _check_token(request, service.config.admin)
    body = await read_json(request, service.config)
    options = _options(body)
    try:
        parts = read_parts(body, service.engine.report(), origin="request")
        report = await service.engine.swap(parts, **options)
    except SwapError as error:
        raise SwapRefusedError(str(error)) from error
    except (ConfigError, PluginError) as error:
        raise InvalidRequestError(str(error)) from error
    return JSONResponse(report.to_dict())


def _options(body: dict[str, Any]) -> dict[str, Any]:
    """Take what is not a kind out of ``body``."""
    options: dict[str, Any] = {}
    for name, (is_right, allowed) in _OPTIONS.items():
        if name in body:
            value = body.pop(name)
            if not is_right(value):
                raise InvalidRequestError(f"{name} must be {allowed}", param=name, found=value)
            options[name] = value
    return options


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_OPTIONS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "dry_run": (lambda value: isinstance(value, bool), "true or false"),
    "probation_steps": (lambda value: _is_number(value) and isinstance(value, int) and value >= 0, "an integer >= 0"),
    "timeout_seconds": (
        lambda value: _is_number(value) and 0 < value <= TIMEOUT_MAX,
        f"a number > 0 and <= {TIMEOUT_MAX:g}",
    ),
}


def _check_token(request: Request, token: bytes | None) -> None:
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    is_right = token is not None and hmac.compare_digest(given.strip().encode("latin-1"), token)
    if scheme.lower() != "bearer" or not is_right:
        raise InvalidKeyError(
            "this needs the admin token", hint="Send 'Authorization: Bearer TOKEN' with the server's admin_token."
        )
