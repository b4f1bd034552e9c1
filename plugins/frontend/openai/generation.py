"""From a checked request to streams of the engine and back, and what to do when the client leaves."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from drivetrain.errors import InvalidRequestError, RequestError, RequestFailedError, RequestTimeoutError
from drivetrain.plugins.frontend.openai.errors import ClientGoneError, StoppedError, as_request_error, envelope
from drivetrain.plugins.frontend.openai.schemas import GenerationBody
from drivetrain.serving.types import Chunk, FinishReason, GenerationRequest, SamplingParams, TokenLogprob

if TYPE_CHECKING:
    from drivetrain.serving.async_engine import AsyncEngine, RequestStream

logger = logging.getLogger(__name__)

T = TypeVar("T")

_MODEL_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_SAME_NAME = ("n", "seed", "stop", "min_tokens", "ignore_eos", "stop_token_ids", "skip_special_tokens")
_PENALTIES = ("presence_penalty", "frequency_penalty")


# --- in ------------------------------------------------------------------------------------------------------------


def sampling_params(
    body: GenerationBody,
    defaults: Mapping[str, object],
    *,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
) -> SamplingParams:
    """How to sample for ``body``; what it leaves out comes from ``defaults``, the model's own.

    Raises InvalidRequestError.
    """
    values: dict[str, Any] = {name: defaults[name] for name in (*_MODEL_DEFAULTS, *_PENALTIES) if name in defaults}
    for name in (*_MODEL_DEFAULTS, *_PENALTIES, *_SAME_NAME):
        if (given := getattr(body, name)) is not None:
            values[name] = given
    if body.logit_bias is not None:
        values["logit_bias"] = _token_ids(body.logit_bias)
    if body.include_stop_str_in_output is not None:
        values["include_stop"] = body.include_stop_str_in_output
    return SamplingParams(max_tokens=max_tokens, logprobs=logprobs, prompt_logprobs=prompt_logprobs, **values)


@contextmanager
def renamed(inner: str, outer: str, *, in_text: bool = True) -> Iterator[None]:
    """Refusals of the parameter ``inner`` speak of ``outer``, the name that the request gave it; with ``in_text``, in
    their words too."""
    try:
        yield
    except RequestError as error:
        if error.param == inner:
            error.param = outer
            if in_text:
                error.what = error.what.replace(inner, outer, 1)
                error.hint = error.hint and error.hint.replace(inner, outer, 1)
        raise


def _token_ids(bias: Mapping[str, float]) -> dict[int, float]:
    for token in bias:
        if not (token.isascii() and token.isdigit() and len(token) <= 10):
            raise InvalidRequestError("keys of logit_bias are token ids", param="logit_bias", found=token[:40])
    return {int(token): value for token, value in bias.items()}


async def submit_all(engine: AsyncEngine, requests: Iterable[GenerationRequest]) -> list[RequestStream]:
    """Hand every request to the engine, or none: when one is refused, those before it are cancelled."""
    streams: list[RequestStream] = []
    try:
        for request in requests:
            if streams:
                await asyncio.sleep(0)  # between two prompts of a list, everybody else gets a turn
            streams.append(await engine.submit(request))
    except BaseException:
        cancel_all(streams)
        raise
    return streams


def cancel_all(streams: Iterable[RequestStream]) -> None:
    """Free what the streams hold in the engine."""
    for stream in streams:
        stream.cancel()


# --- out -----------------------------------------------------------------------------------------------------------


def failure_of(chunk: Chunk) -> RequestError | None:
    """What ended the sequence, when it was none of the ends that the API has a word for."""
    match chunk.finish_reason:
        case FinishReason.ERROR:
            return RequestFailedError(chunk.error or "the engine failed on this request")
        case FinishReason.CANCELLED:
            return StoppedError("the server stopped before the request was finished", hint="Send it again.")
        case FinishReason.TIMEOUT:
            return RequestTimeoutError(
                "the request did not finish within its time limit", hint="Ask for fewer tokens, or raise the limit."
            )
        case _:
            return None


async def merge(streams: Sequence[RequestStream]) -> AsyncGenerator[tuple[int, Chunk]]:
    """Chunks of all streams as they come, each with the position of its stream."""
    if len(streams) == 1:
        async for chunk in streams[0]:
            yield 0, chunk
        return
    queue: asyncio.Queue[tuple[int, Chunk | None]] = asyncio.Queue()

    async def pump(position: int, stream: RequestStream) -> None:
        try:
            async for chunk in stream:
                queue.put_nowait((position, chunk))
        finally:
            queue.put_nowait((position, None))

    pumps = [asyncio.create_task(pump(position, stream)) for position, stream in enumerate(streams)]
    try:
        num_open = len(pumps)
        while num_open:
            position, arrived = await queue.get()
            if arrived is None:
                num_open -= 1
                await pumps[position]
            else:
                yield position, arrived
    finally:
        for task in pumps:
            task.cancel()
        # Their own failures are raised above, where they are awaited; here they only have to be gone.
        await asyncio.gather(*pumps, return_exceptions=True)


@dataclass
class Choice:
    """One sequence as it grows."""

    position: int
    text: str = ""
    num_tokens: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    epochs: list[int] = field(default_factory=list)

    def add(self, chunk: Chunk) -> None:
        self.text += chunk.text
        self.num_tokens += len(chunk.token_ids)
        self.logprobs.extend(chunk.logprobs or ())
        self.finish_reason = chunk.finish_reason
        self.stop_reason = chunk.stop_reason
        if chunk.epoch not in self.epochs:
            self.epochs.append(chunk.epoch)


async def collect(streams: Sequence[RequestStream], n: int) -> list[Choice]:
    """All choices once every one has ended. Raises the RequestError that speaks for a failure.

    A request whose time ran out is a failure only when nothing at all came of it.
    """
    choices = [Choice(position) for position in range(len(streams) * n)]
    timeout: RequestError | None = None
    async with aclosing(merge(streams)) as chunks:
        async for position, chunk in chunks:
            choices[position * n + chunk.index].add(chunk)
            failure = failure_of(chunk)
            if chunk.finish_reason is FinishReason.TIMEOUT:
                timeout = failure
            elif failure is not None:
                raise failure
    if timeout is not None and not any(choice.num_tokens for choice in choices):
        raise timeout
    return choices


def usage_of(streams: Sequence[RequestStream], num_completion_tokens: int) -> dict[str, Any]:
    """The API's account of tokens."""
    num_prompt_tokens = sum(len(stream.prompt_token_ids) for stream in streams)
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_completion_tokens,
        "total_tokens": num_prompt_tokens + num_completion_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(stream.prompt.cached_tokens for stream in streams)},
    }


# --- while the client is there ---------------------------------------------------------------------------------------


async def run_while_connected(receive: Receive, work: Coroutine[Any, Any, T], streams: Sequence[RequestStream]) -> T:
    """The result of ``work``; when the client leaves first, or ``work`` fails, the streams are cancelled.

    Raises ClientGoneError, and whatever ``work`` raises.
    """
    worker = asyncio.create_task(work)
    watcher = asyncio.create_task(_disconnected(receive))
    is_done = False
    try:
        await asyncio.wait({worker, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not worker.done():
            raise ClientGoneError
        result = worker.result()
        is_done = True
        return result
    finally:
        if not is_done:
            cancel_all(streams)
        worker.cancel()
        watcher.cancel()
        # What the worker had to say was returned or raised above, or has nobody left to hear it.
        await asyncio.gather(worker, watcher, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def encode_event(payload: Mapping[str, Any]) -> bytes:
    """One server-sent event. ASCII only: some clients split lines at U+2028 and the like, which JSON may hold."""
    return b"data: " + json.dumps(payload, separators=(",", ":"), allow_nan=False).encode("ascii") + b"\n\n"


class EventStream(Response):
    """Server-sent events of ``payloads``, then ``[DONE]``; a failure is one last event in the API's error format."""

    media_type = "text/event-stream"

    def __init__(self, payloads: AsyncGenerator[Mapping[str, Any]], streams: Sequence[RequestStream]) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self.payloads = payloads
        self.streams = streams

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await run_while_connected(receive, self._send_all(send), self.streams)
        except ClientGoneError:
            logger.debug("the client left a stream; its request is cancelled")

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for event in self._events():
                await send({"type": "http.response.body", "body": event, "more_body": True})
        except RequestError as error:
            cancel_all(self.streams)
            await self._send_last(send, error)
        except Exception as error:
            await self._send_last(send, as_request_error(error))
            raise
        else:
            await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})

    async def _send_last(self, send: Send, error: RequestError) -> None:
        await send({"type": "http.response.body", "body": encode_event(envelope(error)), "more_body": False})

    async def _events(self) -> AsyncIterator[bytes]:
        async with aclosing(self.payloads) as payloads:
            async for payload in payloads:
                yield encode_event(payload)
