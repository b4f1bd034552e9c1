"""From the bytes of a request body to a checked request, with the parameter named in every refusal."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn, TypeVar

from pydantic import ValidationError
from starlette.requests import ClientDisconnect, Request

from drivetrain.errors import InvalidRequestError, RequestError, nearest
from drivetrain.plugins.frontend.openai.config import OpenAIConfig
from drivetrain.plugins.frontend.openai.errors import (
    BodyTooLargeError,
    ClientGoneError,
    MediaTypeError,
    SlowBodyError,
    UnsupportedError,
)
from drivetrain.plugins.frontend.openai.schemas import NESTED, UNSUPPORTED, RequestBody

B = TypeVar("B", bound=RequestBody)

_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")
_MAX_FOUND_CHARACTERS = 80


async def read_request(request: Request, schema: type[B], config: OpenAIConfig) -> B:
    """The body of ``request`` as a ``schema``.

    Raises MediaTypeError, BodyTooLargeError, SlowBodyError, InvalidRequestError, UnsupportedError, ClientGoneError.
    """
    return parse_request(schema, await read_json(request, config))


async def read_json(request: Request, config: OpenAIConfig) -> dict[str, Any]:
    """The body of ``request`` as a JSON object. Raises as :func:`read_request` does."""
    _check_media_type(request.headers.get("content-type"))
    _check_encoding(request.headers.get("content-encoding"))
    return parse_json(await _read_bytes(request, config))


def _check_media_type(content_type: str | None) -> None:
    # A missing type is refused too: a web page may send such a body, or a form's, to any server without asking it
    # first (no CORS preflight), JSON it may not.
    media_type = (content_type or "").partition(";")[0].strip().lower()
    if media_type != "application/json" and not re.fullmatch(r"application/[\w.-]+\+json", media_type):
        raise MediaTypeError(
            "the body must be JSON",
            found=content_type or "no content-type",
            hint="Send 'Content-Type: application/json'.",
        )


def _check_encoding(encoding: str | None) -> None:
    if encoding is not None and encoding.strip().lower() not in ("", "identity"):
        raise MediaTypeError(
            "this server reads no compressed bodies", found=encoding, hint="Send the JSON as it is, without it."
        )


async def _read_bytes(request: Request, config: OpenAIConfig) -> bytes:
    limit = config.max_body_bytes
    too_large = BodyTooLargeError(
        f"the body is larger than the {limit} bytes that this server takes",
        hint="Shorten it, or raise frontend.max_body_bytes on the server.",
    )
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared[:20]) > limit:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(config.body_timeout_seconds):
            async for part in request.stream():
                body += part
                if len(body) > limit:
                    raise too_large
    except ClientDisconnect as error:
        raise ClientGoneError from error
    except TimeoutError as error:
        raise SlowBodyError(
            f"the body did not arrive within {config.body_timeout_seconds:g} seconds", found=f"{len(body)} bytes"
        ) from error
    return bytes(body)


def parse_json(raw: bytes) -> dict[str, Any]:
    """The JSON object in ``raw``. NaN, Infinity, numbers too large for a float and broken text are refused."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"the body is not UTF-8: {error.reason} at byte {error.start}") from error
    try:
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
    except json.JSONDecodeError as error:
        raise InvalidRequestError(
            f"the body is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from error
    except RecursionError as error:
        raise InvalidRequestError("the body is nested too deeply") from error
    except ValueError as error:  # an integer with more digits than Python converts
        raise InvalidRequestError("the body holds a number with too many digits") from error
    if not isinstance(value, dict):
        raise InvalidRequestError("the body must be a JSON object", found=type(value).__name__)
    if _SURROGATE_ESCAPE.search(raw):
        _check_surrogates(value)
    return value


def _refuse_constant(literal: str) -> NoReturn:
    raise InvalidRequestError(f"{literal} is no JSON number", allowed="finite numbers")


def _finite(literal: str) -> float:
    number = float(literal)
    if not math.isfinite(number):
        raise InvalidRequestError(
            "the body holds a number too large for a float", found=literal[:_MAX_FOUND_CHARACTERS]
        )
    return number


def _check_surrogates(value: dict[str, Any]) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(r"the body holds half of a surrogate pair (\ud800 to \udfff)") from error


def parse_request(schema: type[B], body: Mapping[str, Any]) -> B:
    """``body`` as a ``schema``; the first thing that is wrong with it is raised, with its path as ``param``."""
    try:
        return schema.model_validate(body)
    except ValidationError as error:
        raise _first_fault(error, body, schema) from error


def _first_fault(error: ValidationError, body: Mapping[str, Any], schema: type[RequestBody]) -> RequestError:
    """What pydantic found, as one refusal. Members of a union that failed at the same place are joined."""
    faults = error.errors(include_url=False)
    # A misspelt field is the likely cause of the other faults (a required one that is missing, say), and so is a
    # feature that is not there (no content, beside tool calls).
    telling = [fault for cause in ("extra_forbidden", UNSUPPORTED) for fault in faults if fault["type"] == cause]
    fault = next(iter(telling), None)
    if fault is None:
        # Of a union's members, the one that got deepest into the value is the one that was meant.
        first = _path(faults[0]["loc"], body)
        related = [fault for fault in faults if _path(fault["loc"], body).startswith(first)]
        fault = max(related, key=lambda fault: len(_path(fault["loc"], body)))
    path = _path(fault["loc"], body)
    if fault["type"] == "extra_forbidden":
        return _unknown_field(path, fault["loc"], schema)
    if fault["type"] == UNSUPPORTED:
        return UnsupportedError(f"{path}: {fault['msg']}", param=path)
    wanted = dict.fromkeys(_wanted(other["msg"]) for other in faults if _path(other["loc"], body) == path)
    found = None if fault["type"] == "missing" else _shorten(fault["input"])
    return InvalidRequestError(f"{path or 'the body'}: {' or '.join(wanted)}", param=path or None, found=found)


def _unknown_field(path: str, location: tuple[int | str, ...], schema: type[RequestBody]) -> InvalidRequestError:
    owner = NESTED[str(location[0])] if len(location) > 1 else schema
    close = nearest(str(location[-1]), owner.model_fields)
    shown = path[:_MAX_FOUND_CHARACTERS]
    return InvalidRequestError(
        f"unknown parameter {shown!r}",
        param=shown,
        hint=f"Did you mean {close!r}?" if close else "The parameters are listed at /docs.",
    )


def _wanted(message: str) -> str:
    return message.replace("Input should be", "must be").replace("Field required", "is required")


def _shorten(value: object) -> object:
    text = repr(value)
    return value if len(text) <= _MAX_FOUND_CHARACTERS else text[:_MAX_FOUND_CHARACTERS] + "…"


def _path(location: Iterable[int | str], body: object) -> str:
    """``messages[0].content`` for pydantic's location, without the names of union members that it puts in between."""
    path, here = "", body
    for part in location:
        if isinstance(part, int) and isinstance(here, list):
            path += f"[{part}]"
            here = here[part] if part < len(here) else None
        elif isinstance(part, str) and isinstance(here, Mapping):
            path += f".{part}" if path else part
            here = here.get(part)
    return path
