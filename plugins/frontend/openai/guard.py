"""The door of the server: every response gets a request id, closed paths need a key, and no failure goes unanswered."""

from __future__ import annotations

import hmac
import logging
import re
import uuid
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from drivetrain.plugins.frontend.openai.errors import InvalidKeyError, as_request_error, error_response

logger = logging.getLogger(__name__)

ADMIN_PREFIX = "/v1/admin/"
"""Paths below it ask for the admin token instead, where they exist at all."""

OPEN_PATHS = frozenset({"/", "/docs", "/openapi.json", "/health", "/favicon.ico"})
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class Guard:
    """ASGI middleware: sets ``x-request-id`` (the client's own, when it is well formed), checks the API key, answers
    what nobody else could, and lets HEAD be asked wherever GET may; the server leaves the body out."""

    def __init__(self, app: ASGIApp, *, keys: Sequence[bytes]) -> None:
        self.app = app
        self.keys = tuple(keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"
        has_begun = False

        async def send_with_id(message: Message) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        refusal = self._refusal(scope["path"], headers)
        if refusal is not None:
            await error_response(refusal)(scope, receive, send_with_id)
            return
        try:
            await self.app({**scope, "method": "GET"} if scope["method"] == "HEAD" else scope, receive, send_with_id)
        except Exception as error:
            # Answered here, inside of what adds headers: further out, the answer would have neither its request id nor
            # what lets a web page read it, and the connection would be closed without a word.
            if has_begun:
                raise
            logger.error("%s %s failed", scope["method"], scope["path"], exc_info=error)
            await error_response(as_request_error(error))(scope, receive, send_with_id)

    def _refusal(self, path: str, headers: Headers) -> InvalidKeyError | None:
        if not self.keys or path in OPEN_PATHS or path.startswith(ADMIN_PREFIX):
            return None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not given.strip():
            return InvalidKeyError("this server needs an API key", hint="Send the header 'Authorization: Bearer KEY'.")
        if not self._is_known(given.strip().encode("latin-1")):
            return InvalidKeyError("the API key is wrong", hint="Ask who runs this server for a key.")
        return None

    def _is_known(self, given: bytes) -> bool:
        # Every key is compared in full, so that the time taken tells nothing about any of them.
        matches = [hmac.compare_digest(given, key) for key in self.keys]
        return any(matches)
