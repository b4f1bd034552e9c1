"""Rules of both schedulers: limits are kept, something is always granted, and no request waits for ever."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from drivetrain.contracts.scheduler import Candidate, Limits, RequestFacts, Scheduler, StepPlan, View
from drivetrain.registry import Registry, load
from support.fake_model import (
    FakeClock,
    Run,
    add,
    expected_tokens,
    finish,
    greedy,
    make_engine,
    make_scheduler,
    prompts,
)

torch.set_num_threads(1)

SCHEDULERS = ["fcfs", "priority"]


class Lazy:
    """Waiting candidates that count how many were looked at."""

    def __init__(self, candidates: list[Candidate]) -> None:
        self._left = iter(candidates)
        self.num_taken = 0

    def __iter__(self) -> Iterator[Candidate]:
        return self

    def __next__(self) -> Candidate:
        candidate = next(self._left)
        self.num_taken += 1
        return candidate


def facts(number: int, arrival: float = 0.0, priority: int = 0) -> RequestFacts:
    return RequestFacts(f"r{number}", arrival, number, priority, 10)


@st.composite
def views(draw: st.DrawFn) -> tuple[Scheduler, list[Candidate], list[Candidate]]:
    name = draw(st.sampled_from(SCHEDULERS))
    max_running = draw(st.integers(1, 8))
    scheduler = make_scheduler(name, draw(st.integers(1, 30)), max_running)
    arrivals = draw(st.lists(st.tuples(st.floats(0, 50), st.integers(-3, 3), st.integers(1, 40)), max_size=20))
    candidates = [
        Candidate(f"r{number}", scheduler.key(facts(number, arrival, priority)), pending)
        for number, (arrival, priority, pending) in enumerate(arrivals)
    ]
    num_running = draw(st.integers(0, min(max_running, len(candidates))))
    mixed = draw(st.permutations(candidates))
    return (
        scheduler,
        sorted(mixed[:num_running], key=lambda candidate: candidate.key),
        sorted(mixed[num_running:], key=lambda candidate: candidate.key),
    )


@settings(max_examples=300, deadline=None)
@given(view=views())
def test_every_plan_keeps_the_contract(view: tuple[Scheduler, list[Candidate], list[Candidate]]) -> None:
    scheduler, running, waiting = view
    limits, lazy = scheduler.limits(), Lazy(waiting)
    plan = scheduler.plan(View(running, lazy))
    pending = {candidate.request_id: candidate.pending_tokens for candidate in (*running, *waiting)}
    names = [grant.request_id for grant in plan.grants]
    newcomers = [name for name in names if name in {candidate.request_id for candidate in waiting}]
    assert len(set(names)) == len(names)
    assert all(1 <= grant.num_tokens <= pending[grant.request_id] for grant in plan.grants)
    assert sum(grant.num_tokens for grant in plan.grants) <= limits.max_batched_tokens
    assert len(running) - len(plan.preempt) + len(newcomers) <= limits.max_running
    assert newcomers == [candidate.request_id for candidate in waiting][: len(newcomers)]
    assert not set(plan.preempt) & set(names)
    assert set(plan.preempt) <= {candidate.request_id for candidate in running}
    assert bool(plan.grants) == bool(running or waiting)
    assert lazy.num_taken <= limits.max_running + 1
    # Whoever is first in order among those that run is never the one to give way.
    assert not running or running[0].request_id not in plan.preempt or bool(newcomers)


@settings(max_examples=100, deadline=None)
@given(view=views())
def test_running_decodes_are_served_before_any_prompt(
    view: tuple[Scheduler, list[Candidate], list[Candidate]],
) -> None:
    scheduler, running, waiting = view
    plan = scheduler.plan(View(running, iter(waiting)))
    decoding = [c.request_id for c in running if c.pending_tokens == 1 and c.request_id not in plan.preempt]
    served = [grant.request_id for grant in plan.grants]
    most = scheduler.limits().max_batched_tokens
    assert served[: min(len(decoding), most)] == decoding[:most]


def test_the_step_is_filled_up() -> None:
    scheduler = make_scheduler("fcfs", 10, 4)
    running = [Candidate("a", (0,), 1), Candidate("b", (1,), 6)]
    waiting = [Candidate("c", (2,), 2), Candidate("d", (3,), 9), Candidate("e", (4,), 9)]
    plan = scheduler.plan(View(running, iter(waiting)))
    assert [(grant.request_id, grant.num_tokens) for grant in plan.grants] == [("a", 1), ("b", 6), ("c", 2), ("d", 1)]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_they_are_registered_and_their_options_are_checked(name: str) -> None:
    plugin = load(Registry().find("scheduler", name))
    assert issubclass(plugin, Scheduler)
    scheduler = plugin(plugin.Config())
    assert scheduler.limits() == Limits(512, 64)
    for wrong in ({"max_running": 0}, {"max_batched_tokens": 0}, {"unknown": 1}):
        with pytest.raises(ValidationError):
            plugin.Config.model_validate(wrong)


# --- fcfs ------------------------------------------------------------------------------------------------------------


def test_fcfs_goes_by_arrival_and_nothing_else() -> None:
    scheduler = make_scheduler("fcfs", 8, 2)
    keys = [scheduler.key(facts(number, arrival=0.0, priority=-number)) for number in range(5)]
    assert keys == sorted(keys)


def test_fcfs_starts_and_ends_equal_requests_in_order() -> None:
    engine = make_engine("fcfs", max_running=2)
    for number, prompt in enumerate(prompts(6)):
        add(engine, f"r{number}", prompt, greedy(5), priority=-number)
    run = finish(engine)
    assert list(run.last) == [(f"r{number}", 0) for number in range(6)]


# --- priority --------------------------------------------------------------------------------------------------------


def aging(seconds: float, **options: Any) -> Scheduler:
    return make_scheduler("priority", 16, 2, aging_seconds=seconds, **options)


def test_an_urgent_request_overtakes_what_has_not_waited_long_enough() -> None:
    scheduler = aging(10.0)
    urgent = scheduler.key(facts(9, arrival=100.0, priority=-1))
    assert urgent < scheduler.key(facts(1, arrival=90.1))
    assert urgent > scheduler.key(facts(1, arrival=89.9))
    assert scheduler.key(facts(1, 5.0)) < scheduler.key(facts(2, 5.0))


@settings(max_examples=100, deadline=None)
@given(
    seconds=st.floats(0.01, 100),
    priority=st.integers(-5, 5),
    later=st.lists(st.tuples(st.floats(0, 5000), st.integers(-5, 5)), max_size=20),
)
def test_nothing_that_arrives_long_after_gets_ahead(
    seconds: float, priority: int, later: list[tuple[float, int]]
) -> None:
    scheduler = aging(seconds)
    own = scheduler.key(facts(0, 0.0, priority))
    for number, (arrival, urgency) in enumerate(later, start=1):
        if arrival > (priority - urgency) * seconds + 1e-6:
            assert scheduler.key(facts(number, arrival, urgency)) > own


def test_an_endless_stream_of_urgent_requests_starves_nobody() -> None:
    clock = FakeClock()
    engine = make_engine("priority", max_running=1, num_blocks=[16, 6], clock=clock, aging_seconds=1.0)
    prompt = [3, 1, 4, 1, 5]
    add(engine, "patient", prompt, greedy(20), priority=5)
    run, number = Run(), 0
    urgent = list(prompts(7, 4))
    while ("patient", 0) not in run.last:
        clock.advance(0.05)
        if engine.num_waiting < 4:  # there is always someone more urgent
            add(engine, f"urgent{number}", urgent[number % 7], greedy(2), priority=-5)
            number += 1
        run.add(engine.step())
        assert clock.now < 1000 + 15, "still waiting"
    # For ten levels at one second each it had to give way, and they filled every step of that time.
    assert clock.now > 1000 + 10
    assert run.tokens["patient", 0] == expected_tokens(prompt, 20)
    assert len(run.last) > 50
    finish(engine, run)


def test_an_urgent_request_takes_the_place_of_the_least_urgent_one() -> None:
    engine = make_engine("priority", max_running=2)
    patient, normal, urgent = prompts(3)
    add(engine, "patient", patient, greedy(20), priority=3)
    add(engine, "normal", normal, greedy(20))
    engine_run = Run()
    for _ in range(3):
        engine_run.add(engine.step())
    add(engine, "urgent", urgent, greedy(20), priority=-3)
    engine_run.add(engine.step())
    assert set(engine.roster.running) == {"normal[0]", "urgent[0]"}
    run = finish(engine, engine_run)
    assert list(run.last) == [("normal", 0), ("urgent", 0), ("patient", 0)]
    for name, prompt in zip(("patient", "normal", "urgent"), (patient, normal, urgent), strict=True):
        assert run.tokens[name, 0] == expected_tokens(prompt, 20)


def test_without_displacing_an_urgent_request_waits_for_the_next_free_place() -> None:
    engine = make_engine("priority", max_running=1, displace=False)
    first, second, urgent = prompts(3)
    add(engine, "first", first, greedy(10))
    engine.step()
    add(engine, "second", second, greedy(2))
    add(engine, "urgent", urgent, greedy(2), priority=-1)
    run = finish(engine)
    assert list(run.last) == [("first", 0), ("urgent", 0), ("second", 0)]
    assert engine.metrics.snapshot()["preemptions"] == 0


def plan_of(scheduler: Scheduler, running: list[tuple[float, int]], waiting: list[tuple[float, int]]) -> StepPlan:
    """A plan for candidates given as (key, pending tokens)."""
    return scheduler.plan(
        View(
            [Candidate(f"run{i}", (key, i), pending) for i, (key, pending) in enumerate(running)],
            iter([Candidate(f"wait{i}", (key, 10 + i), pending) for i, (key, pending) in enumerate(waiting)]),
        )
    )


def test_one_request_a_step_is_displaced() -> None:
    plan = plan_of(aging(1.0), [(5.0, 1), (6.0, 1)], [(1.0, 4), (2.0, 4)])
    assert plan.preempt == ["run1"]
    assert [grant.request_id for grant in plan.grants] == ["run0", "wait0"]


def test_nobody_is_displaced_for_an_equally_or_less_urgent_request() -> None:
    assert not plan_of(aging(1.0), [(5.0, 1), (6.0, 1)], [(6.0, 4)]).preempt
    assert not plan_of(aging(1.0), [(5.0, 1), (6.0, 1)], [(7.0, 4)]).preempt


def test_nobody_is_displaced_while_the_step_has_no_token_for_the_newcomer() -> None:
    assert not plan_of(aging(1.0), [(5.0, 30), (6.0, 1)], [(1.0, 4)]).preempt
    assert plan_of(aging(1.0), [(5.0, 1), (6.0, 30)], [(1.0, 4)]).preempt == ["run1"]


def test_nobody_is_displaced_while_a_place_is_free() -> None:
    plan = plan_of(aging(1.0), [(5.0, 1)], [(1.0, 4)])
    assert not plan.preempt
    assert [grant.request_id for grant in plan.grants] == ["run0", "wait0"]


def test_what_runs_is_ordered_anew_by_another_scheduler() -> None:
    engine = make_engine("fcfs", max_running=2)
    patient, urgent = prompts(2)
    add(engine, "patient", patient, greedy(20), priority=3)
    add(engine, "urgent", urgent, greedy(20), priority=-3)
    engine.step()
    assert [request.request_id for request in engine.roster.running_in_order()] == ["patient", "urgent"]
    engine.exchange(make_scheduler("priority", 64, 2), engine.kv)
    assert [request.request_id for request in engine.roster.running_in_order()] == ["urgent", "patient"]
    run = finish(engine)
    assert len(run.last) == 2
