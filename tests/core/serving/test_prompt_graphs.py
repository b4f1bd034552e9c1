"""Rule: a step with prompts that is captured whole gives what a plain one gives, however its tokens are divided."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import pytest
import torch

from drivetrain.config import EngineSettings
from drivetrain.contracts.attention import AttentionBatch
from drivetrain.contracts.source import silent
from drivetrain.errors import GraphCaptureError
from drivetrain.serving import graphs, runner
from drivetrain.serving.engine import Engine
from drivetrain.serving.graphs import captured_sizes, token_sizes
from drivetrain.serving.types import FinishReason
from support.captures import (
    GraphSafeAttention,
    PromptSafeAttention,
    Recorder,
    expect_the_same_blocks,
    outputs_of_many,
)
from support.fake_model import FakeAttention, add, finish, greedy, make_engine, prompts

torch.set_num_threads(1)
MAX_RUNNING = 6


def no_pieces(function: object) -> Callable[[], None]:
    raise AssertionError("captured in pieces what can be captured whole")


def make(
    recorder: Recorder | None,
    *,
    attention: type[FakeAttention] = PromptSafeAttention,
    overlap: str = "off",
    max_tokens: int = 40,
    num_blocks: Sequence[int] = (60, 60),
    must_capture: bool = False,
) -> Engine:
    captures = {"capture": recorder, "capture_pieces": recorder and no_pieces, "must_capture": must_capture}
    return make_engine(
        num_blocks=num_blocks,
        max_running=MAX_RUNNING,
        max_batched_tokens=max_tokens,
        settings=EngineSettings(overlap=overlap),  # type: ignore[arg-type]
        attention=attention,
        captures=captures,
    )


@pytest.mark.parametrize("overlap", ["off", "on"])
@pytest.mark.parametrize(("max_tokens", "num_blocks"), [(9, (60, 60)), (16, (24, 24)), (40, (60, 60))])
def test_replayed_steps_give_what_plain_ones_give(max_tokens: int, num_blocks: tuple[int, int], overlap: str) -> None:
    """With prompts cut in chunks, prefixes found again, and requests preempted where blocks are few."""
    recorder = Recorder()
    engine = make(recorder, overlap=overlap, max_tokens=max_tokens, num_blocks=num_blocks)
    assert outputs_of_many(engine) == outputs_of_many(
        make(None, attention=FakeAttention, max_tokens=max_tokens, num_blocks=num_blocks)
    )
    assert recorder.num_replayed > 10
    assert recorder.num_captured <= len(token_sizes(max_tokens)) + len(captured_sizes(MAX_RUNNING))
    if num_blocks[0] < 60:
        assert engine.metrics.snapshot()["preemptions"] > 0


def test_every_step_of_a_size_has_as_many_sequences_and_tokens() -> None:
    """So that whatever is launched for the first is right for all."""
    engine = make(Recorder())
    outputs_of_many(engine)
    attention = engine.runner.attention
    assert isinstance(attention, PromptSafeAttention)

    def shape(batch: AttentionBatch) -> tuple[object, ...]:
        tensors = (batch.query_starts, batch.kv_lengths, *batch.block_tables, *batch.slots)
        return batch.num_sequences, tuple((x.data_ptr(), x.shape) for x in tensors)

    shapes: dict[int, set[tuple[object, ...]]] = {}
    for batch in attention.batches:
        shapes.setdefault(batch.num_tokens, set()).add(shape(batch))
    assert {size: len(found) for size, found in shapes.items()} == {16: 1, 32: 1, 40: 1}
    assert {batch.num_sequences for batch in attention.batches} == {MAX_RUNNING + 1}


def test_all_sizes_are_captured_ahead_and_none_later() -> None:
    recorder = Recorder()
    engine = make(recorder)
    told: list[tuple[str, int, int | None]] = []
    engine.runner.capture_ahead(lambda what, done, total, unit: told.append((what, done, total)))
    assert recorder.num_captured == len(token_sizes(40)) + len(captured_sizes(MAX_RUNNING)) == 7
    assert told[-4:] == [("capturing steps by tokens", done, 3) for done in range(4)]
    assert outputs_of_many(engine) == outputs_of_many(make(None))
    assert recorder.num_captured == 7


class _Noting(PromptSafeAttention):
    """Keeps which steps were launched as they are."""

    def begin(self, spec, batch, cache):  # type: ignore[no-untyped-def]
        if not batch.is_open and batch.num_tokens > batch.num_sequences:
            launched.append(batch.num_tokens)
        return super().begin(spec, batch, cache)


launched: list[int] = []


@pytest.mark.parametrize(
    ("max_tokens", "captures_prompts", "sizes"),
    [(100, True, [64, 100]), (32, True, []), (64, True, [64]), (40, False, [16, 32, 40])],
)
def test_steps_that_are_not_captured_are_computed_ahead(
    monkeypatch: pytest.MonkeyPatch, max_tokens: int, captures_prompts: bool, sizes: list[int]
) -> None:
    """So that what kernels compile or measure on first use does not keep a request waiting. No block of anybody is
    touched."""
    for module in (graphs, runner):
        monkeypatch.setattr(module, "MOST_TOKENS", 32)
    monkeypatch.setattr(runner, "can_capture_prompts", lambda attention: captures_prompts)
    captures = {"capture": Recorder()}
    engine = make_engine(attention=_Noting, max_batched_tokens=max_tokens, captures=captures, max_running=MAX_RUNNING)
    launched.clear()
    told: list[tuple[str, int, int | None]] = []
    engine.runner.capture_ahead(lambda what, done, total, unit: told.append((what, done, total)))
    assert launched == sizes
    assert [one for one in told if "not captured" in one[0]] == [
        ("computing steps that are not captured", done, len(sizes)) for done in range(len(sizes) + 1) if sizes
    ]
    assert all(torch.isnan(layer[:-1]).all() for layer in engine.runner.cache)


def test_a_step_that_finds_no_memory_is_told_and_the_server_starts(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_memory(*arguments: object) -> None:
        raise torch.OutOfMemoryError("2 GiB more than there are")

    engine = make_engine(attention=PromptSafeAttention, max_batched_tokens=2000, captures={"capture": Recorder()})
    monkeypatch.setattr(engine.runner, "_compute_nobodys", no_memory)
    with caplog.at_level(logging.WARNING, "drivetrain"):
        engine.runner.capture_ahead(silent)
    (record,) = caplog.records
    assert record.message == (
        "there is too little memory for a step of 2000 tokens, which will fail: lower scheduler.max_batched_tokens "
        "(2 GiB more than there are)"
    )


def test_tokens_and_sequences_that_fill_up_a_size_touch_no_block_of_anybody() -> None:
    expect_the_same_blocks(make(Recorder()), make(None), 60)


def test_what_is_captured_follows_the_attention_that_is_swapped_in() -> None:
    """Whole, then in pieces for one that does not claim it, then whole again."""
    pieces: list[str] = []

    def capture_pieces(function: Callable[..., None]) -> Callable[[], None]:
        pieces.append("captured")
        return lambda: function(lambda work: work())

    recorder = Recorder()
    engine = make(recorder)
    runner = engine.runner
    runner._capture_pieces = capture_pieces
    seen = []
    for name, attention in (("a", PromptSafeAttention), ("b", GraphSafeAttention), ("c", PromptSafeAttention)):
        backend = attention(4)
        cache = backend.allocate(runner.spec, runner.blocks_to_allocate([60, 60]), runner.device)
        engine.drop_prefixes()
        runner.exchange(runner.model, backend, cache, engine.kv)
        before = recorder.num_captured
        add(engine, name, next(prompts(1)), greedy(1))
        finish(engine)
        seen.append((recorder.num_captured - before, len(pieces)))
    assert seen == [(1, 0), (0, 1), (1, 1)]


def test_a_capture_that_fails_is_a_warning_or_an_error(caplog: pytest.LogCaptureFixture) -> None:
    error = RuntimeError("operation not permitted when stream is capturing")
    with caplog.at_level(logging.WARNING, "drivetrain"):
        engine = make(Recorder(error))
        tokens = outputs_of_many(engine)
    assert tokens == outputs_of_many(make(None))
    assert [record.message for record in caplog.records if "not permitted" in record.message]
    caplog.set_level(logging.CRITICAL, "drivetrain")
    engine = make(Recorder(error), must_capture=True)
    add(engine, "a", next(prompts(1)), greedy(3))
    last = finish(engine).last["a", 0]
    assert last.finish_reason is FinishReason.ERROR
    assert GraphCaptureError.__name__ in (last.error or "")
    with pytest.raises(GraphCaptureError, match="not permitted"):
        make(Recorder(error), must_capture=True).runner.capture_ahead(silent)
