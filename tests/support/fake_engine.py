"""A small engine without a model: it says the prompt back, one byte a token, at a given pace.

It has the face that a frontend sees of ``drivetrain.serving.async_engine.AsyncEngine`` and is deterministic. A greedy
request gets its prompt back as it is; a sampled one gets each letter's case drawn from its seed. A chat is answered
with its last message. The end of the prompt is the model's end token, unless the request ignores that: then it starts
over. Prompts that hold ``<fail>`` end with an error after two tokens.
"""

from __future__ import annotations

import asyncio
import codecs
import itertools
import random
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry, Gauge

from drivetrain.errors import DrainingError, InvalidRequestError, PromptTooLongError, QueueFullError
from drivetrain.serving.types import Chunk, FinishReason, GenerationRequest, PromptInfo, TokenLogprob

BOS, EOS = 256, 257
FAIL = "<fail>"
_MARKS = {BOS: "<s>", EOS: "</s>"}
_TURN = "\x1e"


class ByteTokenizer:
    """One token a byte, and two special ones."""

    vocab_size = 258

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [BOS] * add_special_tokens + list(text.encode())

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        keep = (token for token in ids if token < BOS or not skip_special_tokens)
        return b"".join(self.token_bytes(token) for token in keep).decode(errors="replace")

    def token_text(self, token_id: int) -> str:
        return self.token_bytes(token_id).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        return _MARKS[token_id].encode() if token_id in _MARKS else bytes([token_id])

    def is_special(self, token_id: int) -> bool:
        return token_id in _MARKS

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        if (variables or {}).get("forbidden"):
            raise InvalidRequestError("the chat template refuses this", param="messages")
        turns = [f"{_TURN}{message['role']}: {_content(message)}" for message in messages]
        return "\n".join(turns)


def _content(message: Mapping[str, Any]) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


@dataclass(frozen=True)
class FakeHealth:
    state: str
    running: int
    waiting: int
    seconds_since_progress: float = 0.0
    error: str | None = None

    @property
    def ok(self) -> bool:
        return self.state in ("idle", "busy")


def _selection(kind: str, name: str, *others: str) -> dict[str, Any]:
    made_by = {"distribution": "drivetrain", "version": "0.1.0"}
    candidates = [made_by | {"name": name, "outcome": "chosen", "code": "ok", "reason": "no objection"}]
    candidates += [
        made_by | {"name": other, "outcome": "refused", "code": "no_device", "reason": f"this machine has no {other}"}
        for other in others
    ]
    return {
        "kind": kind,
        "requested": "auto",
        "origin": "default",
        "chosen": made_by | {"kind": kind, "name": name},
        "options": {},
        "reason": "the only one that works here" if others else "the only one there is",
        "candidates": candidates,
        "fallback": None,
    }


@dataclass
class FakeEngine:
    """The engine. ``seconds_per_token`` is its pace, ``capacity`` the requests it takes before its queue is full."""

    model_name: str = "fake-echo"
    seconds_per_token: float = 0.0
    capacity: int = 256
    max_model_len: int = 4096
    max_waiting: int = 1024
    defaults: Mapping[str, object] = field(default_factory=lambda: {"temperature": 0.0})
    created: int = 1_700_000_000

    def __post_init__(self) -> None:
        self.tokenizer = ByteTokenizer()
        self.registry = CollectorRegistry()
        self.active: dict[str, FakeStream] = {}
        self.cancelled: list[str] = []
        self.requests: list[GenerationRequest] = []
        self.is_draining = False
        self.is_shut_down = False
        self.forced_health: FakeHealth | None = None
        self._numbers = itertools.count()
        self._cached: set[tuple[int, ...]] = set()
        Gauge("drivetrain_requests_running", "Requests", registry=self.registry).set_function(lambda: len(self.active))

    def start(self) -> None:
        """There is no thread to start."""

    async def submit(self, request: GenerationRequest) -> FakeStream:
        if self.is_draining:
            raise DrainingError("the server is draining")
        if len(self.active) >= self.capacity:
            raise QueueFullError("the queue is full", found=len(self.active), allowed=str(self.capacity))
        ids = self._prompt_ids(request)
        self.requests.append(request)
        stream = FakeStream(
            self, f"r{next(self._numbers)}", request, ids, cached=len(ids) if ids in self._cached else 0
        )
        self._cached.add(ids)
        self.active[stream.request_id] = stream
        return stream

    def _prompt_ids(self, request: GenerationRequest) -> tuple[int, ...]:
        if isinstance(request.prompt, str):
            ids = self.tokenizer.encode(request.prompt, add_special_tokens=request.add_special_tokens)
        else:
            ids = list(request.prompt)
        if not request.prompt:
            raise InvalidRequestError("the prompt is empty", param="prompt")
        if max(ids) >= self.tokenizer.vocab_size:
            raise InvalidRequestError("token id out of range", param="prompt", found=max(ids))
        if len(ids) >= self.max_model_len:
            raise PromptTooLongError(f"{len(ids)} tokens are too many", param="prompt")
        if len(ids) + (request.params.max_tokens or 1) > self.max_model_len:
            raise PromptTooLongError("max_tokens is too much", param="max_tokens", hint="Lower max_tokens.")
        return tuple(ids)

    def health(self) -> FakeHealth:
        state = "draining" if self.is_draining else "busy" if self.active else "idle"
        return self.forced_health or FakeHealth(state, running=len(self.active), waiting=0)

    def stats(self) -> dict[str, Any]:
        return {"running": len(self.active)}

    def selection_dict(self) -> dict[str, Any]:
        return {
            "selections": [
                _selection("platform", "cpu", "cuda", "rocm", "xpu"),
                _selection("precision", "fp32"),
                _selection("attention", "sdpa"),
                _selection("scheduler", "fcfs"),
            ],
            "open": {},
            "fallbacks": [],
            "model": self.model_name,
            "plan_digest": "0f" * 16,
            "bindings": {"rms_norm": "reference"},
            "notes": [],
        }

    async def drain(self, timeout_seconds: float | None) -> bool:
        self.is_draining = True
        give_up = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        while self.active:
            if give_up is not None and time.monotonic() > give_up:
                return False
            await asyncio.sleep(0.01)
        return True

    def shutdown(self) -> None:
        self.is_draining = self.is_shut_down = True


class FakeStream:
    """Chunks of one request; the sequences take turns."""

    def __init__(
        self, engine: FakeEngine, request_id: str, request: GenerationRequest, ids: tuple[int, ...], cached: int
    ) -> None:
        self.engine = engine
        self.request_id = request_id
        self.request = request
        self.prompt_token_ids = ids
        self._cached = cached
        self._is_cancelled = False
        self._chunks = self._run()

    @property
    def prompt(self) -> PromptInfo:
        wanted = self.request.params.prompt_logprobs
        logprobs = None
        if wanted is not None:
            logprobs = (None, *(_logprob(token, wanted) for token in self.prompt_token_ids[1:]))
        return PromptInfo(self.prompt_token_ids, logprobs, self._cached)

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self

    async def __anext__(self) -> Chunk:
        return await anext(self._chunks)

    def cancel(self) -> None:
        if self.engine.active.pop(self.request_id, None) is not None:
            self.engine.cancelled.append(self.request_id)
            self._is_cancelled = True

    async def _run(self) -> AsyncIterator[Chunk]:
        params = self.request.params
        deadline = time.monotonic() + (self.request.timeout_seconds or float("inf"))
        sequences = {index: _Sequence(self, index) for index in range(params.n)}
        while sequences:
            await asyncio.sleep(self.engine.seconds_per_token)
            early = self._early_end(time.monotonic() > deadline)
            for index, sequence in list(sequences.items()):
                chunk = sequence.end(early) if early else sequence.step()
                if chunk.finish_reason is not None:
                    del sequences[index]
                if not sequences:
                    self.engine.active.pop(self.request_id, None)
                yield chunk

    def _early_end(self, is_late: bool) -> FinishReason | None:
        if self._is_cancelled or self.engine.is_shut_down:
            return FinishReason.CANCELLED
        return FinishReason.TIMEOUT if is_late else None


class _Sequence:
    """One of a request's n sequences."""

    def __init__(self, stream: FakeStream, index: int) -> None:
        self.stream = stream
        self.index = index
        self.params = stream.request.params
        self.tokens = self._source()
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.num_tokens = 0
        self.text = ""

    def _source(self) -> Iterator[int]:
        prompt = [token for token in self.stream.prompt_token_ids if token < BOS]
        text = bytes(prompt).decode(errors="replace")
        reply = text.rsplit(_TURN, 1)[-1].partition(": ")[2] if _TURN in text else text
        chance = random.Random(f"{self.params.seed}-{self.index}")
        while True:
            for byte in reply.encode():
                letter = bytes([byte])
                is_swapped = not self.params.is_greedy and chance.random() < 0.5
                yield (letter.swapcase() if is_swapped else letter)[0]
            yield EOS

    def end(self, reason: FinishReason, error: str | None = None) -> Chunk:
        return Chunk(self.stream.request_id, self.index, "", (), finish_reason=reason, error=error)

    def step(self) -> Chunk:
        prompt = self.stream.request.prompt
        if self.num_tokens == 2 and isinstance(prompt, str) and FAIL in prompt:
            return self.end(FinishReason.ERROR, "the fake engine failed, as it was asked to")
        token = next(self.tokens)
        while token == EOS and self.params.ignore_eos:
            token = next(self.tokens)
        self.num_tokens += 1
        is_end = token == EOS
        text = "" if is_end else self.decoder.decode(bytes([token]))
        reason = FinishReason.STOP if is_end else None
        stop_reason: str | int | None = None
        for stop in self.params.stop:
            if (self.text + text).endswith(stop):
                # The text that is held back in a real engine is never more than this one character here: the tests
                # stop at single characters.
                text = text if self.params.include_stop else text[: len(text) - len(stop)]
                reason, stop_reason = FinishReason.STOP, stop
        if token in self.params.stop_token_ids:
            text, reason, stop_reason = "", FinishReason.STOP, token
        if reason is None and self.num_tokens == self.params.max_tokens:
            reason = FinishReason.LENGTH
        self.text += text
        wanted = self.params.logprobs
        logprobs = None if wanted is None else (_logprob(token, wanted),)
        return Chunk(self.stream.request_id, self.index, text, (token,), logprobs, reason, stop_reason)


def _logprob(token: int, num_top: int) -> TokenLogprob:
    top = tuple(((token + place) % BOS, -0.5 - place) for place in range(num_top))
    return TokenLogprob(token, -0.5, 1, top)
