"""64 streams under load while every kind is swapped 50 times, some with faults: nobody notices."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

from drivetrain import AsyncEngine, SamplingParams
from drivetrain.assembly import build_engine, resolve_parts
from drivetrain.bench.swap import StepClock
from drivetrain.config import load_settings
from drivetrain.errors import DrivetrainError
from drivetrain.observers import Observers
from drivetrain.registry import Registry
from drivetrain.serving.types import FinishReason, GenerationRequest
from support.swap_parts import refs_with_swap_parts
from support.tiny_models import save_tiny

STREAMS = 64
SWAPS = 50
SDPA = {"name": "sdpa", "block_size": 4}

KINDS: dict[str, list[dict[str, Any]]] = {
    "attention": [
        {"attention": {"name": "same-layout", "block_size": 4}},
        {"attention": {"name": "other-layout", "block_size": 4}},
        {"attention": {"name": "sdpa", "block_size": 5}},
        {"attention": SDPA},
    ],
    "scheduler": [{"scheduler": "priority"}, {"scheduler": {"name": "fcfs", "max_running": 40}}, {"scheduler": "fcfs"}],
    "quantizer": [{"quantizer": "exact"}, {"quantizer": "none"}],
}
FAULTS: dict[str, list[dict[str, Any]]] = {
    "attention": [
        {"attention": {"name": "faulty", "phase": "prepare"}},
        {"attention": {"name": "faulty", "phase": "raise", "block_size": 4}},
        {"attention": {"name": "faulty", "phase": "nan", "block_size": 4}},
    ],
    "scheduler": [{"scheduler": {"name": "faulty", "phase": phase}} for phase in ("prepare", "commit", "raise")],
    "quantizer": [{"quantizer": {"name": "faulty", "phase": phase}} for phase in ("prepare", "nan")],
}


def request(number: int) -> GenerationRequest:
    prompt = [3 + number % 50, 5, 7 + number % 11, 9, 2 + number % 3, *range(20, 20 + number % 9)]
    seed = None if number % 2 else number
    temperature = 0.0 if number % 2 else 1.0
    params = SamplingParams(max_tokens=12 + number % 20, temperature=temperature, seed=seed, ignore_eos=True)
    return GenerationRequest(prompt, params)


async def answer(engine: AsyncEngine, number: int) -> tuple[int, ...]:
    tokens: list[int] = []
    async for chunk in await engine.submit(request(number)):
        tokens += chunk.token_ids
        if chunk.finish_reason is not None:
            assert chunk.finish_reason is FinishReason.LENGTH, chunk.error
    return tuple(tokens)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("models") / "llama3"
    save_tiny("llama3", folder)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("kind", list(KINDS))
def test_fifty_swaps_under_load(folder: Path, kind: str) -> None:
    """Every answer equals that of an undisturbed run, no block leaks, and the loop pauses less than 50 ms."""
    options = {"model": str(folder), "attention": SDPA, "platform": {"name": "cpu", "threads": 1}}
    settings = load_settings(None, {**options, "engine": {"max_model_len": 96}})
    clock, observers = StepClock(), Observers(installed=False)
    observers.register(clock)
    stack = build_engine(resolve_parts(settings, leave_out=("frontend",)), observers=observers)
    stack.parts.registry = Registry(refs_with_swap_parts())
    engine = AsyncEngine(stack)
    engine.start()
    try:
        asyncio.run(_swap_under_load(engine, kind))
    finally:
        engine.shutdown()
    stack.engine.kv.check()
    assert [pool.num_used for pool in stack.engine.kv.pools] == [0 for _ in stack.engine.kv.pools]
    assert stack.engine._sampler.num_tracked == 0


async def _swap_under_load(engine: AsyncEngine, kind: str) -> None:
    expected = await asyncio.gather(*(answer(engine, number) for number in range(2 * STREAMS)))
    numbers = iter(range(10**9))
    is_over = False

    async def stream() -> int:
        done = 0
        while not is_over:
            number = next(numbers) % len(expected)
            assert await answer(engine, number) == expected[number], f"request {number} was changed by a swap"
            done += 1
        return done

    streams = [asyncio.create_task(stream()) for _ in range(STREAMS)]
    pauses: list[float] = []
    outcomes: list[str] = []
    for count in range(SWAPS):
        faults, good = FAULTS[kind], KINDS[kind]
        parts = faults[count // 5 % len(faults)] if count % 5 == 4 else good[count % len(good)]
        try:
            report = await engine.swap(load_settings(None, parts).parts, probation_steps=3)
        except DrivetrainError:
            assert count % 5 == 4, "a sound part was refused"
            outcomes.append("refused")
            continue
        outcomes.append(report.outcome.value)
        assert (report.outcome.value == "rolled back") == (count % 5 == 4), report.reason
        pauses.append(report.pause_seconds)
    is_over = True
    done = await asyncio.gather(*streams)
    assert sum(done) >= STREAMS
    assert outcomes.count("finalized") == SWAPS * 4 // 5
    assert max(pauses) < 0.05, f"the longest pause was {max(pauses) * 1000:.1f} ms"
