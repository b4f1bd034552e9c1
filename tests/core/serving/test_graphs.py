"""Rule: a captured decode step gives what a plain one gives, from buffers that stay where they are."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import pytest
import torch

from drivetrain.config import EngineSettings
from drivetrain.contracts.source import silent
from drivetrain.errors import GraphCaptureError
from drivetrain.serving.engine import Engine
from drivetrain.serving.graphs import captured_sizes, why_no_graphs
from drivetrain.serving.types import FinishReason
from support.captures import GraphSafeAttention, Recorder, expect_the_same_blocks
from support.fake_model import FakeAttention, add, finish, greedy, make_engine, prompts

torch.set_num_threads(1)


def make(
    capture: Recorder | None,
    *,
    max_running: int = 6,
    overlap: str = "off",
    attention: type[FakeAttention] = GraphSafeAttention,
    must_capture: bool = False,
    num_blocks: Sequence[int] = (40, 40),
) -> Engine:
    return make_engine(
        num_blocks=num_blocks,
        max_running=max_running,
        settings=EngineSettings(overlap=overlap),  # type: ignore[arg-type]
        attention=attention,
        captures={"capture": capture, "must_capture": must_capture},
    )


def outputs(engine: Engine, count: int = 9) -> dict[tuple[str, int], list[int]]:
    for number, prompt in enumerate(prompts(count, length=7)):
        add(engine, f"r{number}", prompt, greedy(5 + 3 * (number % 4)))
    tokens = finish(engine).tokens
    engine.close()
    return tokens


@pytest.mark.parametrize("overlap", ["off", "on"])
@pytest.mark.parametrize("max_running", [1, 3, 6, 9])
def test_captured_steps_give_what_plain_ones_give(max_running: int, overlap: str) -> None:
    recorder = Recorder()
    engine = make(recorder, max_running=max_running, overlap=overlap)
    assert outputs(engine) == outputs(make(None, max_running=max_running))
    assert recorder.num_replayed > 5
    assert recorder.num_captured <= len(captured_sizes(max_running))


def test_a_size_is_captured_once_and_prompts_are_not_replayed() -> None:
    recorder = Recorder()
    engine = make(recorder)
    add(engine, "a", next(prompts(1)), greedy(12))
    finish(engine)
    assert (recorder.num_captured, recorder.num_replayed) == (1, 11)
    add(engine, "b", next(prompts(1)), greedy(12))
    finish(engine)
    assert recorder.num_captured == 1


def test_rows_that_fill_up_a_size_touch_no_block_of_anybody() -> None:
    """Their block is one more than the books know: every block of a sequence is as a plain run leaves it."""
    expect_the_same_blocks(make(Recorder()), make(None), 40)


def test_what_is_exchanged_is_captured_anew() -> None:
    recorder = Recorder()
    engine = make(recorder)
    add(engine, "a", next(prompts(1)), greedy(6))
    finish(engine)
    runner = engine.runner
    runner.exchange(runner.model, runner.attention, runner.cache, engine.kv)
    add(engine, "b", next(prompts(1)), greedy(6))
    finish(engine)
    assert recorder.num_captured == 1, "nothing was exchanged"
    cache = runner.attention.allocate(runner.spec, runner.blocks_to_allocate([40, 40]), runner.device)
    engine.drop_prefixes()
    runner.exchange(runner.model, runner.attention, cache, engine.kv)
    add(engine, "c", next(prompts(1)), greedy(6))
    assert finish(engine).tokens["c", 0] == outputs_of_one()
    assert recorder.num_captured == 2


def outputs_of_one() -> list[int]:
    engine = make_engine()
    add(engine, "c", next(prompts(1)), greedy(6))
    return finish(engine).tokens["c", 0]


def test_a_capture_that_fails_is_a_warning_and_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder(RuntimeError("operation not permitted when stream is capturing"))
    with caplog.at_level(logging.WARNING, "drivetrain"):
        engine = make(recorder)
        tokens = outputs(engine)
    assert tokens == outputs(make(None))
    assert engine.metrics.snapshot()["fallbacks"] == 1
    assert [record.message for record in caplog.records if "not permitted" in record.message]


def test_a_capture_that_was_asked_for_and_fails_ends_the_request(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "drivetrain")
    engine = make(Recorder(RuntimeError("no")), must_capture=True)
    add(engine, "a", next(prompts(1)), greedy(6))
    last = finish(engine).last["a", 0]
    assert last.finish_reason is FinishReason.ERROR
    assert GraphCaptureError.__name__ in (last.error or "")


def test_only_a_platform_that_captures_with_a_backend_that_claims_it_takes_part() -> None:
    recorder = Recorder()
    assert why_no_graphs(None, GraphSafeAttention(4)) == "the platform captures no graphs"
    assert "graph_safe" in (why_no_graphs(recorder, FakeAttention(4)) or "")
    assert why_no_graphs(recorder, GraphSafeAttention(4)) is None
    outputs(make(recorder, attention=FakeAttention))
    assert recorder.num_captured == 0


def test_no_step_has_more_sequences_than_tokens() -> None:
    """So a scheduler that lets any number run has no steps captured that can't come."""
    recorder = Recorder()
    engine = make(recorder, max_running=10**6)
    engine.runner.capture_ahead(silent)
    assert recorder.num_captured == len(captured_sizes(16))
    assert outputs(engine) == outputs(make(None, max_running=10**6))


def test_all_sizes_are_captured_ahead_and_none_later() -> None:
    recorder = Recorder()
    engine = make(recorder)
    told: list[tuple[str, int, int | None]] = []
    engine.runner.capture_ahead(lambda what, done, total, unit: told.append((what, done, total)))
    assert recorder.num_captured == len(captured_sizes(6)) == 4
    captured, computed = "capturing steps by sequences", "computing steps that are not captured"
    assert told == [*((captured, done, 4) for done in range(5)), *((computed, done, 1) for done in range(2))]
    assert outputs(engine) == outputs(make(None))
    assert recorder.num_captured == 4


def test_a_capture_that_fails_ahead_is_a_warning_or_an_error(caplog: pytest.LogCaptureFixture) -> None:
    error = RuntimeError("not permitted")
    engine = make(Recorder(error))
    with caplog.at_level(logging.WARNING, "drivetrain"):
        engine.runner.capture_ahead(silent)
    assert engine.metrics.snapshot()["fallbacks"] == 1
    assert outputs(engine) == outputs(make(None))
    with pytest.raises(GraphCaptureError, match="not permitted"):
        make(Recorder(error), must_capture=True).runner.capture_ahead(silent)


@pytest.mark.parametrize(
    ("max_running", "sizes"),
    [
        (1, [1]),
        (2, [1, 2]),
        (3, [1, 2, 4]),
        (8, [1, 2, 4, 8]),
        (9, [1, 2, 4, 8, 16]),
        (30, [1, 2, 4, 8, 16, 24, 32]),
        (250, [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256]),
    ],
)
def test_sizes_reach_the_most_that_may_run(max_running: int, sizes: list[int]) -> None:
    assert captured_sizes(max_running) == sizes
