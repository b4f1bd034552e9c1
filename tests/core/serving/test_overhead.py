"""Rule: what a step costs beside the model does not grow with how many requests wait, nor with how long they are.

Calls of Python and of C functions are counted, not seconds, so that a busy machine does not decide;
``tests/benchmarks/engine_overhead.py`` has the seconds.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from drivetrain.config import EngineSettings
from drivetrain.serving.engine import Engine
from drivetrain.serving.types import GenerationRequest
from support.fake_model import add, greedy, make_engine

torch.set_num_threads(1)

PROMPT = [1, 2, 3]
FEW, MANY = 100, 20_000


def calls(work: Callable[[], Any], kinds: tuple[str, ...] = ("call", "c_call")) -> int:
    """How many functions are called, of Python and of C. The garbage collector, whose hooks are calls too, waits."""
    count = 0

    def note(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in kinds

    gc.disable()
    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
        gc.enable()
    return count


def busy(num_waiting: int, scheduler: str = "fcfs") -> Engine:
    engine = make_engine(
        scheduler, windows=(None,), num_blocks=600, max_running=8, max_batched_tokens=16, max_model_len=2000
    )
    for number in range(8):
        add(engine, f"r{number}", PROMPT, greedy(200))
    for _ in range(8):
        engine.step()
    for number in range(num_waiting):
        add(engine, f"w{number}", PROMPT, greedy(4))
    return engine


@pytest.mark.parametrize("scheduler", ["fcfs", "priority"])
def test_a_step_makes_as_many_calls_whatever_waits(scheduler: str) -> None:
    """Also a step in which one that waits takes the place of one that ends."""
    counts = []
    for num_waiting in (FEW, MANY):
        engine = busy(num_waiting, scheduler)
        steady = [calls(engine.step) for _ in range(10)]
        engine.cancel("r3")
        counts.append((steady, calls(engine.step), calls(lambda engine=engine: engine.cancel("w50"))))  # type: ignore[misc]
    few, many = counts
    assert many[0] == few[0]
    # The heap is deeper: its comparisons grow with the logarithm.
    assert many[1] <= few[1] + 40
    assert many[2] <= few[2] + 40


def test_taking_a_request_makes_as_many_calls_whatever_waits() -> None:
    few, many = busy(FEW), busy(MANY)
    assert calls(lambda: add(many, "new", PROMPT, greedy(4))) == calls(lambda: add(few, "new", PROMPT, greedy(4)))


def test_a_step_makes_as_many_calls_however_long_its_sequences_are() -> None:
    engine = busy(0)
    early = [calls(engine.step) for _ in range(32)]
    for _ in range(96):
        engine.step()
    late = [calls(engine.step) for _ in range(32)]
    assert sorted(late) == sorted(early)


def calls_of_one(is_streamed: bool) -> float:
    """Functions of Python that a decode step calls for each running request, those of the model aside: it has a thread
    of its own."""
    counts = []
    for num_running in (8, 40):
        engine = make_engine(
            windows=(None,),
            num_blocks=40 * 30,
            max_running=num_running,
            max_batched_tokens=num_running,
            max_model_len=2000,
            settings=EngineSettings(overlap="on"),
        )
        for number in range(num_running):
            request = GenerationRequest([number, 2, 3], greedy(100), is_streamed=is_streamed)
            engine.add(f"r{number}", request, [number, 2, 3])
        for _ in range(10):
            engine.step()
        # Some steps fill a block, or a chunk.
        counts.append(sum(calls(engine.step, ("call",)) for _ in range(32)) / 32)
        engine.cancel_all()
        engine.close()
    return (counts[1] - counts[0]) / 32


def test_a_request_costs_a_step_few_calls() -> None:
    """What a step costs for each of hundreds of requests is what a fast device waits for."""
    streamed, whole = calls_of_one(is_streamed=True), calls_of_one(is_streamed=False)
    assert whole < 17
    assert streamed < 21
