"""What the next step computes: the scheduler decides order and tokens, blocks are given in its order."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from drivetrain.contracts.scheduler import Candidate, Grant, StepPlan, View
from drivetrain.errors import EngineError
from drivetrain.serving.blocks import SequenceBlocks
from drivetrain.serving.metrics import EngineMetrics
from drivetrain.serving.packing import Scheduled
from drivetrain.serving.request import Request
from drivetrain.serving.roster import Roster


class StepPlanner:
    """Asks the roster's scheduler for a plan, holds it to the rules, and finds blocks for it."""

    def __init__(self, roster: Roster, metrics: EngineMetrics, clock: Callable[[], float]) -> None:
        self._roster = roster
        self._metrics = metrics
        self._clock = clock

    def plan(self, *, is_ahead: bool = False) -> list[Scheduled]:
        """Ask the scheduler, then give blocks in its order.

        is_ahead: a step still runs. What it frees, and whom it ends, is not known yet, so nobody gives way: where
                  blocks are short nothing is planned, and the plan is made again once that step is collected.
        """
        if not self._roster.running and not self._roster.waiting:
            return []
        running = self._roster.running_in_order()
        view = View([request.candidate() for request in running], self._roster.waiting.peek_in_order(self._newcomer))
        try:
            plan = self._roster.scheduler.plan(view)
            self._check_plan(plan)
            for name in plan.preempt:
                self._roster.preempt(self._roster.running[name])
            scheduled = self._give_blocks(plan.grants, is_ahead)
        finally:
            self._roster.waiting.put_back()
        if not scheduled and not is_ahead and len(self._roster.running) == len(running):
            # Nothing has changed, so the next plan would be the same, for ever.
            name = type(self._roster.scheduler).__name__
            raise EngineError(
                f"scheduler {name} made a plan that computes nothing: it grants waiting requests only, and they find "
                "too few blocks",
                hint="Grant running requests before waiting ones.",
            )
        return scheduled

    def _newcomer(self, request: Request) -> Candidate:
        """A waiting request as the scheduler sees it: what the cache holds already costs none of the step's tokens."""
        return Candidate(request.name, request.key, len(request.tokens) - self._num_reusable(request))

    def _check_plan(self, plan: StepPlan) -> None:
        limits, running = self._roster.scheduler.limits(), self._roster.running
        names = {grant.request_id for grant in plan.grants}
        counts = [grant.num_tokens for grant in plan.grants]
        newcomers = [name for name in names if name not in running]
        problem = None
        if len(names) != len(counts):
            problem = "a request is granted twice"
        elif plan.preempt and len({*names, *plan.preempt}) != len(names) + len(plan.preempt):
            problem = "a request is preempted twice, or preempted and granted at once"
        elif not counts:
            problem = "nothing is granted although requests are there"
        elif min(counts) < 1:
            problem = "a grant of less than one token"
        elif sum(counts) > limits.max_batched_tokens:
            problem = f"{sum(counts)} tokens are granted, over max_batched_tokens {limits.max_batched_tokens}"
        elif any(name not in running for name in plan.preempt):
            problem = "a request is preempted that does not run"
        elif any(name not in self._roster.waiting for name in newcomers):
            problem = "a request is granted that neither runs nor waits"
        elif len(running) - len(plan.preempt) + len(newcomers) > limits.max_running:
            problem = f"more than max_running {limits.max_running} requests would run"
        if problem:
            raise EngineError(f"scheduler {type(self._roster.scheduler).__name__} made an impossible plan: {problem}")

    def _give_blocks(self, grants: Sequence[Grant], is_ahead: bool) -> list[Scheduled]:
        running, kv = self._roster.running, self._roster.kv
        scheduled: dict[str, Scheduled] = {}
        was_running = set(running)
        is_admitting = True
        for grant in grants:
            name = grant.request_id
            request = running.get(name)
            if request is None:
                waiting = self._roster.waiting.get(name)
                if waiting is None or name in was_running or not is_admitting:
                    continue  # it gave way a moment ago, or one before it found too few blocks
                tokens = self.admit(waiting, grant.num_tokens)
                if tokens > 0:
                    scheduled[name] = Scheduled.of(waiting, tokens)
                is_admitting = tokens > 0
                continue
            if is_ahead and request.is_at_its_last:
                continue  # the token that is still to come ends it
            num_tokens, blocks = grant.num_tokens, request.blocks
            if num_tokens > 1:
                num_tokens = min(num_tokens, request.pending_tokens)
            assert blocks is not None
            if not kv.extend(blocks, request.num_computed, num_tokens):
                if is_ahead:
                    return []
                # Blocks that someone gives up are not for a newcomer: it would be the next to give them up.
                is_admitting = False
                if not self._make_room(request, num_tokens, scheduled):
                    continue
            scheduled[name] = Scheduled.of(request, num_tokens)
        return list(scheduled.values())

    def _make_room(self, request: Request, num_tokens: int, scheduled: dict[str, Scheduled]) -> bool:
        """Blocks for a running request; the one last in order gives way, be it the request itself."""
        assert request.blocks is not None
        while not self._roster.kv.extend(request.blocks, request.num_computed, num_tokens):
            last = max(self._roster.running.values(), key=lambda other: other.key)
            scheduled.pop(last.name, None)
            self._roster.preempt(last)
            if last is request:
                return False
        return True

    def admit(self, request: Request, num_tokens: int) -> int:
        """Let a waiting request run if its first tokens find blocks; returns how many tokens it may compute."""
        blocks = self._roster.kv.open()
        computed = self._reuse(request, blocks)
        num_tokens = min(num_tokens, len(request.tokens) - computed)
        if not self._roster.kv.extend(blocks, computed, num_tokens):
            self._roster.kv.close(blocks)
            return 0
        if request.num_cached_tokens is None:
            request.num_cached_tokens = min(computed, request.num_prompt_tokens)
            self._metrics.prompt_looked_up(request.num_prompt_tokens, request.num_cached_tokens)
            self._metrics.queue_seconds(self._clock() - request.arrival_seconds)
        self._roster.admit(request, blocks, computed)
        return num_tokens

    def _reuse(self, request: Request, blocks: SequenceBlocks) -> int:
        """Start from a sibling's blocks or from the prefix cache; returns the tokens that need no computing."""
        if request.wants_prompt_logprobs:
            return 0  # every prompt position has to be computed to be scored
        parent = self._forkable_parent(request)
        if parent is not None:
            self._roster.kv.fork(parent, blocks, request.num_prompt_tokens)
            return request.num_prompt_tokens - 1
        return self._roster.kv.adopt_prefix(blocks, request.tokens, request.hashes)

    def _num_reusable(self, request: Request) -> int:
        """What :meth:`_reuse` would return. Changes nothing."""
        if request.wants_prompt_logprobs:
            return 0
        if self._forkable_parent(request) is not None:
            return request.num_prompt_tokens - 1
        return self._roster.kv.num_cached(request.tokens, request.hashes)

    def _forkable_parent(self, request: Request) -> SequenceBlocks | None:
        """The blocks of the first of n sequences, while they still hold the whole prompt that the others start from."""
        parent, length = request.parent, request.num_prompt_tokens
        if parent is None or parent.blocks is None or parent.num_landed < length or len(request.tokens) > length:
            return None
        return parent.blocks if self._roster.kv.can_fork(parent.blocks, length - 1) else None
