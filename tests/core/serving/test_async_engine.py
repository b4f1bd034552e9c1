"""Rules of the asynchronous engine: every stream ends, and a stream that nobody reads any more is freed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import torch

from drivetrain.errors import DrainingError, InvalidRequestError, PromptTooLongError, QueueFullError
from drivetrain.serving.async_engine import AsyncEngine, RequestStream
from drivetrain.serving.tokenizer import LONG_TEXT
from drivetrain.serving.types import Chunk, FinishReason, GenerationRequest, SamplingParams
from support.fake_model import expected_tokens, greedy, prompts
from support.fake_stack import assert_nothing_is_held, held_model, make_stack, text_of, wait_until

torch.set_num_threads(1)

PROMPT = [5, 9, 12, 3, 3, 44]


@pytest.fixture(autouse=True)
def _no_log_of_injected_faults(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL + 1, "drivetrain")


@pytest.fixture
def engines() -> Iterator[list[AsyncEngine]]:
    made: list[AsyncEngine] = []
    yield made
    for engine in made:
        engine.shutdown()


@pytest.fixture
def make(engines: list[AsyncEngine]) -> Any:
    def make_engine(**options: Any) -> AsyncEngine:
        engine = AsyncEngine(make_stack(**options))
        engine.start()
        engines.append(engine)
        return engine

    return make_engine


async def read(stream: RequestStream) -> list[Chunk]:
    return [chunk async for chunk in stream]


def tokens_of(chunks: list[Chunk], index: int = 0) -> list[int]:
    return [token for chunk in chunks if chunk.index == index for token in chunk.token_ids]


def assert_freed(engine: AsyncEngine) -> None:
    wait_until(lambda: engine.loop.is_empty, "empty")
    assert_nothing_is_held(engine.stack)


@asynccontextmanager
async def reading(engine: AsyncEngine, **rest: Any) -> AsyncIterator[RequestStream]:
    """A stream that has given its first token and has a long way to go."""
    stream = await engine.submit(GenerationRequest(PROMPT, greedy(None), **rest))
    await anext(stream)
    yield stream


def test_sixty_four_streams_at_once_each_get_their_own_answer(make: Any) -> None:
    engine = make(num_blocks=40)

    async def one(prompt: list[int]) -> list[Chunk]:
        return await read(await engine.submit(GenerationRequest(prompt, greedy(12, n=2))))

    async def all_of_them() -> list[list[Chunk]]:
        return await asyncio.gather(*(one(prompt) for prompt in prompts(64, 10)))

    for prompt, chunks in zip(prompts(64, 10), asyncio.run(all_of_them()), strict=True):
        expected = expected_tokens(prompt, 12)
        for index in range(2):
            assert tokens_of(chunks, index) == expected
            assert "".join(chunk.text for chunk in chunks if chunk.index == index) == text_of(expected)
        assert [chunk.finish_reason for chunk in chunks].count(FinishReason.LENGTH) == 2
    assert_freed(engine)


def test_the_event_loop_is_woken_once_for_all_that_came_before_it_looks(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make()
    wakes: list[Any] = []

    async def run() -> list[list[Chunk]]:
        loop = asyncio.get_running_loop()
        wake = loop.call_soon_threadsafe
        monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *call: (wakes.append(call), wake(*call)))
        streams = [await engine.submit(GenerationRequest(prompt, greedy(5))) for prompt in prompts(4)]
        wait_until(lambda: engine.loop.is_empty, "all that was asked for")  # the event loop does not look meanwhile
        return [await read(stream) for stream in streams]

    answers = asyncio.run(run())
    assert len(wakes) == 1
    assert [tokens_of(chunks) for chunks in answers] == [expected_tokens(prompt, 5) for prompt in prompts(4)]


def test_a_stream_knows_its_prompt(make: Any) -> None:
    engine = make()

    async def run() -> None:
        for cached in (0, 8):
            stream = await engine.submit(GenerationRequest("hello there", greedy(3)))
            assert stream.prompt.token_ids == stream.prompt_token_ids == tuple(engine.tokenizer.encode("hello there"))
            await read(stream)
            assert stream.prompt.cached_tokens == cached
            assert stream.request_id.startswith("req-")
            with pytest.raises(StopAsyncIteration):
                await anext(stream)

    asyncio.run(run())


def test_cancelling_in_mid_stream_ends_the_stream_and_frees_everything(make: Any) -> None:
    engine = make()

    async def run() -> None:
        async with reading(engine) as stream:
            stream.cancel()
            stream.cancel()
            chunks = await read(stream)
            assert chunks[-1].finish_reason in (FinishReason.CANCELLED, FinishReason.LENGTH)
            stream.cancel()

    asyncio.run(run())
    assert_freed(engine)


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (GenerationRequest([], greedy(1)), InvalidRequestError),
        (GenerationRequest([1] * 70, greedy(1)), PromptTooLongError),
        (GenerationRequest("a" * (LONG_TEXT + 1), greedy(1)), PromptTooLongError),
    ],
)
def test_errors_are_raised_where_the_request_is_submitted(
    make: Any, request_: GenerationRequest, error: type[Exception]
) -> None:
    engine = make()
    with pytest.raises(error):
        asyncio.run(engine.submit(request_))
    assert_freed(engine)


def test_a_full_queue_refuses(make: Any) -> None:
    engine = make(settings={"max_waiting": 2}, max_running=1)

    async def run() -> None:
        with held_model(engine.stack) as model:
            streams = [await engine.submit(GenerationRequest(PROMPT, greedy(2)))]
            assert await asyncio.to_thread(model.faults.entered.wait, 10)
            streams += [await engine.submit(GenerationRequest(PROMPT, greedy(2))) for _ in range(2)]
            with pytest.raises(QueueFullError):
                await engine.submit(GenerationRequest(PROMPT, greedy(2)))
        for stream in streams:
            assert (await read(stream))[-1].finish_reason is FinishReason.LENGTH

    asyncio.run(run())


def test_an_event_loop_that_closes_under_a_stream_frees_it(make: Any) -> None:
    engine = make()
    loop = asyncio.new_event_loop()
    with held_model(engine.stack) as model:
        loop.run_until_complete(engine.submit(GenerationRequest(PROMPT, greedy(None, n=3))))
        assert model.faults.entered.wait(10)
        loop.close()
    assert_freed(engine)
    assert asyncio.run(one_answer(engine)) == expected_tokens(PROMPT, 3)


async def one_answer(engine: AsyncEngine) -> list[int]:
    return tokens_of(await read(await engine.submit(GenerationRequest(PROMPT, greedy(3)))))


def test_whoever_leaves_while_a_long_text_is_still_read_leaves_nothing_behind(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make()
    # A text this long would never fit the fake's context: let it be read as a short one.
    monkeypatch.setattr("drivetrain.serving.async_engine.LONG_TEXT", 3)

    async def run() -> None:
        with held_model(engine.stack):
            with engine.loop._wake:  # the thread that submits has to wait for this
                submitting = asyncio.create_task(engine.submit(GenerationRequest("hello", greedy(None))))
                await asyncio.sleep(0.05)
                submitting.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await submitting
                assert engine.loop.is_empty
            await asyncio.to_thread(wait_until, lambda: engine.stats()["requests"] == 1, "taken")
            # The loop reads the cancellation together with the request, or after its first step: both are right.
            await asyncio.to_thread(wait_until, lambda: engine.loop._inbox or engine.loop.is_empty, "cancelled")

    asyncio.run(run())
    assert_freed(engine)
    assert engine.stats()["output_tokens"] <= 1  # of the 59 that were asked for


def test_draining_waits_for_what_is_under_way(make: Any) -> None:
    engine = make()

    async def run() -> None:
        with held_model(engine.stack):
            stream = await engine.submit(GenerationRequest(PROMPT, greedy(5)))
            assert not await engine.drain(0.05)
            with pytest.raises(DrainingError):
                await engine.submit(GenerationRequest(PROMPT, greedy(5)))
            assert engine.health().state == "draining"
        assert await engine.drain(None)
        assert tokens_of(await read(stream)) == expected_tokens(PROMPT, 5)

    asyncio.run(run())


def test_shutdown_ends_every_stream(make: Any) -> None:
    engine = make(max_running=2)

    async def run() -> list[list[Chunk]]:
        with held_model(engine.stack):
            streams = [await engine.submit(GenerationRequest(PROMPT, greedy(None, n=2))) for _ in range(6)]
            stopping = asyncio.create_task(asyncio.to_thread(engine.shutdown))
            while engine.health().state != "draining":
                await asyncio.sleep(0.002)
        await stopping
        return [await read(stream) for stream in streams]

    for chunks in asyncio.run(run()):
        assert {chunk.finish_reason for chunk in chunks if chunk.finish_reason} == {FinishReason.CANCELLED}
    assert_freed(engine)


def test_a_time_limit_ends_a_stream_with_what_it_has(make: Any) -> None:
    engine = make()

    async def run() -> list[Chunk]:
        async with reading(engine, timeout_seconds=0.5) as stream:
            with held_model(engine.stack):
                await asyncio.sleep(0.6)
            return await read(stream)

    assert asyncio.run(run())[-1].finish_reason in (FinishReason.TIMEOUT, FinishReason.LENGTH)
    assert_freed(engine)


def test_what_the_frontend_asks_of_it(make: Any) -> None:
    engine = make(defaults={"temperature": 0.6, "top_p": 0.9})
    asyncio.run(one_answer(engine))
    assert engine.model_name == "fake"
    assert engine.max_model_len == 64
    assert SamplingParams(**engine.defaults).temperature == 0.6
    assert engine.registry.get_sample_value("drivetrain_output_tokens_total") == 3
    assert engine.stats()["output_tokens"] == 3
    assert engine.report().to_dict()["selections"] == []
    assert engine.selection_dict()["model"] == "fake"
