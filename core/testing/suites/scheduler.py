"""What a scheduler has to do: every plan keeps its limits and the contract, and no request is lost or waits for ever.

Plans are judged one by one on fuzzed views, and together in a small engine with too few blocks. Everything is drawn
from fixed seeds, so a failure repeats.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import pytest

from drivetrain.contracts.scheduler import Candidate, Limits, RequestFacts, Scheduler, View
from drivetrain.registry import Registry, load
from drivetrain.testing.scheduler_oracle import Job, LazyWaiting, OnView, SmallEngine, broken_rules
from drivetrain.testing.suite import Suite

SMALL_LIMITS = ((1, 1), (8, 3), (30, 8))
"""max_batched_tokens and max_running that are tried beside the configured ones, where the Config takes them."""

FAR_SECONDS = 1e7
"""After this long, nothing that arrives may still overtake a request, however urgent it is: about four months."""

PATIENCE_STEPS = 3000
"""Steps of ten seconds, all of them crowded with more urgent requests, in which a patient request has to be done."""

SLACK = 8
"""A workload has to be done within this many times the steps that one token a step would take."""

Fuzzed = tuple[Scheduler, list[Candidate], list[Candidate]]


def _facts(number: int, arrival: float, priority: int = 0, prompt: int = 10) -> RequestFacts:
    return RequestFacts(f"r{number}", arrival, number, priority, prompt)


def _by_key(candidates: list[Candidate]) -> list[Candidate]:
    return sorted(candidates, key=lambda candidate: candidate.key)


def _comparison_with_fresh(scheduler: Scheduler) -> OnView:
    def compare(running: list[Candidate], waiting: list[Candidate]) -> None:
        both = (scheduler, type(scheduler)(scheduler.config))
        old, fresh = (one.plan(View(list(running), iter(waiting))) for one in both)
        assert old == fresh, f"after some steps it plans {old}, a fresh one {fresh}"

    return compare


class SchedulerSuite(Suite):
    """The examination of a scheduler."""

    kind = "scheduler"

    # --- what the tests use ------------------------------------------------------------------------------------------

    @classmethod
    def settings(cls) -> list[dict[str, int]]:
        """Options to try: the configured ones, and small limits where the Config takes them."""
        names = ("max_batched_tokens", "max_running")
        found: list[dict[str, int]] = [{}]
        fields = cls.plugin_class().Config.model_fields
        if all(name in fields and name not in cls.options for name in names):
            for values in SMALL_LIMITS:
                options = dict(zip(names, values, strict=True))
                try:
                    cls.make(**options)
                except ValueError:
                    continue  # an option its Config refuses is one that it does not claim
                found.append(options)
        return found

    @classmethod
    def schedulers(cls) -> list[Scheduler]:
        """One scheduler for each of the settings."""
        return [cls.make(**options) for options in cls.settings()]

    @classmethod
    def fuzzed_views(cls) -> Iterator[Fuzzed]:
        """Schedulers with running and waiting candidates, both by key: empty, crowded, decoding, prefilling, mixed."""
        for which, scheduler in enumerate(cls.schedulers()):
            limits = scheduler.limits()
            for seed in range(80):
                draw = random.Random(which * 1000 + seed)
                count = draw.choice((1, 2, 5, 20, 2 * min(limits.max_running, 100)))
                arrivals = sorted(draw.choice((0.0, draw.uniform(0, 300))) for _ in range(count))
                longest = draw.choice((1, 5, 40, 2 * limits.max_batched_tokens))
                candidates = [
                    Candidate(
                        f"r{number}",
                        scheduler.key(_facts(number, arrival, draw.randint(-3, 3), draw.randint(1, 100))),
                        draw.choice((1, draw.randint(1, longest))),
                    )
                    for number, arrival in enumerate(arrivals)
                ]
                draw.shuffle(candidates)
                most = min(limits.max_running, count)
                cut = draw.choice((0, most, draw.randint(0, most)))
                yield scheduler, _by_key(candidates[:cut]), _by_key(candidates[cut:])

    def _expect_rule(self, rule: str, meaning: str) -> None:
        for scheduler, running, waiting in self.fuzzed_views():
            plan = scheduler.plan(View(list(running), LazyWaiting(iter(waiting))))
            limits = scheduler.limits()
            broken = broken_rules(plan, limits, running, waiting)
            assert rule not in broken, f"{meaning}: {plan} with {limits}, running {running}, waiting {waiting}"

    # --- limits and keys ---------------------------------------------------------------------------------------------

    def test_limits_are_a_promise(self) -> None:
        """Limits are at least 1 and never change."""
        for scheduler in self.schedulers():
            limits = scheduler.limits()
            assert isinstance(limits, Limits)
            assert limits.max_batched_tokens >= 1
            assert limits.max_running >= 1
            scheduler.plan(View([], iter([Candidate("r0", scheduler.key(_facts(0, 0.0)), 5)])))
            assert scheduler.limits() == limits

    def test_options_set_the_limits(self) -> None:
        """Where the Config takes limits, those are the ones that are promised."""
        for options in self.settings()[1:]:
            limits = self.make(**options).limits()
            assert limits == Limits(**options), f"asked for {options}, promises {limits}"

    def test_keys_order_every_two_requests(self) -> None:
        """Keys are tuples, any two compare, and no two are equal, be they of one moment, length and priority."""
        for scheduler in self.schedulers():
            facts = [_facts(n, float(n // 9), (n % 3) - 1, 1 + n % 2) for n in range(60)]
            keys = [scheduler.key(one) for one in facts]
            assert all(isinstance(key, tuple) for key in keys)
            ordered = sorted(keys)
            assert all(a < b for a, b in itertools.pairwise(ordered)), "two requests have equal keys"

    def test_a_key_depends_on_the_request_alone(self) -> None:
        """Asked again, in another order, or of a fresh scheduler, a request's key is the same."""
        facts = [_facts(n, n * 0.5, (n % 5) - 2, 1 + (n * 7) % 50) for n in range(30)]
        for options in self.settings():
            first, fresh = self.make(**options), self.make(**options)
            keys = [first.key(one) for one in facts]
            assert [first.key(one) for one in facts] == keys, "asked again, the keys differ"
            assert [fresh.key(one) for one in reversed(facts)] == keys[::-1], "a fresh scheduler gives other keys"

    def test_nothing_overtakes_for_ever(self) -> None:
        """Whatever arrives long after a request gets a larger key, be it more urgent or shorter."""
        for scheduler in self.schedulers():
            own = scheduler.key(_facts(0, 0.0, priority=10, prompt=5000))
            for urgency in (10, 0, -10):
                for prompt in (1, 5000, 20_000):
                    late = scheduler.key(_facts(10**6, FAR_SECONDS, urgency, prompt))
                    assert late > own, f"priority {urgency}, {prompt} tokens, {FAR_SECONDS:g} s later still overtakes"

    # --- one plan ----------------------------------------------------------------------------------------------------

    def test_something_is_granted_whenever_there_is_work(self) -> None:
        """A plan without a grant, while requests run or wait, would be made for ever."""
        self._expect_rule("idle", "nothing is granted although requests are there")

    def test_no_work_needs_no_grant(self) -> None:
        """With nobody there, the plan is empty."""
        for scheduler in self.schedulers():
            plan = scheduler.plan(View([], iter([])))
            assert not plan.grants
            assert not plan.preempt

    def test_the_token_budget_is_kept(self) -> None:
        """All grants together are at most ``max_batched_tokens``."""
        self._expect_rule("budget", "more tokens are granted than max_batched_tokens")

    def test_the_running_limit_is_kept(self) -> None:
        """With the newcomers, and without those it preempts, at most ``max_running`` requests hold blocks."""
        self._expect_rule("running", "more requests would run than max_running")

    def test_grants_are_one_to_what_is_pending(self) -> None:
        """A grant is at least one token and at most what the request has pending."""
        self._expect_rule("size", "a grant is empty or larger than what is pending")

    def test_each_request_is_granted_once(self) -> None:
        """No request has two grants in one plan."""
        self._expect_rule("twice", "a request is granted twice")

    def test_only_requests_in_the_view_are_granted(self) -> None:
        """Grants name requests that run or wait."""
        self._expect_rule("unknown", "a request is granted that is not in the view")

    def test_running_requests_are_granted_before_waiting_ones(self) -> None:
        """Who holds blocks goes first: a newcomer that takes the last ones would push out a running request."""
        self._expect_rule("first", "a waiting request is granted before a running one")

    def test_waiting_requests_start_in_key_order(self) -> None:
        """Of those that wait, the first by key are granted, without a gap."""
        self._expect_rule("order", "a waiting request is passed over")

    def test_only_running_requests_are_preempted(self) -> None:
        """Preempted are requests that run, each once, and none that is granted in the same plan."""
        self._expect_rule("preempt", "what is preempted does not run, or is granted as well, or is named twice")

    def test_waiting_is_read_no_farther_than_needed(self) -> None:
        """Of five thousand that wait, a plan looks at no more than could run, and one to compare with."""
        for scheduler in self.schedulers():
            most = scheduler.limits().max_running
            queue = [Candidate(f"w{n}", scheduler.key(_facts(n, 1.0)), 7) for n in range(1000, 6000)]
            for num_running in {0, most // 2, most}:
                running = [Candidate(f"r{n}", scheduler.key(_facts(n, 0.0)), 1) for n in range(num_running)]
                waiting = LazyWaiting(iter(_by_key(queue)))
                scheduler.plan(View(_by_key(running), waiting))
                assert waiting.num_read <= most + 1, f"{waiting.num_read} looked at, though only {most} may run"

    def test_the_view_is_left_alone(self) -> None:
        """The running requests of the view are the engine's: a plan does not change the list."""
        for scheduler, running, waiting in self.fuzzed_views():
            given = list(running)
            scheduler.plan(View(given, iter(waiting)))
            assert given == running, "the view's list was changed"

    # --- many steps --------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("seed", range(4))
    def test_every_request_is_served_in_full(self, seed: int) -> None:
        """With room for all: each request gets all its tokens, in a bounded number of steps."""
        for scheduler in self.schedulers():
            self._run_workload(scheduler, seed, share_of_cache=10.0)

    @pytest.mark.parametrize("seed", range(4))
    def test_no_request_is_lost_when_blocks_are_scarce(self, seed: int) -> None:
        """With blocks for little more than one request, preempted ones come back and are served in full."""
        for scheduler in self.schedulers():
            self._run_workload(scheduler, seed, share_of_cache=1.3)

    @pytest.mark.parametrize("patient", [(5, 30), (0, 200), (3, 1)], ids=["low", "long", "short"])
    def test_an_endless_stream_of_urgent_requests_starves_nobody(self, patient: tuple[int, int]) -> None:
        """While more urgent and shorter requests never cease to arrive, a patient one is served in the end."""
        priority, prompt = patient
        for scheduler in self.schedulers():
            limits = scheduler.limits()
            engine = SmallEngine(scheduler, limits.max_running * 220 + 1000, seconds_per_step=10.0)
            urgent: list[Job] = []
            job: Job | None = None
            while job is None or job.finished_step is None:
                # As many new ones as keep the step full of those that go before it.
                ahead = sum(job is None or other.key < job.key for other in engine.waiting.values())
                for _ in range(limits.max_running + 2 - ahead):
                    urgent.append(engine.add(1 + len(urgent) % 3, 2, priority - 10))
                engine.step()
                if job is None:
                    job = engine.add(prompt, 3, priority)
                assert engine.steps < PATIENCE_STEPS, (
                    f"{engine.now_seconds:g} s and {len(urgent)} others later, it waits"
                )

    def test_long_prompts_are_not_starved_by_decodes(self) -> None:
        """A prompt of many steps moves on although enough requests decode to fill the steps."""
        for scheduler in self.schedulers():
            limits = scheduler.limits()
            prompt = min(5 * limits.max_batched_tokens, 600)
            engine = SmallEngine(scheduler, 2 * prompt + limits.max_running * 40)
            job = engine.add(prompt, 2)
            while job.finished_step is None:
                while len(engine.waiting) < limits.max_running:
                    engine.add(2, 20)
                engine.step()
                assert engine.steps < PATIENCE_STEPS, (
                    f"{job.num_computed} of {prompt} tokens after {engine.steps} steps"
                )

    def test_a_fresh_scheduler_makes_the_same_plan(self) -> None:
        """A scheduler keeps nothing: at every step, one that was made a moment ago plans the same."""
        for options in self.settings():
            scheduler = self.make(**options)
            self._run_workload(scheduler, 11, share_of_cache=1.5, on_view=_comparison_with_fresh(scheduler))

    def test_a_swap_in_mid_run_loses_nothing(self) -> None:
        """Swapped for ``fcfs`` and back in the middle of a workload, every request is still served in full."""
        plugin = load(Registry().find("scheduler", "fcfs"))
        for options in self.settings():
            limits = self.make(**options).limits()
            fcfs = plugin(
                plugin.Config.model_validate(
                    {"max_batched_tokens": limits.max_batched_tokens, "max_running": limits.max_running}
                )
            )
            assert isinstance(fcfs, Scheduler)
            self._run_workload(self.make(**options), 5, share_of_cache=1.5, swap_to=(fcfs, self.make(**options)))

    def _run_workload(
        self,
        scheduler: Scheduler,
        seed: int,
        *,
        share_of_cache: float,
        on_view: OnView | None = None,
        swap_to: tuple[Scheduler, ...] = (),
    ) -> None:
        """Requests of all lengths and priorities, half of them there from the start, run until all are done.

        share_of_cache: tokens of cache as a multiple of what the longest request needs.
        """
        draw = random.Random(seed)
        limits = scheduler.limits()
        most = min(3 * limits.max_batched_tokens, 300)
        count = 8 + 2 * min(limits.max_running, 16)
        shapes = [(draw.randint(1, draw.choice((3, most))), draw.randint(1, 25)) for _ in range(count)]
        longest = max(prompt + wanted for prompt, wanted in shapes)
        engine = SmallEngine(scheduler, int(longest * share_of_cache) + 4, on_view=on_view)
        bound = SLACK * sum(prompt + wanted for prompt, wanted in shapes) + 100
        later = shapes[count // 2 :]
        jobs = [engine.add(*shape, draw.randint(-2, 2)) for shape in shapes[: count // 2]]
        swaps = list(swap_to)
        while engine.running or engine.waiting or later:
            if later and (draw.random() < 0.3 or not (engine.running or engine.waiting)):
                jobs.append(engine.add(*later.pop(), draw.randint(-2, 2)))
            if swaps and engine.steps % 7 == 6:
                engine.swap(swaps.pop(0))
            engine.step()
            assert engine.steps < bound, f"{len(engine.waiting)} still wait after {engine.steps} steps"
        unserved = [job.facts.request_id for job in jobs if job.num_output != job.num_wanted]
        assert len(jobs) == count
        assert not unserved, f"lost: {', '.join(unserved)}"
