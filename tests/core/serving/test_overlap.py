"""Rule: the overlapped loop gives what the plain loop gives, whatever is asked, cancelled, short of room or broken."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import rule, run_state_machine_as_test

from core.serving.test_engine_machine import CONFIGURATIONS, MAX_MODEL_LEN, EngineMachine
from drivetrain.config import EngineSettings
from drivetrain.serving.engine import Engine, overlaps
from drivetrain.serving.lane import InlineLane, Outcome, ThreadLane
from drivetrain.serving.types import FinishReason, SamplingParams
from support.fake_model import FakeClock, Run, add, fake_lm, finish, greedy, make_engine, prompts

torch.set_num_threads(1)

OVERLAP = EngineSettings(overlap="on")
LANES = {"thread": ThreadLane, "inline": InlineLane}
EXAMPLES = {"thread": 4, "inline": 15}
"""Handing steps to a thread takes long on a busy machine, and the logic is the same."""


@pytest.fixture(autouse=True)
def no_log_of_injected_faults(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "drivetrain")


@pytest.fixture(params=LANES)
def lane(request: pytest.FixtureRequest) -> str:
    return str(request.param)


_open: list[Engine] = []


@pytest.fixture(autouse=True)
def engines_are_closed() -> Iterator[None]:
    yield
    while _open:
        _open.pop().close()


def overlapped(lane: str = "thread", **options: Any) -> Engine:
    engine = make_engine(settings=options.pop("settings", OVERLAP), **options)
    if lane == "inline":  # as on a device that queues its work
        engine._lane = InlineLane()
    _open.append(engine)
    return engine


def ahead(engine: Engine) -> bool:
    return not engine.is_settled


# --- any mix of events, against the model in plain Python ------------------------------------------------------------


class OverlappedMachine(EngineMachine):
    """The machine of the plain engine: every rule and invariant of it holds with a step under way, too."""

    lane = "thread"

    def __init__(self) -> None:
        super().__init__()
        plain = self.engine
        options = {"max_running": 6, "max_batched_tokens": 8, **self.options}
        self.engine = overlapped(self.lane, **options, max_model_len=MAX_MODEL_LEN, clock=self.clock)
        assert not plain.has_work

    @rule()
    def the_loop_is_settled(self) -> None:
        self.receive(self.engine.settle())
        assert self.engine.is_settled

    @rule()
    def a_step_breaks(self) -> None:
        """With a step under way, the fault may hit the step behind it, whose end is told one step later."""
        lm = fake_lm(self.engine)
        lm.faults.error = RuntimeError("injected")
        live = {s.name for s in self.engine.roster if not s.is_finished}
        chunks = self.engine.step() + self.engine.settle()
        was_reached, lm.faults.error = lm.faults.error is None, None
        self.receive(chunks)
        ended = [chunk for chunk in chunks if chunk.finish_reason is FinishReason.ERROR]
        assert all("RuntimeError: injected" in (chunk.error or "") for chunk in ended)
        if not was_reached:
            assert not ended
        names = {f"{chunk.request_id}[{chunk.index}]" for chunk in ended}
        others = {s.name for s in self.engine.roster if not s.is_finished}
        finished = {f"{c.request_id}[{c.index}]" for c in chunks if c.finish_reason is not None}
        assert others == live - finished
        assert names <= live

    @rule(row=st.integers(0, 7))
    def a_row_is_nan(self, row: int) -> None:
        fake_lm(self.engine).faults.nan_row = row
        chunks = self.engine.step() + self.engine.settle()
        fake_lm(self.engine).faults.nan_row = None
        wrong = [chunk for chunk in chunks if chunk.finish_reason is FinishReason.ERROR]
        assert len(wrong) <= 1
        assert all("not finite" in (chunk.error or "") for chunk in wrong)
        self.receive(chunks)

    def teardown(self) -> None:
        try:
            super().teardown()
        finally:
            self.engine.close()
            _open.remove(self.engine)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_any_mix_of_events_keeps_the_books_and_the_outputs(name: str, lane: str) -> None:
    machine = type("Machine", (OverlappedMachine,), {"options": CONFIGURATIONS[name], "lane": lane})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=EXAMPLES[lane], stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


# --- every setting, against the plain loop ---------------------------------------------------------------------------

SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "drawn": {"temperature": 1.3, "seed": 7},
    "top_k": {"temperature": 1.0, "seed": 3, "top_k": 5},
    "top_p": {"temperature": 1.0, "seed": 4, "top_p": 0.6},
    "min_p": {"temperature": 2.0, "seed": 5, "min_p": 0.05},
    "several": {"temperature": 1.0, "seed": 6, "n": 3},
    "repetition": {"temperature": 0.0, "repetition_penalty": 1.5},
    "frequency": {"temperature": 0.7, "seed": 8, "frequency_penalty": 0.9},
    "presence": {"temperature": 0.0, "presence_penalty": 1.2},
    "bias": {"temperature": 0.0, "logit_bias": {5: 4.0, 9: -3.0}},
    "at least": {"temperature": 0.0, "min_tokens": 6, "stop_token_ids": (8, 27)},
    "stop tokens": {"temperature": 1.0, "seed": 9, "stop_token_ids": (8, 27, 2)},
    "stop strings": {"temperature": 1.0, "seed": 10, "stop": ("cb", "w"), "include_stop": True},
    "end tokens": {"temperature": 1.0, "seed": 11, "ignore_eos": False},
    "logprobs": {"temperature": 1.0, "seed": 12, "logprobs": 3},
    "prompt logprobs": {"temperature": 0.0, "prompt_logprobs": 2},
    "one token": {"temperature": 0.0, "max_tokens": 1},
}


def params_named(name: str) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 12, "ignore_eos": True, **SETTINGS[name]})


def everything(engine: Engine, names: Sequence[str]) -> Run:
    run = Run()
    for number, (name, prompt) in enumerate(zip(names, prompts(len(names)), strict=True)):
        add(engine, f"r{number}", prompt, params_named(name))
    return finish(engine, run)


def assert_equal_but_for_times(fast: Run, plain: Run) -> None:
    assert fast.tokens == plain.tokens
    assert fast.text == plain.text
    assert fast.last.keys() == plain.last.keys()
    for key, last in plain.last.items():
        other = fast.last[key]
        assert (other.finish_reason, other.stop_reason) == (last.finish_reason, last.stop_reason)
    logprobs = [
        {key: [c.logprobs for c in run.chunks if (c.request_id, c.index) == key] for key in run.last}
        for run in (fast, plain)
    ]
    assert logprobs[0] == logprobs[1]


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_alone_gives_the_same_in_both_loops(name: str, lane: str) -> None:
    assert_equal_but_for_times(everything(overlapped(lane), [name] * 3), everything(make_engine(), [name] * 3))


@pytest.mark.parametrize(
    "options", [{}, {"num_blocks": 17}, {"max_running": 3}, {"scheduler": "priority", "num_blocks": 18}]
)
def test_all_settings_together_give_the_same_in_both_loops(lane: str, options: dict[str, Any]) -> None:
    names = list(SETTINGS)
    assert_equal_but_for_times(
        everything(overlapped(lane, **options), names), everything(make_engine(**options), names)
    )


def test_prompt_logprobs_are_the_same_in_both_loops(lane: str) -> None:
    found = []
    for engine in (overlapped(lane), make_engine()):
        sequences = add(engine, "a", next(prompts(1)), params_named("prompt logprobs"))
        finish(engine)
        found.append(engine.prompt_info(sequences))
    assert found[0] == found[1]


# --- what runs ahead, and what does not ------------------------------------------------------------------------------


def steps_ahead(engine: Engine) -> list[bool]:
    """For each step until the end: was the next one launched before it was collected?"""
    flags = []
    while engine.has_work:
        engine.step()
        flags.append(ahead(engine))
    return flags


def test_in_steady_decode_every_step_is_launched_before_the_last_is_read(lane: str) -> None:
    engine = overlapped(lane)
    add(engine, "a", next(prompts(1)), greedy(10))
    assert steps_ahead(engine) == [True] * 9 + [False]
    assert len(fake_lm(engine).tokens_per_step) == 10  # and none is computed in vain


def test_a_sequence_at_its_last_token_holds_up_nobody(lane: str) -> None:
    """It alone takes no part in the next step, which is launched all the same."""
    engine = overlapped(lane)
    for number, prompt in enumerate(prompts(6)):
        add(engine, f"r{number}", prompt, greedy(2 + number))
    flags = steps_ahead(engine)
    first = flags.index(True)
    assert flags[first:] == [True] * (len(flags) - first - 1) + [False]
    assert sum(fake_lm(engine).tokens_per_step) == sum(len(p) + 1 + n for n, p in enumerate(prompts(6)))


@pytest.mark.parametrize("name", ["repetition", "logprobs", "bias", "prompt logprobs"])
def test_a_step_whose_scores_the_host_must_see_runs_plain(name: str, lane: str) -> None:
    engine = overlapped(lane)
    add(engine, "a", [1, 2, 3], params_named(name))
    flags = steps_ahead(engine)
    assert not any(flags[:1] if name == "prompt logprobs" else flags)


def test_a_sequence_that_ends_by_a_stop_has_one_step_computed_in_vain_and_no_token_of_it(lane: str) -> None:
    plain = make_engine()
    prompt = next(prompts(1))
    add(plain, "a", prompt, greedy(10))
    tokens = finish(plain).tokens["a", 0]
    stop = next(token for place, token in enumerate(tokens) if place > 2)
    engine = overlapped(lane)
    add(engine, "a", prompt, greedy(10, stop_token_ids=(stop,)))
    run = finish(engine)
    length = tokens.index(stop) + 1
    assert run.tokens["a", 0] == tokens[:length]
    assert run.last["a", 0].stop_reason == stop
    assert len(fake_lm(engine).tokens_per_step) == length + 1


def test_a_cache_that_one_request_fills_is_enough(lane: str) -> None:
    """A window frees its blocks when a step is collected: planning ahead of it must not take them for missing."""
    for windows in ((None, 5), (6,), (None,)):
        tight = {"windows": windows, "num_blocks": [16 if window is None else 7 for window in windows]}
        runs = []
        for engine in (overlapped(lane, **tight), make_engine(**tight)):
            add(engine, "a", [1, 2, 3], greedy(61))
            add(engine, "b", [4, 5, 6], greedy(30))
            runs.append(finish(engine, max_steps=400))
        assert_equal_but_for_times(*runs)


def test_a_closed_engine_has_no_work_left(lane: str) -> None:
    engine = overlapped(lane)
    add(engine, "a", next(prompts(1)), greedy(10))
    engine.step()
    assert ahead(engine)
    engine.cancel_all()
    engine.close()
    assert not engine.has_work


def test_the_setting_says_what_overlaps() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert [overlaps(setting, cpu) for setting in ("auto", "on", "off")] == [False, True, False]
    assert [overlaps(setting, gpu) for setting in ("auto", "on", "off")] == [True, True, False]


def test_the_setting_may_be_written_as_yaml_reads_it() -> None:
    assert EngineSettings(overlap=True).overlap == "on"  # type: ignore[arg-type]
    assert EngineSettings(overlap=False).overlap == "off"  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="overlap"):
        EngineSettings(overlap="sometimes")  # type: ignore[arg-type]


# --- with a step under way -------------------------------------------------------------------------------------------


def test_a_cancelled_request_gives_nothing_more_and_frees_its_blocks(lane: str) -> None:
    engine = overlapped(lane)
    add(engine, "a", next(prompts(1)), greedy(20))
    run = Run()
    for _ in range(3):
        run.add(engine.step())
    assert ahead(engine)
    run.add(engine.cancel("a"))
    assert [pool.num_used for pool in engine.kv.pools] == [0, 0]
    assert engine.has_work, "the step under way is still to be collected"
    finish(engine, run)
    assert run.last["a", 0].finish_reason is FinishReason.CANCELLED
    assert len(run.tokens["a", 0]) == 3


def test_a_request_that_times_out_ends_although_its_token_is_under_way(lane: str) -> None:
    clock = FakeClock()
    engine = overlapped(lane, clock=clock)
    add(engine, "a", next(prompts(1)), greedy(20), timeout_seconds=1.0)
    run = Run()
    run.add(engine.step())
    clock.advance(2.0)
    run.add(engine.step())
    finish(engine, run)
    assert run.last["a", 0].finish_reason is FinishReason.TIMEOUT
    assert len(run.tokens["a", 0]) == 1


def test_a_newcomer_planned_behind_a_step_that_breaks_is_planned_again(lane: str) -> None:
    first, second = prompts(2)
    plain = make_engine()
    add(plain, "b", second, greedy(6))
    expected = finish(plain).tokens["b", 0]
    engine = overlapped(lane)
    add(engine, "a", first, greedy(20))
    run = Run()
    run.add(engine.step())  # the second step is under way
    fake_lm(engine).faults.error = RuntimeError("injected")
    run.add(engine.step())  # launches the third, which breaks
    add(engine, "b", second, greedy(6))
    run.add(engine.step())  # plans b behind the broken one, and finds it broken
    assert run.last["a", 0].finish_reason is FinishReason.ERROR
    assert "RuntimeError: injected" in (run.last["a", 0].error or "")
    assert ("b", 0) not in run.last
    finish(engine, run)
    assert run.tokens["b", 0] == expected


def test_a_packing_that_fails_ends_its_requests_only(lane: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for engine in (overlapped(lane), make_engine()):
        add(engine, "a", next(prompts(1)), greedy(4))
        real = engine.runner.prepare
        calls = itertools.count()

        def broken(*given: Any, real: Any = real, calls: Any = calls) -> Any:
            if next(calls) == 0:
                raise MemoryError("no room for the inputs")
            return real(*given)

        monkeypatch.setattr(engine.runner, "prepare", broken)
        run = Run()
        run.add(engine.step())
        add(engine, "b", next(prompts(1)), greedy(4))
        finish(engine, run)
        assert "MemoryError" in (run.last["a", 0].error or "")
        assert run.last["b", 0].finish_reason is FinishReason.LENGTH


def test_the_next_step_is_planned_while_the_model_computes() -> None:
    engine = overlapped("thread")
    add(engine, "a", next(prompts(1)), greedy(20))
    engine.step()
    faults = fake_lm(engine).faults
    engine.settle()
    faults.gate = threading.Event()
    faults.entered.clear()
    planned: list[int] = []
    real = engine.runner.prepare

    def noted(*given: Any) -> Any:
        planned.append(len(planned))
        return real(*given)

    engine.runner.prepare = noted  # type: ignore[method-assign]
    stepper = threading.Thread(target=engine.step)
    stepper.start()
    assert faults.entered.wait(10)
    give_up = time.monotonic() + 10
    while len(planned) < 2 and time.monotonic() < give_up:
        time.sleep(0.001)
    assert planned == [0, 1], "the second step is not packed while the first one computes"
    faults.gate.set()
    faults.gate = None
    stepper.join(10)
    engine.cancel_all()
    finish(engine)


# --- lanes -----------------------------------------------------------------------------------------------------------


def test_a_lane_runs_in_order_and_hands_out_what_was_raised(lane: str) -> None:
    runner = LANES[lane]()
    order: list[int] = []

    def work(number: int) -> int:
        order.append(number)
        if number == 2:
            raise ValueError("two")
        return number * 10

    outcomes: list[Outcome[int]] = [runner.run(lambda number=number: work(number)) for number in range(4)]  # type: ignore[misc]
    assert [outcomes[0].wait(), outcomes[1].wait(), outcomes[3].wait()] == [0, 10, 30]
    with pytest.raises(ValueError, match="two"):
        outcomes[2].wait()
    assert order == [0, 1, 2, 3]
    runner.close(10)
    runner.close(10)


def test_a_closed_thread_lane_leaves_no_thread() -> None:
    runner = ThreadLane()
    thread_id = runner.run(threading.get_ident).wait()
    assert thread_id != threading.get_ident()
    runner.close(10)
    assert all(thread.ident != thread_id for thread in threading.enumerate())


def test_closing_waits_for_work_that_hangs_no_longer_than_it_may() -> None:
    runner, goes_on = ThreadLane(), threading.Event()
    outcome = runner.run(goes_on.wait)
    runner.close(0.05)
    goes_on.set()
    assert outcome.wait()
