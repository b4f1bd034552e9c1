"""Rule: every moment of a step belongs to one phase, and who asks is told the same figures."""

from __future__ import annotations

import pytest

from drivetrain.observers import Observers, hookimpl
from drivetrain.serving.timing import OUTSIDE_THE_MODEL, Phase, StepClock, StepTiming
from support.fake_model import add, finish, greedy, make_engine, prompts


class Watcher:
    def __init__(self) -> None:
        self.steps: list[StepTiming] = []

    @hookimpl
    def step_done(self, timing: StepTiming) -> None:
        self.steps.append(timing)


def test_the_phases_of_a_step_come_in_order_and_fill_it() -> None:
    watcher = Watcher()
    observers = Observers(installed=False)
    observers.register(watcher)
    engine = make_engine(observers=observers)
    for number, prompt in enumerate(prompts(3, length=4)):
        add(engine, f"r{number}", prompt, greedy(5))
    finish(engine)
    assert len(watcher.steps) == engine.metrics.snapshot()["steps"]
    for step in watcher.steps:
        phases = [phase for phase, _ in step.marks]
        assert [*dict.fromkeys(phases)] == list(Phase)
        ends = [end for _, end in step.marks]
        assert ends == sorted(ends)
        assert step.seconds == ends[-1]
        begin, end = step.model_seconds
        assert step.started_seconds <= begin <= end <= step.started_seconds + step.seconds
    assert [step.num_tokens for step in watcher.steps][-1] == 3
    assert [step.num_running for step in watcher.steps][-1] == 0


def test_the_metrics_hold_the_sum_of_all_steps() -> None:
    watcher = Watcher()
    observers = Observers(installed=False)
    observers.register(watcher)
    engine = make_engine(observers=observers)
    add(engine, "a", next(prompts(1)), greedy(6))
    finish(engine)
    spent = engine.metrics.snapshot()["phase_seconds"]
    assert set(spent) == {phase.value for phase in Phase}
    assert sum(spent.values()) == pytest.approx(sum(step.seconds for step in watcher.steps))
    value = engine.metrics.registry.get_sample_value
    for phase in Phase:
        assert value("drivetrain_step_phase_seconds_total", {"phase": phase.value}) == spent[phase] > 0
    assert value("drivetrain_step_seconds_count") == len(watcher.steps)
    assert value("drivetrain_step_seconds_sum") == pytest.approx(sum(step.seconds for step in watcher.steps))


def test_a_step_that_came_to_nothing_leaves_no_mark() -> None:
    clock = StepClock()
    clock.mark(Phase.SCHEDULE)
    clock.start()
    clock.mark(Phase.MODEL)
    timing = clock.timing(1, 1, 0, 0.5, (0.0, 0.0))
    assert [phase for phase, _ in timing.marks] == [Phase.MODEL]


def test_the_model_is_the_only_phase_that_is_not_the_engines_own() -> None:
    assert set(OUTSIDE_THE_MODEL) == set(Phase) - {Phase.MODEL}


def test_token_times_of_a_step_land_in_the_histogram_together() -> None:
    engine = make_engine()
    clock = engine._clock
    for number, prompt in enumerate(prompts(4, length=3)):
        add(engine, f"r{number}", prompt, greedy(3))
    while engine.has_work:
        engine.step()
        clock.advance(0.02)  # type: ignore[attr-defined]
    value = engine.metrics.registry.get_sample_value
    assert value("drivetrain_output_tokens_total") == 12
    assert value("drivetrain_time_per_token_seconds_count") == 8
    assert value("drivetrain_time_per_token_seconds_bucket", {"le": "0.01"}) == 0
    assert value("drivetrain_time_per_token_seconds_bucket", {"le": "0.025"}) == 8
    assert value("drivetrain_time_per_token_seconds_bucket", {"le": "+Inf"}) == 8
    assert value("drivetrain_time_per_token_seconds_sum") == pytest.approx(8 * 0.02)
    assert engine.metrics.snapshot()["time_per_token_seconds"]["p50"] == pytest.approx(0.02)
