"""Rule: a step that is replayed in pieces, with its attention between them, gives what a plain one gives."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from drivetrain import LLM, SamplingParams, assembly
from drivetrain.config import EngineSettings
from drivetrain.contracts.source import silent
from drivetrain.errors import GraphCaptureError
from drivetrain.serving.engine import Engine
from drivetrain.serving.graphs import Capture, token_sizes
from drivetrain.serving.types import FinishReason
from support.captures import GraphSafeAttention, expect_the_same_blocks, outputs_of_many
from support.captures import Recorder as DecodeRecorder
from support.fake_model import WINDOWS, add, finish, greedy, make_engine, prompts
from support.tiny_models import save_tiny

torch.set_num_threads(1)
Between = Callable[[Callable[[], None]], None]


class Recorder:
    """A platform's capture of pieces: what was recorded runs again at each replay, with the work in its place."""

    def __init__(self, error: Exception | None = None) -> None:
        self.num_captured = self.num_replayed = self.num_between = 0
        self._error = error

    def __call__(self, function: Callable[[Between], None]) -> Callable[[], None]:
        if self._error is not None:
            raise self._error
        self.num_captured += 1
        function(lambda work: None)

        def between(work: Callable[[], None]) -> None:
            self.num_between += 1
            work()

        def replay() -> None:
            self.num_replayed += 1
            function(between)

        return replay


def make(
    recorder: Recorder | None,
    *,
    capture: Capture | None = None,
    overlap: str = "off",
    max_tokens: int = 40,
    must_capture: bool = False,
) -> Engine:
    return make_engine(
        num_blocks=60,
        max_running=6,
        max_batched_tokens=max_tokens,
        settings=EngineSettings(overlap=overlap),  # type: ignore[arg-type]
        attention=None if capture is None else GraphSafeAttention,
        captures={"capture": capture, "capture_pieces": recorder, "must_capture": must_capture},
    )


@pytest.mark.parametrize("overlap", ["off", "on"])
@pytest.mark.parametrize("max_tokens", [9, 16, 40])
def test_replayed_steps_give_what_plain_ones_give(max_tokens: int, overlap: str) -> None:
    recorder = Recorder()
    found = outputs_of_many(make(recorder, overlap=overlap, max_tokens=max_tokens))
    assert found == outputs_of_many(make(None, max_tokens=max_tokens))
    assert recorder.num_replayed > 5
    assert recorder.num_between == recorder.num_replayed * len(WINDOWS)
    assert recorder.num_captured <= len(token_sizes(max_tokens))


def test_a_size_is_captured_when_it_first_comes_and_once() -> None:
    recorder = Recorder()
    engine = make(recorder)
    seen = []
    for name, length in (("a", 9), ("b", 9), ("c", 20)):
        add(engine, name, next(prompts(1, length=length)), greedy(1))
        finish(engine)
        engine.drop_prefixes()
        seen.append((recorder.num_captured, recorder.num_replayed))
    assert seen == [(1, 1), (1, 2), (2, 3)]


def test_all_sizes_are_captured_ahead_and_none_later() -> None:
    recorder = Recorder()
    engine = make(recorder)
    told: list[tuple[int, int | None]] = []
    engine.runner.capture_ahead(lambda what, done, total, unit: told.append((done, total)))
    assert recorder.num_captured == len(token_sizes(40)) == 3
    assert told == [(done, 3) for done in range(4)]
    assert outputs_of_many(engine) == outputs_of_many(make(None))
    assert recorder.num_captured == 3


def test_rows_that_fill_up_a_size_touch_no_block_of_anybody() -> None:
    expect_the_same_blocks(make(Recorder()), make(None), 60)


def test_what_is_exchanged_is_captured_anew() -> None:
    recorder = Recorder()
    engine = make(recorder)
    runner = engine.runner
    for name, captured in (("a", 1), ("b", 1), ("c", 2), ("d", 2)):
        add(engine, name, next(prompts(1)), greedy(1))
        finish(engine)
        engine.drop_prefixes()
        assert recorder.num_captured == captured
        if name == "b":
            cache = runner.attention.allocate(runner.spec, runner.blocks_to_allocate([60, 60]), runner.device)
            runner.exchange(runner.model, runner.attention, cache, engine.kv)


def test_a_capture_that_fails_is_a_warning_or_an_error(caplog: pytest.LogCaptureFixture) -> None:
    error = RuntimeError("operation not permitted when stream is capturing")
    with caplog.at_level(logging.WARNING, "drivetrain"):
        engine = make(Recorder(error))
        tokens = outputs_of_many(engine)
    assert tokens == outputs_of_many(make(None))
    assert engine.metrics.snapshot()["fallbacks"] == 1
    assert [record.message for record in caplog.records if "not permitted" in record.message]
    caplog.set_level(logging.CRITICAL, "drivetrain")
    engine = make(Recorder(error), must_capture=True)
    add(engine, "a", next(prompts(1)), greedy(3))
    last = finish(engine).last["a", 0]
    assert last.finish_reason is FinishReason.ERROR
    assert GraphCaptureError.__name__ in (last.error or "")
    with pytest.raises(GraphCaptureError, match="not permitted"):
        make(Recorder(error), must_capture=True).runner.capture_ahead(silent)
    engine = make(Recorder(error))
    engine.runner.capture_ahead(silent)
    assert engine.metrics.snapshot()["fallbacks"] == 1


def test_where_decode_steps_cannot_be_captured_nothing_else_is_tried() -> None:
    """But decode steps are, where others can't be."""

    def fail(function: object) -> Callable[[], None]:
        raise RuntimeError("not permitted")

    pieces = Recorder()
    engine = make(pieces, capture=fail)
    engine.runner.capture_ahead(silent)
    assert pieces.num_captured == 0
    decodes = DecodeRecorder()
    engine = make(Recorder(RuntimeError("not permitted")), capture=decodes)
    engine.runner.capture_ahead(silent)
    assert outputs_of_many(engine) == outputs_of_many(make(None))
    assert decodes.num_replayed > 5
    assert engine.metrics.snapshot()["fallbacks"] == 1


def test_both_kinds_of_steps_are_replayed_in_one_engine() -> None:
    pieces, decodes = Recorder(), DecodeRecorder()
    assert outputs_of_many(make(pieces, capture=decodes, overlap="on")) == outputs_of_many(make(None))
    assert pieces.num_replayed > 2
    assert decodes.num_replayed > 5


@pytest.mark.parametrize(
    ("most", "sizes"),
    [
        (1, [1]),
        (16, [16]),
        (100, [16, 32, 64, 100]),
        (900, [16, 32, 64, 128, 192, 256, 320, 384, 448, 512, 640, 768, 896, 900]),
    ],
)
def test_sizes_reach_the_most_that_a_step_may_have(most: int, sizes: list[int]) -> None:
    assert token_sizes(most) == sizes


# --- a whole engine with real parts ----------------------------------------------------------------------------------

PROMPTS: Sequence[list[int]] = [[5 + n % 90 for n in range(start, start + length)] for start, length in
                                ((0, 9), (3, 40), (11, 17), (0, 30), (29, 3), (50, 33), (7, 21))]  # fmt: skip
GREEDY = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("models") / "gemma3"
    save_tiny("gemma3", made)
    return made


def served(folder: Path, **parts: Any) -> list[list[int]]:
    scheduler = {"name": "fcfs", "max_running": 4, "max_batched_tokens": 24}
    engine = {"max_model_len": 64, "kv_memory": "8MiB"}
    with LLM(folder, precision="fp32", scheduler=scheduler, engine=engine, **parts) as llm:
        first = [list(result.token_ids) for result in llm.generate(list(PROMPTS), GREEDY)]
        assert [list(result.token_ids) for result in llm.generate(list(PROMPTS), GREEDY)] == first
        assert llm.stats()["fallbacks"] == 0
    return first


@pytest.mark.parametrize(
    ("attention", "kv"),
    [("sdpa", "none"), ("sdpa", "int8"), ("paged-cpu", "none"), ("paged-cpu", "int8"), ("flex", "none")],
)
def test_every_backend_attends_between_the_pieces(
    folder: Path, monkeypatch: pytest.MonkeyPatch, attention: str, kv: str
) -> None:
    """Windows of their own for some layers, keys written by the model or by the backend, prefixes found again."""
    parts: dict[str, Any] = {"attention": attention, "kernels": "reference"}
    if kv != "none":
        parts["quantizer"] = {"name": "none", "kv": kv}
    plain = served(folder, **parts)
    recorder = Recorder()
    monkeypatch.setattr(assembly, "_capture_pieces", lambda parts: recorder)
    assert served(folder, **parts) == plain
    assert recorder.num_replayed > 8
