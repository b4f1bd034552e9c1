"""Rules of a request's life in the engine: how it ends, what is refused, what a fault may touch, what a step costs."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from drivetrain.config import EngineSettings
from drivetrain.contracts.plugin import PluginConfig
from drivetrain.contracts.scheduler import Grant, Limits, OrderKey, RequestFacts, Scheduler, StepPlan, View
from drivetrain.errors import EngineError, IllegalTransitionError, InvalidRequestError, PromptTooLongError
from drivetrain.observers import Observers, hookimpl
from drivetrain.serving.engine import Engine
from drivetrain.serving.request import _EDGES, Request, RequestState
from drivetrain.serving.types import FinishReason, GenerationRequest, SamplingParams
from support.fake_model import (
    END_TOKENS,
    VOCAB_SIZE,
    FakeClock,
    LetterDecoder,
    Run,
    add,
    expected_output,
    expected_tokens,
    fake_lm,
    finish,
    greedy,
    make_engine,
    piece,
    prompts,
)

torch.set_num_threads(1)

PROMPT = [5, 9, 12, 3, 3, 44, 60, 1, 17, 30]


@pytest.fixture(autouse=True)
def _no_log_of_injected_faults(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "drivetrain")


def run_one(prompt: Sequence[int], params: SamplingParams, **options: Any) -> Run:
    engine = make_engine(**options)
    add(engine, "a", prompt, params)
    return finish(engine)


# --- how a sequence ends ---------------------------------------------------------------------------------------------

TOKENS = expected_tokens(PROMPT, 54)
TEXT = "".join(map(piece, TOKENS))


@pytest.mark.parametrize("max_tokens", [1, 2, 54])
def test_length_ends_at_max_tokens(max_tokens: int) -> None:
    run = run_one(PROMPT, greedy(max_tokens))
    assert run.tokens["a", 0] == TOKENS[:max_tokens]
    assert (run.last["a", 0].finish_reason, run.text["a", 0]) == (FinishReason.LENGTH, TEXT[:max_tokens])


def test_without_max_tokens_the_context_is_the_end() -> None:
    run = run_one(PROMPT, greedy(None))
    assert run.tokens["a", 0] == TOKENS
    assert run.last["a", 0].finish_reason is FinishReason.LENGTH


def test_the_models_end_token_ends_and_is_no_text() -> None:
    prompt = next(p for p in prompts(200, 5) if END_TOKENS & set(expected_tokens(p, 10)[1:]))
    tokens = expected_tokens(prompt, 12)
    at = next(i for i, token in enumerate(tokens) if token in END_TOKENS)
    run = run_one(prompt, greedy(40, ignore_eos=False))
    assert run.tokens["a", 0] == tokens[: at + 1]
    assert run.text["a", 0] == "".join(map(piece, tokens[:at]))
    assert (run.last["a", 0].finish_reason, run.last["a", 0].stop_reason) == (FinishReason.STOP, None)
    assert len(run_one(prompt, greedy(40)).tokens["a", 0]) == 40  # ignore_eos


def test_a_stop_token_ends_and_is_named() -> None:
    run = run_one(PROMPT, greedy(40, stop_token_ids=[TOKENS[5]]))
    at = TOKENS.index(TOKENS[5])
    assert run.tokens["a", 0] == TOKENS[: at + 1]
    assert run.text["a", 0] == TEXT[:at]
    assert (run.last["a", 0].finish_reason, run.last["a", 0].stop_reason) == (FinishReason.STOP, TOKENS[5])


@pytest.mark.parametrize("include_stop", [True, False])
def test_a_stop_string_ends_and_is_named(include_stop: bool) -> None:
    stop = TEXT[6:9]
    run = run_one(PROMPT, greedy(40, stop=["never seen", stop], include_stop=include_stop))
    end = TEXT.index(stop) + 3
    assert run.text["a", 0] == TEXT[: end if include_stop else end - 3]
    assert run.tokens["a", 0] == TOKENS[:end]
    assert (run.last["a", 0].finish_reason, run.last["a", 0].stop_reason) == (FinishReason.STOP, stop)


@pytest.mark.parametrize("min_tokens", [1, 4, 12])
@pytest.mark.parametrize("ignore_eos", [True, False])
def test_before_min_tokens_nothing_ends_a_sequence(min_tokens: int, ignore_eos: bool) -> None:
    for prompt in prompts(30, 6):
        first = expected_tokens(prompt, 1)[0]
        params = greedy(12, min_tokens=min_tokens, ignore_eos=ignore_eos, stop_token_ids=[first], stop=["e", "ab"])
        run = run_one(prompt, params)
        expected = expected_output(prompt, params, max_model_len=64)
        assert (run.tokens["a", 0], run.text["a", 0]) == (expected.tokens, expected.text)
        assert len(expected.tokens) >= min_tokens
        assert run.last["a", 0].finish_reason is expected.reason


def test_end_tokens_may_be_chosen_early_when_they_end_nothing() -> None:
    prompt = next(p for p in prompts(400, 5) if expected_tokens(p, 1)[0] in END_TOKENS)
    params = greedy(5, min_tokens=5)
    assert run_one(prompt, params).tokens["a", 0] == expected_tokens(prompt, 5)


def test_each_sequence_ends_for_itself() -> None:
    engine = make_engine()
    params = SamplingParams(n=4, temperature=2.0, seed=1, max_tokens=30)
    add(engine, "a", PROMPT, params)
    run = finish(engine)
    assert {run.last["a", index].finish_reason for index in range(4)} == {FinishReason.STOP, FinishReason.LENGTH}


# --- time ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["waiting", "running", "held"])
def test_a_request_whose_time_runs_out_ends_and_keeps_what_it_has(phase: str) -> None:
    clock = FakeClock()
    engine = make_engine(clock=clock, max_running=1, max_batched_tokens=4)
    if phase == "waiting":
        add(engine, "first", PROMPT, greedy(20))
    add(engine, "a", PROMPT, greedy(20, n=2), timeout_seconds=5.0)
    run = Run()
    for _ in range(6 if phase == "running" else 1):
        run.add(engine.step())
    clock.advance(4.9)
    run.add(engine.step())
    assert not run.last
    clock.advance(0.1)
    run.add(engine.step())
    assert {run.last["a", index].finish_reason for index in range(2)} == {FinishReason.TIMEOUT}
    assert bool(run.tokens["a", 0]) == (phase == "running")
    assert run.tokens["a", 0] == TOKENS[: len(run.tokens["a", 0])]
    finish(engine, run)


def test_the_shorter_of_the_settings_time_limit_and_the_request_s_own_holds() -> None:
    clock = FakeClock()
    engine = make_engine(clock=clock, settings=EngineSettings(timeout_seconds=3.0))
    add(engine, "none", PROMPT, greedy(20))
    add(engine, "longer", PROMPT, greedy(20), timeout_seconds=60.0)
    add(engine, "shorter", PROMPT, greedy(20), timeout_seconds=1.0)
    run = Run()
    clock.advance(1.0)
    run.add(engine.step())
    assert run.last.keys() == {("shorter", 0)}
    clock.advance(2.0)
    run.add(engine.step())
    assert run.last.keys() == {("shorter", 0), ("none", 0), ("longer", 0)}
    finish(engine, run)


def test_the_deadline_of_an_ended_request_is_not_that_of_a_later_one_with_its_id() -> None:
    clock = FakeClock()
    engine = make_engine(clock=clock)
    add(engine, "a", PROMPT, greedy(1), timeout_seconds=5.0)
    finish(engine)
    add(engine, "a", PROMPT, greedy(20), timeout_seconds=50.0)
    clock.advance(10.0)
    assert finish(engine).last["a", 0].finish_reason is FinishReason.LENGTH


# --- states ----------------------------------------------------------------------------------------------------------


def test_every_move_that_no_edge_allows_raises() -> None:
    engine = make_engine()
    request = add(engine, "a", PROMPT, greedy(1))[0]
    for state in RequestState:
        for target in RequestState:
            request.state = state
            if target in _EDGES[state]:
                request.move(target)
                assert request.state is target
            else:
                with pytest.raises(IllegalTransitionError, match=rf"from {state} to {target}"):
                    request.move(target)


def test_observers_are_told_of_every_move_and_step() -> None:
    moves: list[tuple[str, str]] = []
    steps: list[int] = []

    class Watcher:
        @hookimpl
        def request_changed_state(self, request: Request, old: RequestState, new: RequestState) -> None:
            moves.append((old.value, new.value))

        @hookimpl
        def step_done(self, num_tokens: int) -> None:
            steps.append(num_tokens)

    observers = Observers(installed=False)
    observers.register(Watcher())
    engine = make_engine(observers=observers)
    add(engine, "a", PROMPT, greedy(2, n=2))
    finish(engine)
    assert moves == [
        ("waiting", "running"),
        ("held", "waiting"),
        ("waiting", "running"),
        ("running", "finished"),
        ("running", "finished"),
    ]
    assert steps == [10, 2, 1]


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "params", "error", "message"),
    [
        ([], {}, InvalidRequestError, "the prompt is empty"),
        ([1, VOCAB_SIZE], {}, InvalidRequestError, "token id 64 is outside the vocabulary"),
        ([1, -1], {}, InvalidRequestError, "token id -1 is outside the vocabulary"),
        ([1, True], {}, InvalidRequestError, "token id True is outside"),
        ([1, "2"], {}, InvalidRequestError, "token id '2' is outside"),
        ([1], {"stop_token_ids": [64]}, InvalidRequestError, "token id 64"),
        ([1], {"logit_bias": {64: 1.0}}, InvalidRequestError, "token id 64"),
        ([1] * 64, {}, PromptTooLongError, "the prompt has 64 tokens"),
        ([1] * 60, {"max_tokens": 5}, PromptTooLongError, "Set max_tokens to at most 4"),
    ],
)
def test_what_can_never_be_served_is_refused_and_leaves_nothing(
    prompt: list[Any], params: dict[str, Any], error: type[Exception], message: str
) -> None:
    engine = make_engine()
    with pytest.raises(error, match=message):
        add(engine, "a", prompt, SamplingParams(**{"max_tokens": 1, **params}))
    assert not engine.has_work
    assert (engine.num_running, engine.num_waiting) == (0, 0)


def test_an_id_under_way_is_refused() -> None:
    engine = make_engine()
    add(engine, "a", PROMPT, greedy(1))
    with pytest.raises(InvalidRequestError, match="under way"):
        add(engine, "a", PROMPT, greedy(1))
    finish(engine)
    add(engine, "a", PROMPT, greedy(1))
    finish(engine)


def test_the_longest_request_that_is_allowed_fits() -> None:
    for length in (1, 63):
        prompt = [3] * length
        run = run_one(prompt, greedy(None), num_blocks=[16, 6])
        assert len(run.tokens["a", 0]) == 64 - length


# --- faults ----------------------------------------------------------------------------------------------------------


def test_a_step_that_raises_ends_what_it_worked_on_and_nothing_else() -> None:
    engine = make_engine(max_running=2)
    for number, prompt in enumerate(prompts(4)):
        add(engine, f"r{number}", prompt, greedy(6))
    run = Run()
    run.add(engine.step())
    running = {name[:2] for name in engine.roster.running}
    fake_lm(engine).faults.error = RuntimeError("the device is on fire")
    run.add(engine.step())
    assert {key[0] for key, chunk in run.last.items()} == running
    assert all("RuntimeError: the device is on fire" in (chunk.error or "") for chunk in run.last.values())
    run = finish(engine, run)
    for number, prompt in enumerate(prompts(4)):
        if f"r{number}" not in running:
            assert run.tokens[f"r{number}", 0] == expected_tokens(prompt, 6)
    assert engine.metrics.snapshot()["failed_steps"] == 1


def test_after_a_step_that_raised_in_the_middle_of_a_fork_no_copy_is_left_over() -> None:
    engine = make_engine()
    add(engine, "a", PROMPT, greedy(8, n=3))
    engine.step()
    fake_lm(engine).faults.error = RuntimeError("injected")
    engine.step()
    assert not engine.has_work
    add(engine, "b", PROMPT, greedy(8, n=3))
    run = finish(engine)
    assert [run.tokens["b", index] for index in range(3)] == [expected_tokens(PROMPT, 8)] * 3


@pytest.mark.parametrize("row", [0, 1, 2])
def test_a_row_of_nan_ends_one_sequence(row: int) -> None:
    engine = make_engine(max_batched_tokens=32)
    for number, prompt in enumerate(prompts(3)):
        add(engine, f"r{number}", prompt, greedy(6))
    run = Run()
    run.add(engine.step())
    fake_lm(engine).faults.nan_row = row
    run = finish(engine, run)
    for number, prompt in enumerate(prompts(3)):
        last = run.last[f"r{number}", 0]
        if number == row:
            assert (last.finish_reason, run.tokens[f"r{number}", 0]) == (FinishReason.ERROR, expected_tokens(prompt, 1))
            assert "not finite" in (last.error or "")
        else:
            assert run.tokens[f"r{number}", 0] == expected_tokens(prompt, 6)


class BrokenDecoder(LetterDecoder):
    """Fails at its third token, or when it is asked for the rest."""

    def __init__(self, at: str) -> None:
        self.at = at
        self.num_tokens = 0

    def push(self, ids: Sequence[int]) -> str:
        self.num_tokens += len(ids)
        if self.at == "push" and self.num_tokens >= 3:
            raise ValueError("no such byte")
        return super().push(ids)

    def flush(self) -> str:
        if self.at == "flush":
            raise ValueError("no such byte")
        return ""


@pytest.mark.parametrize("at", ["push", "flush"])
@pytest.mark.parametrize("how", ["length", "cancel"])
@pytest.mark.parametrize("tokens_at_once", [1, 3, 32])
def test_text_that_can_not_be_decoded_ends_one_sequence(at: str, how: str, tokens_at_once: int) -> None:
    broken = [BrokenDecoder(at), LetterDecoder()]
    engine = make_engine(make_decoder=lambda prompt, skip: broken.pop(0))
    add(engine, "a", PROMPT, greedy(4))[0].chunk_tokens = tokens_at_once
    add(engine, "b", PROMPT, greedy(4))
    run = Run()
    if how == "cancel" and at == "flush":
        run.add(engine.step())
        run.add(engine.cancel("a"))
    run = finish(engine, run)
    assert run.last["a", 0].finish_reason is FinishReason.ERROR
    assert "ValueError: no such byte" in (run.last["a", 0].error or "")
    assert run.tokens["b", 0] == expected_tokens(PROMPT, 4)


def add_whole(engine: Engine, name: str, params: SamplingParams) -> Request:
    (sequence,) = engine.add(name, GenerationRequest(PROMPT, params, is_streamed=False), PROMPT)
    return sequence


def test_tokens_of_a_whole_answer_are_put_together() -> None:
    engine, expected = make_engine(num_blocks=128, max_model_len=128), expected_tokens(PROMPT, 70)
    add_whole(engine, "a", greedy(70, logprobs=1))
    add_whole(engine, "b", greedy(70, stop="no such text"))
    run = finish(engine)
    chunks = [chunk for chunk in run.chunks if chunk.request_id == "a"]
    assert [len(chunk.token_ids) for chunk in chunks] == [32, 32, 5, 1]
    assert [chunk.finish_reason for chunk in chunks] == [None, None, None, FinishReason.LENGTH]
    assert [entry.token_id for chunk in chunks for entry in chunk.logprobs or ()] == expected
    assert run.tokens["a", 0] == run.tokens["b", 0] == expected
    assert run.text["a", 0] == run.text["b", 0] == "".join(map(piece, expected))
    assert all(len(chunk.token_ids) == 1 for chunk in run.chunks if chunk.request_id == "b")


@pytest.mark.parametrize("how", ["cancel", "error"])
def test_what_ends_early_tells_of_all_tokens_it_has(how: str) -> None:
    engine, run = make_engine(), Run()
    add_whole(engine, "a", greedy(20))
    for _ in range(6):
        run.add(engine.step())
    assert not run.chunks
    run.add(engine.cancel("a") if how == "cancel" else engine.fail_all("all is lost"))
    assert run.tokens["a", 0] == expected_tokens(PROMPT, 6)
    assert run.text["a", 0] == "".join(map(piece, expected_tokens(PROMPT, 6)))
    assert run.last["a", 0].finish_reason is (FinishReason.CANCELLED if how == "cancel" else FinishReason.ERROR)


def test_a_chunk_is_of_one_epoch() -> None:
    """Other parts made what comes now: what they did not make is told apart."""
    engine = make_engine()
    add_whole(engine, "a", greedy(12))
    for _ in range(4):
        assert not engine.step()
    engine.epoch = 1
    run = finish(engine)
    assert [(len(chunk.token_ids), chunk.epoch) for chunk in run.chunks] == [(4, 0), (7, 1), (1, 1)]
    assert run.tokens["a", 0] == expected_tokens(PROMPT, 12)


def test_a_request_whose_decoder_can_not_be_made_is_not_taken() -> None:
    decoders: list[LetterDecoder] = [LetterDecoder(), LetterDecoder()]
    engine = make_engine(make_decoder=lambda prompt, skip: decoders.pop())
    with pytest.raises(IndexError):
        add(engine, "a", PROMPT, greedy(4, n=3))
    assert not engine.has_work
    assert engine.num_waiting == 0


class Planned(Scheduler):
    """Makes whatever plan it is given."""

    def __init__(self, make: Callable[[View], StepPlan]) -> None:
        super().__init__(PluginConfig())
        self.make = make

    def limits(self) -> Limits:
        return Limits(16, 2)

    def key(self, request: RequestFacts) -> OrderKey:
        return (request.sequence_number,)

    def plan(self, view: View) -> StepPlan:
        return self.make(view)


@pytest.mark.parametrize(
    ("plan", "problem"),
    [
        (StepPlan([]), "nothing is granted"),
        (StepPlan([Grant("b[0]", 9), Grant("b[0]", 1)]), "granted twice"),
        (StepPlan([Grant("a[0]", 1), Grant("b[0]", 9), Grant("c[0]", 9)]), "over max_batched_tokens 16"),
        (StepPlan([Grant("a[0]", 1), Grant("b[0]", 1), Grant("c[0]", 1)]), "more than max_running 2"),
        (StepPlan([Grant("x[0]", 1)]), "neither runs nor waits"),
        (StepPlan([Grant("a[0]", 1)], preempt=["b[0]"]), "preempted that does not run"),
        (StepPlan([Grant("a[0]", 1)], preempt=["a[0]"]), "preempted and granted"),
        (StepPlan([Grant("b[0]", 1)], preempt=["a[0]", "a[0]"]), "preempted twice"),
        (StepPlan([Grant("a[0]", 0)]), "less than one token"),
        (StepPlan([Grant("a[0]", -3)]), "less than one token"),
    ],
)
def test_a_plan_that_breaks_the_rules_is_an_error_that_names_the_scheduler(plan: StepPlan, problem: str) -> None:
    plans = [StepPlan([Grant("a[0]", 9)]), plan]
    engine = make_engine(Planned(lambda view: plans.pop(0)), max_running=2)
    for name, prompt in zip("abc", prompts(3), strict=True):
        add(engine, name, prompt, greedy(6))
    engine.step()
    with pytest.raises(EngineError, match=f"scheduler Planned made an impossible plan: .*{problem}"):
        engine.step()


def test_a_plan_that_can_only_stand_still_is_an_error() -> None:
    plans = [StepPlan([Grant("a[0]", 16)]), StepPlan([Grant("a[0]", 16)]), StepPlan([Grant("b[0]", 9)])]
    engine = make_engine(Planned(lambda view: plans.pop(0)), max_running=2, num_blocks=16, windows=(None,))
    add(engine, "a", [1] * 60, greedy(2))
    add(engine, "b", [2] * 60, greedy(2))
    engine.step()
    engine.step()
    engine.kv.pools[0]._blank.clear()  # as if others held them
    with pytest.raises(EngineError, match="made a plan that computes nothing"):
        engine.step()


def test_a_request_preempted_by_the_plan_comes_back_in_its_place() -> None:
    plans = {1: ["a[0]"], 2: ["b[0]"]}
    steps = iter(range(100))

    def make(view: View) -> StepPlan:
        preempt = plans.get(next(steps), [])
        running = [c for c in view.running if c.request_id not in preempt]
        waiting = [c for c, _ in zip(view.waiting, range(2 - len(running)), strict=False)]
        grants = [Grant(c.request_id, min(c.pending_tokens, 8)) for c in [*running, *waiting]]
        return StepPlan(grants, preempt)

    engine = make_engine(Planned(make), max_running=2)
    for name, prompt in zip("abc", prompts(3), strict=True):
        add(engine, name, prompt, greedy(6))
    run = finish(engine)
    for name, prompt in zip("abc", prompts(3), strict=True):
        assert run.tokens[name, 0] == expected_tokens(prompt, 6)


# --- cost ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", ["fcfs", "priority"])
@pytest.mark.parametrize("n", [1, 2])
def test_a_step_costs_the_same_whether_few_or_many_wait(scheduler: str, n: int) -> None:
    def engine_with(num_waiting: int) -> Any:
        engine = make_engine(scheduler, max_running=2)
        for number in range(num_waiting):
            add(engine, f"r{number}", [1, 2, 3], greedy(50, n=n))
        for _ in range(5):
            engine.step()
        return engine

    def seconds(engine: Any) -> float:
        started = time.perf_counter()
        engine.step()
        return time.perf_counter() - started

    few, many = engine_with(100), engine_with(20_000 // n)
    # In turns, so that whatever else the machine does falls on both.
    pairs = [(seconds(few), seconds(many)) for _ in range(40)]
    assert statistics.median(pair[1] for pair in pairs) < 3 * statistics.median(pair[0] for pair in pairs)


def test_cancelled_requests_do_not_pile_up_behind_one_that_waits() -> None:
    engine = make_engine(max_running=1)
    add(engine, "runs", PROMPT, greedy(54))
    add(engine, "waits", PROMPT, greedy(54))
    engine.step()
    for number in range(5000):
        add(engine, f"r{number}", [1], greedy(1))
        engine.cancel(f"r{number}")
    assert len(engine.roster.waiting._heap) < 200
    run = finish(engine)
    assert run.tokens["waits", 0] == TOKENS


# --- what is counted -------------------------------------------------------------------------------------------------


def test_metrics_count_what_happened() -> None:
    clock = FakeClock()
    engine = make_engine(clock=clock)
    for name in "ab":
        add(engine, name, PROMPT, greedy(5))
        while engine.has_work:
            clock.advance(0.5)
            engine.step()
    stats = engine.metrics.snapshot()
    assert (stats["requests"], stats["prompt_tokens"], stats["output_tokens"]) == (2, 20, 10)
    assert (stats["steps"], stats["computed_tokens"]) == (10, 10 + 4 + 2 + 4)
    assert (stats["prefix_hit_tokens"], stats["prefix_hit_rate"]) == (8, 8 / 20)
    assert stats["time_to_first_token_seconds"]["p50"] == 0.5
    assert stats["time_per_token_seconds"]["p99"] == 0.5
    assert (stats["running"], stats["waiting"], stats["kv_usage"]) == (0, 0, 0)
    assert stats["peak_kv_usage"] == pytest.approx(4 / 64)


def test_the_waiting_count_includes_siblings_that_wait_for_their_prompt() -> None:
    engine = make_engine(max_running=2)
    add(engine, "a", PROMPT, greedy(3, n=4))
    add(engine, "b", PROMPT, greedy(3))
    assert engine.num_waiting == 5
    engine.step()
    assert (engine.num_running, engine.num_waiting) == (2, 3)
    engine.cancel("a")
    engine.cancel("b")
    assert (engine.num_running, engine.num_waiting) == (0, 0)
    finish(engine)


def test_generation_request_ids_are_the_callers() -> None:
    engine = make_engine()
    sequences = engine.add("mine", GenerationRequest(PROMPT, greedy(1, n=2)), PROMPT)
    assert [sequence.name for sequence in sequences] == ["mine[0]", "mine[1]"]
    finish(engine)
