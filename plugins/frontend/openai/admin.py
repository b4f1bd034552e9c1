"""The operator's door: exchange parts of the running engine. There only when an admin token was given."""

from __future__ import annotations

import hmac
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from drivetrain.config import load_settings
from drivetrain.errors import ConfigError, InvalidRequestError, PluginError, SwapError
from drivetrain.plugins.frontend.openai.body import read_json
from drivetrain.plugins.frontend.openai.errors import InvalidKeyError, SwapRefusedError
from drivetrain.plugins.frontend.openai.service import service_of

router = APIRouter(prefix="/v1/admin")


@router.post("/swap", tags=["operations"], summary="Exchange parts while requests are in flight")
async def swap(request: Request) -> Response:
    """Kinds and what is asked for, ``{"attention": "sdpa"}``, with ``dry_run`` and ``probation_steps`` if wanted.

    200 tells how it ended, a roll-back included; 400 names what can't be chosen, 409 a swap that changed nothing.
    """
    service = service_of(request)
    _check_token(request, service.config.admin)
    body = await read_json(request, service.config)
    options = _options(body)
    try:
        parts = load_settings(None, body, origin="request").parts
        report = await service.engine.swap(parts, **options)
    except SwapError as error:
        raise SwapRefusedError(str(error)) from error
    except (ConfigError, PluginError) as error:
        raise InvalidRequestError(str(error)) from error
    return JSONResponse(report.to_dict())


def _options(body: dict[str, Any]) -> dict[str, Any]:
    """Take what is not a kind out of ``body``."""
    options: dict[str, Any] = {}
    for name, kind in (("dry_run", bool), ("probation_steps", int)):
        if name in body:
            value = body.pop(name)
            if not isinstance(value, kind) or (kind is int and (isinstance(value, bool) or value < 0)):
                raise InvalidRequestError(f"{name} has the wrong type", param=name, found=value, allowed=kind.__name__)
            options[name] = value
    return options


def _check_token(request: Request, token: bytes | None) -> None:
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    is_right = token is not None and hmac.compare_digest(given.strip().encode("latin-1"), token)
    if scheme.lower() != "bearer" or not is_right:
        raise InvalidKeyError(
            "this needs the admin token", hint="Send 'Authorization: Bearer TOKEN' with the server's admin_token."
        )
