"""POST /v1/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace
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
    merge,
    run_while_connected,
    sampling_params,
    submit_all,
    usage_of,
)
from drivetrain.plugins.frontend.openai.logprobs import CompletionLogprobs, joined
from drivetrain.plugins.frontend.openai.pages import json_body
from drivetrain.plugins.frontend.openai.schemas import COMPLETION_MAX_TOKENS, CompletionBody, Prompt
from drivetrain.plugins.frontend.openai.service import Service, service_of
from drivetrain.serving.types import Chunk, GenerationRequest, SamplingParams

if TYPE_CHECKING:
    from drivetrain.serving.async_engine import RequestStream

router = APIRouter(tags=["generation"])


@router.post("/v1/completions", summary="Continue a text", openapi_extra=json_body(CompletionBody))
async def create_completion(request: Request) -> Response:
    """The continuation of one or more prompts, whole or as a stream of server-sent events."""
    service = service_of(request)
    body = await read_request(request, CompletionBody, service.config)
    model = service.resolve_model(body.model)
    _check_count(body, service.engine.max_waiting)
    params = _params(body, service)
    timeout_seconds = service.resolve_timeout(body.timeout_seconds)
    requests = [
        GenerationRequest(prompt, params, body.priority or 0, timeout_seconds, is_streamed=bool(body.stream))
        for prompt in body.prompt
    ]
    streams = await submit_all(service.engine, requests)
    answer = _Answer(service, body, streams, params, model, int(time.time()))
    if body.stream:
        return EventStream(answer.payloads(), streams)
    return JSONResponse(await run_while_connected(request.receive, answer.whole(), streams))


def _check_count(body: CompletionBody, max_waiting: int) -> None:
    # The last prompt would find the others' n sequences each before it, however often the client tries again.
    if (len(body.prompt) - 1) * (body.n or 1) >= max_waiting:
        raise InvalidRequestError(
            "more prompts, each with n answers, than this server lets wait at once (engine.max_waiting)",
            param="prompt",
            found=f"{len(body.prompt)} prompts of {body.n or 1}",
            allowed=f"at most {max_waiting} together",
            hint="Send them in several requests.",
        )


def _params(body: CompletionBody, service: Service) -> SamplingParams:
    if body.stream_options is not None and not body.stream:
        raise InvalidRequestError("stream_options is for streams", param="stream_options", hint="Set stream to true.")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise InvalidRequestError(
            "best_of is not supported", param="best_of", found=body.best_of, allowed=f"{body.n or 1}, the value of n"
        )
    max_tokens = COMPLETION_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    return sampling_params(
        body,
        service.engine.defaults,
        # The engine always makes a token; a request that only scores its prompt drops it.
        max_tokens=1 if _only_scores(body) else max_tokens,
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
    )


def _only_scores(body: CompletionBody) -> bool:
    return body.max_tokens == 0 and bool(body.echo)


@dataclass(frozen=True)
class _Answer:
    """The answer to one request, in either form. Choice ``p * n + i`` is the i-th sequence of prompt p."""

    service: Service
    body: CompletionBody
    streams: list[RequestStream]
    params: SamplingParams
    model: str
    created: int

    def _head(self) -> dict[str, Any]:
        return {
            "id": f"cmpl-{self.streams[0].request_id}",
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
        }

    async def whole(self) -> dict[str, Any]:
        choices = await collect(self.streams, self.params.n)
        if _only_scores(self.body):
            choices = [Choice(c.position, finish_reason=c.finish_reason) for c in choices]
        return self._head() | {
            "choices": [self._choice(choice) for choice in choices],
            "usage": usage_of(self.streams, sum(choice.num_tokens for choice in choices)),
        }

    def _choice(self, choice: Choice) -> dict[str, Any]:
        logprobs = None
        if self.params.logprobs is not None:
            builder = self._logprobs_builder()
            parts = [self._echoed_logprobs(choice.position, builder)] if self.body.echo else []
            logprobs = joined(*parts, builder.output(choice.logprobs))
        return {
            "index": choice.position,
            "text": self._echoed_text(choice.position) + choice.text,
            "logprobs": logprobs,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
            **({"epochs": choice.epochs} if self.body.return_epochs else {}),
        }

    def _logprobs_builder(self) -> CompletionLogprobs:
        return CompletionLogprobs(self.service.engine.tokenizer, self.params.skip_special_tokens)

    def _echoed_text(self, choice: int) -> str:
        if not self.body.echo:
            return ""
        prompt: Prompt = self.body.prompt[choice // self.params.n]
        if isinstance(prompt, str):
            return prompt
        return self.service.engine.tokenizer.decode(prompt, skip_special_tokens=self.params.skip_special_tokens)

    def _echoed_logprobs(self, choice: int, builder: CompletionLogprobs) -> dict[str, Any]:
        prompt = self.streams[choice // self.params.n].prompt
        text = self._echoed_text(choice)
        return builder.prompt(text, prompt.token_ids, prompt.logprobs or [None] * len(prompt.token_ids))

    async def payloads(self) -> AsyncGenerator[dict[str, Any]]:
        wants_usage = bool(self.body.stream_options and self.body.stream_options.include_usage)
        head = self._head()
        if wants_usage:
            head["usage"] = None
        builders: dict[int, CompletionLogprobs] = {}
        num_tokens = 0
        async with aclosing(merge(self.streams)) as chunks:
            async for stream, chunk in chunks:
                choice = stream * self.params.n + chunk.index
                is_first = choice not in builders
                builder = builders.setdefault(choice, self._logprobs_builder())
                if _only_scores(self.body):
                    chunk = replace(chunk, text="", token_ids=(), logprobs=chunk.logprobs and ())
                num_tokens += len(chunk.token_ids)
                piece = self._piece(choice, chunk, builder, is_first)
                if piece["text"] or piece["logprobs"] or piece["finish_reason"]:
                    yield head | {"choices": [piece]}
                if (failure := failure_of(chunk)) is not None:
                    raise failure
        if wants_usage:
            yield head | {"choices": [], "usage": usage_of(self.streams, num_tokens)}

    def _piece(self, choice: int, chunk: Chunk, builder: CompletionLogprobs, is_first: bool) -> dict[str, Any]:
        parts = []
        if self.params.logprobs is not None:
            if is_first and self.body.echo:
                parts.append(self._echoed_logprobs(choice, builder))
            if chunk.logprobs:
                parts.append(builder.output(chunk.logprobs))
        is_failed = failure_of(chunk) is not None
        return {
            "index": choice,
            "text": (self._echoed_text(choice) if is_first else "") + chunk.text,
            "logprobs": joined(*parts) if parts else None,
            "finish_reason": None if is_failed else chunk.finish_reason,
            "stop_reason": chunk.stop_reason,
            **({"epoch": chunk.epoch} if self.body.return_epochs else {}),
        }
