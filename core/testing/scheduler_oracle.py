"""A small engine in plain Python, to run schedulers in: requests, blocks and the rules of a step, and no model.

It follows the contract's words: running requests hold blocks; before each step the scheduler makes a plan, which is
checked; blocks are given in the plan's order; a running request that finds none takes those of the running request with
the largest key; a waiting one that finds none ends the admitting. A preempted request computes everything again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from drivetrain.contracts.scheduler import Candidate, Limits, OrderKey, RequestFacts, Scheduler, StepPlan, View

OnView = Callable[[list[Candidate], list[Candidate]], None]
"""Told the running and the waiting candidates of a step before its plan is made."""


class LazyWaiting:
    """Waiting candidates that count how many were looked at."""

    def __init__(self, candidates: Iterator[Candidate]) -> None:
        self._left = candidates
        self.num_read = 0

    def __iter__(self) -> Iterator[Candidate]:
        return self

    def __next__(self) -> Candidate:
        candidate = next(self._left)
        self.num_read += 1
        return candidate


def broken_rules(
    plan: StepPlan, limits: Limits, running: Sequence[Candidate], waiting: Sequence[Candidate]
) -> set[str]:
    """Which rules of the contract a plan breaks; each rule is named by a word that the suite's tests use."""
    pending = {candidate.request_id: candidate.pending_tokens for candidate in (*running, *waiting)}
    names = [grant.request_id for grant in plan.grants]
    is_running = {candidate.request_id for candidate in running}
    in_order = [candidate.request_id for candidate in waiting]
    newcomers = [name for name in names if name in pending and name not in is_running]
    sizes = [grant.num_tokens for grant in plan.grants]
    within = zip(names, sizes, strict=True)
    starts = [name not in is_running for name in names]
    rules = {
        "unknown": any(name not in pending for name in names),
        "twice": len(set(names)) != len(names),
        "size": any(not 1 <= size <= pending.get(name, size) for name, size in within),
        "budget": sum(sizes) > limits.max_batched_tokens,
        "running": len(running) - len(set(plan.preempt)) + len(set(newcomers)) > limits.max_running,
        "first": starts != sorted(starts),
        "order": newcomers != in_order[: len(newcomers)],
        "preempt": not set(plan.preempt) <= is_running - set(names) or len(set(plan.preempt)) != len(plan.preempt),
        "idle": not plan.grants and bool(running or waiting),
    }
    return {rule for rule, is_broken in rules.items() if is_broken}


@dataclass
class Job:
    """A request in the small engine.

    num_computed: tokens whose keys and values are there; num_output: tokens it has been given so far.
    """

    facts: RequestFacts
    num_wanted: int
    key: OrderKey
    num_computed: int = 0
    num_output: int = 0
    finished_step: int | None = None

    @property
    def num_tokens(self) -> int:
        return self.facts.num_prompt_tokens + self.num_output

    @property
    def candidate(self) -> Candidate:
        return Candidate(self.facts.request_id, self.key, self.num_tokens - self.num_computed)


class SmallEngine:
    """Runs jobs under a scheduler.

    num_tokens_of_cache: tokens that the cache holds over all running requests, in blocks of ``block_size``.
    seconds_per_step:    how far the clock goes on with each step.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        num_tokens_of_cache: int,
        block_size: int = 4,
        seconds_per_step: float = 1.0,
        on_view: OnView | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.num_blocks = -(-num_tokens_of_cache // block_size)
        self.block_size = block_size
        self.seconds_per_step = seconds_per_step
        self.on_view = on_view
        self.jobs: dict[str, Job] = {}
        self.running: dict[str, Job] = {}
        self.waiting: dict[str, Job] = {}
        self.steps = 0
        self.num_preempted = 0
        self._held: dict[str, int] = {}

    @property
    def now_seconds(self) -> float:
        return self.steps * self.seconds_per_step

    def add(self, prompt: int, wanted: int, priority: int = 0) -> Job:
        """A request arrives now; one that could never fit is the caller's mistake."""
        assert self._blocks(prompt + wanted) <= self.num_blocks, "the cache can't hold this request even alone"
        number = len(self.jobs)
        facts = RequestFacts(f"r{number}", self.now_seconds, number, priority, prompt)
        job = Job(facts, wanted, self.scheduler.key(facts))
        self.jobs[facts.request_id] = self.waiting[facts.request_id] = job
        return job

    def swap(self, scheduler: Scheduler) -> None:
        """Another scheduler takes over: every request gets a new key, and nothing else changes."""
        self.scheduler = scheduler
        for job in (*self.running.values(), *self.waiting.values()):
            job.key = scheduler.key(job.facts)

    def step(self) -> None:
        """One step. Asserts that the plan is legal and that it gets the engine anywhere."""
        running, waiting = (
            [job.candidate for job in sorted(jobs.values(), key=lambda job: job.key)]
            for jobs in (self.running, self.waiting)
        )
        if self.on_view is not None:
            self.on_view(running, waiting)
        plan = self.scheduler.plan(View(list(running), LazyWaiting(iter(waiting))))
        broken = broken_rules(plan, self.scheduler.limits(), running, waiting)
        assert not broken, f"step {self.steps}: the plan breaks the rules {sorted(broken)}: {plan}"
        for name in plan.preempt:
            self._preempt(name)
        granted = self._give_blocks(plan)
        was_running = {candidate.request_id for candidate in running}
        assert granted or len(self.running) < len(was_running) or not (running or waiting), (
            f"step {self.steps}: nothing that the plan grants finds blocks, and nothing changes: {plan}"
        )
        self.steps += 1
        for name, num_tokens in granted.items():
            self._advance(self.jobs[name], num_tokens)

    def _give_blocks(self, plan: StepPlan) -> dict[str, int]:
        granted: dict[str, int] = {}
        was_running, is_admitting = set(self.running), True
        for grant in plan.grants:
            name, job = grant.request_id, self.jobs[grant.request_id]
            if name in was_running:
                before = len(self.running)
                while name in self.running and not self._extend(job, grant.num_tokens):
                    last = max(self.running.values(), key=lambda other: other.key).facts.request_id
                    granted.pop(last, None)
                    self._preempt(last)
                if name in self.running:
                    granted[name] = grant.num_tokens
                is_admitting = is_admitting and len(self.running) == before
            elif is_admitting:
                is_admitting = self._extend(job, grant.num_tokens)
                if is_admitting:
                    self.running[name] = self.waiting.pop(name)
                    granted[name] = grant.num_tokens
        return granted

    def _extend(self, job: Job, num_tokens: int) -> bool:
        needed = self._blocks(job.num_computed + num_tokens)
        name = job.facts.request_id
        if sum(self._held.values()) - self._held.get(name, 0) + needed > self.num_blocks:
            return False
        self._held[name] = needed
        return True

    def _preempt(self, name: str) -> None:
        job = self.waiting[name] = self.running.pop(name)
        job.num_computed = 0
        self._held.pop(name, None)
        self.num_preempted += 1

    def _advance(self, job: Job, num_tokens: int) -> None:
        job.num_computed += num_tokens
        if job.num_computed < job.num_tokens:
            return
        job.num_output += 1
        if job.num_output == job.num_wanted:
            job.finished_step = self.steps
            del self.running[job.facts.request_id]
            self._held.pop(job.facts.request_id)

    def _blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)
