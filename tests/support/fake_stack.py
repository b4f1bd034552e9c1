"""A serving stack around the fake model, with a real tokenizer of sixty-four characters."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from drivetrain.assembly import Parts, ServingStack
from drivetrain.binding import KernelBinder
from drivetrain.config import EngineSettings, Settings
from drivetrain.contracts.loader import TokenizerData
from drivetrain.contracts.plugin import Purpose
from drivetrain.registry import SelectionReport
from drivetrain.serving.loop import EngineLoop, Ticket
from drivetrain.serving.tokenizer import Detokenizer, Tokenizer
from drivetrain.serving.types import Chunk, FinishReason, GenerationRequest, SamplingParams
from support.fake_model import FakeLM, Run, fake_lm, make_engine

CHARACTERS = " abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789."
"""The text of each token."""


def make_tokenizer() -> Tokenizer:
    vocabulary = {character.replace(" ", "\u0120"): index for index, character in enumerate(CHARACTERS)}
    backend = Backend(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    template = "{% for message in messages %}{{ message['content'] }}.{% endfor %}"
    return Tokenizer(TokenizerData(backend, template, {}))


def text_of(tokens: Sequence[int]) -> str:
    return "".join(CHARACTERS[token] for token in tokens)


def make_stack(
    *, settings: Mapping[str, Any] | None = None, defaults: Mapping[str, Any] | None = None, **options: Any
) -> ServingStack:
    """A stack around :func:`make_engine`, in real time; ``settings`` are those of the engine."""
    tokenizer = make_tokenizer()
    engine_settings = EngineSettings(**(settings or {}))
    options = {
        "clock": time.monotonic,
        "make_decoder": lambda prompt, skip: Detokenizer(tokenizer, prompt, skip),
    } | options
    engine = make_engine(settings=engine_settings, **options)
    parts = Parts(Settings("fake", engine=engine_settings), Purpose.SERVE, {}, SelectionReport(()))
    return ServingStack(engine, parts, tokenizer, KernelBinder([]), engine.limits.max_model_len, defaults or {})


class Client:
    """Receives the chunks of its requests, in the loop's thread, and waits for them in another."""

    def __init__(self, loop: EngineLoop) -> None:
        self.loop = loop
        self.run = Run()
        self._changed = threading.Condition()

    def submit(self, prompt: str | Sequence[int], params: SamplingParams, **rest: Any) -> Ticket:
        is_bounded = rest.pop("is_bounded", True)
        return self.loop.submit(GenerationRequest(prompt, params, **rest), self._receive, is_bounded=is_bounded)

    def _receive(self, ticket: Ticket, chunks: list[Chunk]) -> None:
        with self._changed:
            self.run.add(chunks)
            self._changed.notify_all()

    def reasons(self, ticket: Ticket) -> list[FinishReason | None]:
        """Why each sequence of a request ended, once all have; fails after ten seconds."""
        keys = [(ticket.request_id, index) for index in range(ticket.request.params.n)]
        with self._changed:
            assert self._changed.wait_for(lambda: all(key in self.run.last for key in keys), 10), "no end came"
            return [self.run.last[key].finish_reason for key in keys]

    def first_token(self, ticket: Ticket) -> None:
        """Wait until a request has a token."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.run.tokens.get((ticket.request_id, 0)), 10), "no token came"


def wait_until(condition: Callable[[], object], what: str, seconds: float = 10.0) -> None:
    """Look every few milliseconds until ``condition`` holds."""
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up, f"not within {seconds} s: {what}"
        time.sleep(0.002)


@contextmanager
def held_model(stack: ServingStack) -> Iterator[FakeLM]:
    """Inside, a step that reaches the model does not return; ``faults.entered`` tells that one has."""
    model = fake_lm(stack.engine)
    gate = threading.Event()
    model.faults.entered.clear()
    model.faults.gate = gate
    try:
        yield model
    finally:
        gate.set()
        model.faults.gate = None


def assert_nothing_is_held(stack: ServingStack) -> None:
    engine = stack.engine
    engine.kv.check()
    assert [pool.num_used for pool in engine.kv.pools] == [0] * len(engine.kv.pools)
    assert (engine.num_running, engine.num_waiting, engine.has_work) == (0, 0, False)
