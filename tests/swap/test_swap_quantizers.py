"""Quantizers are exchanged in a running engine, with requests in flight, and leave no trace once they are out."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from drivetrain import LLM, AsyncEngine, SamplingParams
from drivetrain.assembly import build_engine, resolve_parts
from drivetrain.config import load_settings
from drivetrain.errors import ConfigError
from drivetrain.serving.swap import SwapOutcome
from drivetrain.serving.types import FinishReason, GenerationRequest
from support.tiny_models import save_tiny

STREAMS = 64
INT4 = {"name": "int4", "group": 16}
ORDER: tuple[Any, ...] = (
    "int8",
    INT4,
    "none",
    {"name": "w8a8", "rules": {"lm_head": "none"}},
    "fp8",
    "none",
    INT4,
    "none",
)
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
PROMPTS = [[3 + i, 5, 7, 9 + i] for i in range(4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("models") / "llama3"
    save_tiny("llama3", folder)
    return folder


def options(**engine: Any) -> dict[str, Any]:
    return {"platform": {"name": "cpu", "threads": 1}, "engine": {"max_model_len": 96, **engine}}


@pytest.fixture(params=["none", "resident"])
def llm(request: pytest.FixtureRequest, folder: Path) -> Iterator[LLM]:
    """One that reads the files again, and one that keeps a master copy."""
    with LLM(folder, **options(master_copy=request.param)) as llm:
        yield llm


def answers(llm: LLM) -> list[Any]:
    return [result.token_ids for result in llm.generate(PROMPTS, GREEDY)]


def test_there_and_back_the_answers_are_what_they_were(llm: LLM, folder: Path) -> None:
    """In between, they are those of an engine that was started with the quantizer."""
    full = answers(llm)
    for part in ("int8", INT4):
        with LLM(folder, quantizer=part, **options()) as other:
            wanted = answers(other)
        report = llm.swap(quantizer=part)
        assert report.outcome is SwapOutcome.FINALIZED
        assert answers(llm) == wanted
        llm.swap(quantizer="none")
        assert answers(llm) == full


def test_from_one_quantizer_to_another_starts_from_the_files(llm: LLM) -> None:
    """What int4 has rounded is not what int8 rounds: int8 after int4 is int8."""
    llm.swap(quantizer="int8")
    wanted = answers(llm)
    llm.swap(quantizer=INT4)
    llm.swap(quantizer="int8")
    assert answers(llm) == wanted


def test_a_quantizer_that_does_not_fit_changes_nothing(llm: LLM) -> None:
    """Groups of 32 in rows of 48: an error before anything is made, in a dry run and in a swap."""
    full = answers(llm)
    for dry_run in (True, False):
        with pytest.raises(ConfigError, match="rows of 48 weights are no whole number of groups of 32"):
            llm.swap(dry_run=dry_run, quantizer="int4")
    assert llm._loop.engine.epoch == 0
    assert answers(llm) == full


def request(number: int) -> GenerationRequest:
    prompt = [3 + number % 50, 5, 7 + number % 11, 9, 2 + number % 3, *range(20, 20 + number % 9)]
    params = SamplingParams(max_tokens=12 + number % 20, temperature=0, ignore_eos=True)
    return GenerationRequest(prompt, params)


async def answer(engine: AsyncEngine, number: int) -> tuple[tuple[int, ...], set[int]]:
    """Tokens, and the epochs that made them."""
    tokens: list[int] = []
    epochs: set[int] = set()
    async for chunk in await engine.submit(request(number)):
        tokens += chunk.token_ids
        epochs.add(chunk.epoch)
        if chunk.finish_reason is not None:
            assert chunk.finish_reason is FinishReason.LENGTH, chunk.error
    return tuple(tokens), epochs


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sixty_four_streams_under_changing_quantizers(folder: Path) -> None:
    """Every request is answered in full; one that saw a single quantizer has that quantizer's answer; no block leaks;
    the loop pauses less than 50 ms."""
    settings = load_settings(None, {"model": str(folder), **options()})
    stack = build_engine(resolve_parts(settings, leave_out=("frontend",)))
    engine = AsyncEngine(stack)
    engine.start()
    try:
        asyncio.run(_swap_under_load(engine))
    finally:
        engine.shutdown()
    stack.engine.kv.check()
    assert [pool.num_used for pool in stack.engine.kv.pools] == [0 for _ in stack.engine.kv.pools]


async def _swap_under_load(engine: AsyncEngine) -> None:
    expected: dict[int, list[tuple[int, ...]]] = {}

    async def expect(epoch: int) -> None:
        found = await asyncio.gather(*(answer(engine, number) for number in range(STREAMS)))
        expected[epoch] = [tokens for tokens, _ in found]

    await expect(0)
    numbers = iter(range(10**9))
    is_over = False
    seen: list[tuple[int, tuple[int, ...], set[int]]] = []

    async def stream() -> None:
        while not is_over:
            number = next(numbers) % STREAMS
            seen.append((number, *await answer(engine, number)))

    streams = [asyncio.create_task(stream()) for _ in range(STREAMS)]
    for epoch, part in enumerate(ORDER, 1):
        report = await engine.swap(load_settings(None, {"quantizer": part}).parts, probation_steps=3)
        assert report.outcome is SwapOutcome.FINALIZED, report.reason
        assert report.epoch == epoch
        assert report.pause_seconds < 0.05
        await expect(epoch)
    is_over = True
    await asyncio.gather(*streams)
    assert expected[3] == expected[6] == expected[8] == expected[0]
    assert expected[2] == expected[7] != expected[0]
    alone = [(number, tokens, epochs) for number, tokens, epochs in seen if len(epochs) == 1]
    assert len(alone) >= STREAMS
    assert {next(iter(epochs)) for _, _, epochs in alone} >= {1, 4, 7}
    for number, tokens, epochs in alone:
        assert tokens == expected[next(iter(epochs))][number], f"request {number} of epoch {epochs}"
    assert all(len(tokens) == 12 + number % 20 for number, tokens, _ in seen)
