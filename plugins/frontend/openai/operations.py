"""Routes around generation: models, tokens, health, metrics, and what was chosen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import JSONResponse, Response

from drivetrain.errors import InvalidRequestError
from drivetrain.plugins.frontend.openai.body import read_request
from drivetrain.plugins.frontend.openai.chat import render
from drivetrain.plugins.frontend.openai.pages import json_body
from drivetrain.plugins.frontend.openai.schemas import DetokenizeBody, TokenizeBody
from drivetrain.plugins.frontend.openai.service import Service, done_aside, service_of

if TYPE_CHECKING:
    from drivetrain.serving.async_engine import AsyncEngine
    from drivetrain.serving.tokenizer import Tokenizer

router = APIRouter()

MASK = "**********"
_WORKING_STATES = frozenset({"idle", "busy"})


@router.get("/v1/models", tags=["models"], summary="The names that the model answers to")
async def list_models(request: Request) -> dict[str, Any]:
    """The one model that is served, under each of its names."""
    service = service_of(request)
    return {"object": "list", "data": [_model_card(service, name) for name in service.names]}


@router.get("/v1/models/{name:path}", tags=["models"], summary="One model")
async def show_model(request: Request, name: str) -> dict[str, Any]:
    """One of the names, or 404."""
    service = service_of(request)
    return _model_card(service, service.resolve_model(name))


def _model_card(service: Service, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": service.engine.created,
        "owned_by": "drivetrain",
        "max_model_len": service.engine.max_model_len,
        "vocab_size": service.engine.tokenizer.vocab_size,
    }


@router.post("/tokenize", tags=["tokens"], summary="Text or chat to tokens", openapi_extra=json_body(TokenizeBody))
async def tokenize(request: Request) -> Response:
    """The token ids of a text, or of a chat as the model's template writes it."""
    service = service_of(request)
    body = await read_request(request, TokenizeBody, service.config)
    service.resolve_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequestError("send one of prompt and messages", param="prompt")
    length = len(body.prompt or "") + sum(message.num_characters for message in body.messages or ())
    return await done_aside(length, lambda: _tokenized(body, service.engine))


def _tokenized(body: TokenizeBody, engine: AsyncEngine) -> Response:
    if body.messages is not None:
        text = render(engine.tokenizer, body.messages, body.add_generation_prompt)
        tokens = engine.tokenizer.encode(text, add_special_tokens=False)
    else:
        tokens = engine.tokenizer.encode(body.prompt or "", add_special_tokens=body.add_special_tokens)
    return JSONResponse({"tokens": tokens, "count": len(tokens), "max_model_len": engine.max_model_len})


@router.post("/detokenize", tags=["tokens"], summary="Tokens to text", openapi_extra=json_body(DetokenizeBody))
async def detokenize(request: Request) -> Response:
    """The text of token ids."""
    service = service_of(request)
    body = await read_request(request, DetokenizeBody, service.config)
    service.resolve_model(body.model)
    return await done_aside(len(body.tokens), lambda: _detokenized(body, service.engine.tokenizer))


def _detokenized(body: DetokenizeBody, tokenizer: Tokenizer) -> Response:
    for position, token in enumerate(body.tokens):
        if not 0 <= token < tokenizer.vocab_size:
            raise InvalidRequestError(
                "token id out of range",
                param=f"tokens[{position}]",
                found=token,
                allowed=f"0 to {tokenizer.vocab_size - 1}",
            )
    return JSONResponse({"prompt": tokenizer.decode(body.tokens, skip_special_tokens=body.skip_special_tokens)})


@router.get("/health", tags=["operations"], summary="Is the engine making progress?")
async def health(request: Request) -> Response:
    """200 while the engine is idle or makes progress; 503 when it is stalled, failed or draining."""
    service = service_of(request)
    state = service.engine.health()
    content = {
        "status": state.state,
        "model": service.engine.model_name,
        "running": state.running,
        "waiting": state.waiting,
        "seconds_since_progress": round(state.seconds_since_progress, 3),
        "error": state.error,
    }
    return JSONResponse(content, status_code=200 if state.state in _WORKING_STATES else 503)


@router.get("/metrics", tags=["operations"], summary="Prometheus metrics")
async def metrics(request: Request) -> Response:
    """Metrics in Prometheus' text format."""
    return Response(generate_latest(service_of(request).engine.registry), media_type=CONTENT_TYPE_LATEST)


@router.get("/debug/selection", tags=["operations"], summary="What was chosen, and why")
async def selection(request: Request) -> Response:
    """Each kind of part: what was chosen, who asked for it, why the others were not, and the plan's digest."""
    service = service_of(request)
    return JSONResponse(_without_keys(service.engine.selection_dict(), service.config.keys))


def _without_keys(value: Any, keys: tuple[bytes, ...]) -> Any:
    """``value`` with every API key in it masked: the options that a frontend was given are part of the selection."""
    if isinstance(value, dict):
        return {name: _without_keys(item, keys) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_keys(item, keys) for item in value]
    return MASK if isinstance(value, str) and value.encode() in keys else value


@router.get("/debug/stats", tags=["operations"], summary="The engine's counters")
async def stats(request: Request) -> Response:
    """What the engine counts, as JSON."""
    return JSONResponse(service_of(request).engine.stats())
