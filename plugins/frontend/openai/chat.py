"""POST /v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from drivetrain.errors import InvalidRequestError
from drivetrain.plugins.frontend.openai.body import read_request
from drivetrain.plugins.frontend.openai.generation import (
    Choice,
    EventStream,
    collect,
    failure_of,
    renamed,
    run_while_connected,
    sampling_params,
    submit_all,
    usage_of,
)
from drivetrain.plugins.frontend.openai.logprobs import chat_logprobs
from drivetrain.plugins.frontend.openai.pages import json_body
from drivetrain.plugins.frontend.openai.schemas import ChatBody, Message
from drivetrain.plugins.frontend.openai.service import Service, done_aside, service_of
from drivetrain.serving.types import Chunk, GenerationRequest, SamplingParams

if TYPE_CHECKING:
    from drivetrain.serving.async_engine import RequestStream
    from drivetrain.serving.tokenizer import Tokenizer

router = APIRouter(tags=["generation"])

_TEMPLATE_OWN = frozenset({"messages", "add_generation_prompt", "continue_final", "bos_token", "eos_token", "tools"})


@router.post("/v1/chat/completions", summary="Answer a chat", openapi_extra=json_body(ChatBody))
async def create_chat_completion(request: Request) -> Response:
    """The assistant's next message, whole or as a stream of server-sent events."""
    service = service_of(request)
    body = await read_request(request, ChatBody, service.config)
    model = service.resolve_model(body.model)
    length = sum(message.num_characters for message in body.messages)
    generation = await done_aside(length, lambda: to_request(body, service))
    # A chat has no prompt of its own: the engine's is made of its messages.
    with _limit_named(body), renamed("prompt", "messages", in_text=False):
        (stream,) = await submit_all(service.engine, [generation])
    answer = _Answer(service, body, stream, generation.params, model, int(time.time()))
    if body.stream:
        return EventStream(answer.payloads(), [stream])
    return JSONResponse(await run_while_connected(request.receive, answer.whole(), [stream]))


def to_request(body: ChatBody, service: Service) -> GenerationRequest:
    """``body`` as the engine takes it. Raises InvalidRequestError."""
    if body.stream_options is not None and not body.stream:
        raise InvalidRequestError("stream_options is for streams", param="stream_options", hint="Set stream to true.")
    params = _params(body, service)
    return GenerationRequest(
        prompt=_prompt(body, service.engine.tokenizer),
        params=params,
        priority=body.priority or 0,
        timeout_seconds=service.resolve_timeout(body.timeout_seconds),
        add_special_tokens=False,
        is_streamed=bool(body.stream),
    )


def _params(body: ChatBody, service: Service) -> SamplingParams:
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequestError("top_logprobs needs logprobs", param="top_logprobs", hint="Set logprobs to true.")
    newer, older = body.max_completion_tokens, body.max_tokens
    if newer is not None and older is not None and newer != older:
        raise InvalidRequestError(
            "max_tokens and max_completion_tokens say different things", param="max_tokens", hint="Send one of them."
        )
    with _limit_named(body):
        return sampling_params(
            body,
            service.engine.defaults,
            max_tokens=older if newer is None else newer,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        )


def _limit_named(body: ChatBody) -> AbstractContextManager[None]:
    """Refusals of ``max_tokens`` name it as the request did."""
    return renamed("max_tokens", "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens")


def _prompt(body: ChatBody, tokenizer: Tokenizer) -> str:
    continues = bool(body.continue_final_message)
    if continues and body.add_generation_prompt:
        raise InvalidRequestError(
            "continue_final_message and add_generation_prompt exclude each other", param="continue_final_message"
        )
    if continues and body.messages[-1].role != "assistant":
        raise InvalidRequestError(
            "continue_final_message needs an assistant message at the end", param="continue_final_message"
        )
    opens = not continues if body.add_generation_prompt is None else body.add_generation_prompt
    variables = body.chat_template_kwargs or {}
    for name in sorted(_TEMPLATE_OWN & variables.keys()):
        raise InvalidRequestError(
            f"{name} is set by the server", param=f"chat_template_kwargs.{name}", hint="Leave it out."
        )
    return render(tokenizer, body.messages, opens, continues, variables)


def render(
    tokenizer: Tokenizer,
    messages: list[Message],
    add_generation_prompt: bool,
    continue_final: bool = False,
    variables: dict[str, Any] | None = None,
) -> str:
    """The chat as the model's template writes it. Raises InvalidRequestError."""
    return tokenizer.render_chat(
        [message.for_template() for message in messages],
        add_generation_prompt=add_generation_prompt,
        continue_final=continue_final,
        variables=variables,
    )


@dataclass(frozen=True)
class _Answer:
    """The answer to one request, in either form."""

    service: Service
    body: ChatBody
    stream: RequestStream
    params: SamplingParams
    model: str
    created: int

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": f"chatcmpl-{self.stream.request_id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
        }

    async def whole(self) -> dict[str, Any]:
        choices = await collect([self.stream], self.params.n)
        return self._head("chat.completion") | {
            "choices": [self._choice(choice) for choice in choices],
            "usage": usage_of([self.stream], sum(choice.num_tokens for choice in choices)),
        }

    def _choice(self, choice: Choice) -> dict[str, Any]:
        wants_logprobs = self.params.logprobs is not None
        return {
            "index": choice.position,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": chat_logprobs(self.service.engine.tokenizer, choice.logprobs) if wants_logprobs else None,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
            **({"epochs": choice.epochs} if self.body.return_epochs else {}),
        }

    async def payloads(self) -> AsyncGenerator[dict[str, Any]]:
        wants_usage = bool(self.body.stream_options and self.body.stream_options.include_usage)
        head = self._head("chat.completion.chunk")
        if wants_usage:
            head["usage"] = None
        for index in range(self.params.n):
            yield head | {"choices": [_delta(index, {"role": "assistant", "content": ""})]}
        num_tokens = 0
        async for chunk in self.stream:
            num_tokens += len(chunk.token_ids)
            if chunk.text or chunk.logprobs:
                piece = _delta(chunk.index, {"content": chunk.text}, self._logprobs(chunk))
                if self.body.return_epochs:
                    piece["epoch"] = chunk.epoch
                yield head | {"choices": [piece]}
            if (failure := failure_of(chunk)) is not None:
                raise failure
            if chunk.finish_reason is not None:
                end = {"finish_reason": chunk.finish_reason, "stop_reason": chunk.stop_reason}
                yield head | {"choices": [_delta(chunk.index, {}) | end]}
        if wants_usage:
            yield head | {"choices": [], "usage": usage_of([self.stream], num_tokens)}

    def _logprobs(self, chunk: Chunk) -> dict[str, Any] | None:
        if chunk.logprobs is None:
            return None
        return chat_logprobs(self.service.engine.tokenizer, chunk.logprobs)


def _delta(index: int, delta: dict[str, str], logprobs: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}
