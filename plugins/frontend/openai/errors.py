"""The API's error format: ``{"error": {"message", "type", "param", "code"}}``, and errors that only HTTP knows."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from drivetrain.errors import DrivetrainError, RequestError

logger = logging.getLogger(__name__)

MAX_MESSAGE_CHARACTERS = 2000
RETRY_AFTER_SECONDS = 1
_RETRY_LATER = {429, 503}
_LINGER_BYTES = 64 * 1024 * 1024
_CODES = {404: "not_found", 405: "method_not_allowed"}
_HINTS = {404: "The list of routes is at /docs.", 405: "See /docs for the method."}


class InvalidKeyError(RequestError):
    """The API key is missing or wrong."""

    status = 401
    code = "invalid_api_key"


class SwapRefusedError(RequestError):
    """The engine did not exchange its parts; nothing has changed."""

    status = 409
    code = "swap_refused"


class BodyTooLargeError(RequestError):
    """The body is larger than this server takes."""

    status = 413
    code = "request_too_large"


class MediaTypeError(RequestError):
    """The body is not declared as JSON."""

    status = 415
    code = "unsupported_media_type"


class SlowBodyError(RequestError):
    """The body did not arrive in time."""

    status = 408
    type = "timeout_error"
    code = "timeout"


class UnsupportedError(RequestError):
    """A parameter of the OpenAI API that would change the answer and that this server does not implement."""

    code = "unsupported_parameter"


class StoppedError(RequestError):
    """The server stopped before the request was finished."""

    status = 503
    type = "server_error"
    code = "stopped"


class ClientGoneError(Exception):
    """The client closed the connection; nobody reads what would be answered."""


def envelope(error: RequestError) -> dict[str, Any]:
    """The JSON body that tells of ``error``."""
    message = str(error)
    if len(message) > MAX_MESSAGE_CHARACTERS:
        message = message[:MAX_MESSAGE_CHARACTERS] + "…"
    return {"error": {"message": message, "type": error.type, "param": error.param, "code": error.code}}


def as_request_error(error: Exception) -> RequestError:
    """``error`` as one that the API can tell of; what the client can't mend is a plain 500."""
    if isinstance(error, RequestError):
        return error
    known = isinstance(error, DrivetrainError)
    failure = RequestError(str(error) if known else "the server met an error that it did not expect; its log has more")
    failure.status, failure.type, failure.code = 500, "server_error", "internal_error"
    failure.__cause__ = error
    return failure


def error_response(error: RequestError) -> Response:
    """The response that tells of ``error``."""
    headers: dict[str, str] = {}
    if error.status in _RETRY_LATER:
        headers["retry-after"] = str(RETRY_AFTER_SECONDS)
    if isinstance(error, InvalidKeyError):
        headers["www-authenticate"] = "Bearer"
    if isinstance(error, BodyTooLargeError):
        return LingeringResponse(envelope(error), status_code=error.status, headers=headers | {"connection": "close"})
    return JSONResponse(envelope(error), status_code=error.status, headers=headers)


class LingeringResponse(JSONResponse):
    """Answers at once, then takes and drops what the client still sends before the connection is closed.

    A connection closed with unread bytes in it is reset, and most clients lose the answer in a reset.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        # A client that waits for "100 continue" sends nothing more once it has the answer.
        if not any(name == b"expect" for name, _ in scope["headers"]):
            await self._drop_rest(receive)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _drop_rest(self, receive: Receive) -> None:
        dropped = 0
        while dropped < _LINGER_BYTES:
            message = await receive()
            dropped += len(message.get("body", b""))
            if message["type"] == "http.disconnect" or not message.get("more_body", False):
                return


def _http_error(status: int, detail: object, headers: Mapping[str, str] | None) -> Response:
    error = RequestError(str(detail), hint=_HINTS.get(status))
    error.status, error.code = status, _CODES.get(status)
    response = error_response(error)
    response.headers.update(headers or {})
    return response


def install_handlers(app: FastAPI) -> None:
    """Make every failure of ``app`` that has a name answer in the API's format; ``Guard`` answers the others."""

    @app.exception_handler(DrivetrainError)
    async def known(request: Request, error: DrivetrainError) -> Response:
        failure = as_request_error(error)
        if failure.status >= 500 and not isinstance(error, RequestError):
            logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return error_response(failure)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        where = f"{request.method} {request.url.path}"
        return _http_error(error.status_code, f"{where}: {error.detail}", error.headers)

    @app.exception_handler(RequestValidationError)
    async def validation(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        param = ".".join(str(part) for part in first["loc"][1:]) or None
        return error_response(RequestError(str(first["msg"]), param=param))

    @app.exception_handler(ClientGoneError)
    async def gone(request: Request, error: ClientGoneError) -> Response:
        return Response(status_code=499)
