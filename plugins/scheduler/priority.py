"""Priority with aging."""

from __future__ import annotations

import itertools

from pydantic import Field

from drivetrain.contracts.plugin import PluginConfig
from drivetrain.contracts.scheduler import Limits, OrderKey, RequestFacts, Scheduler, StepPlan, View
from drivetrain.plugins.scheduler.filling import fill


class PriorityScheduler(Scheduler):
    """Urgent requests first; waiting makes a request more urgent, so that none waits for ever.

    A request of priority p that arrived at time t is ordered by t + p * aging_seconds: it gives way to more urgent
    ones that arrive within aging_seconds a level, and to none that arrive later. As everything ages alike, the order of
    two requests never changes while they wait, and one key fixed at arrival is enough.
    """

    class Config(PluginConfig):
        max_batched_tokens: int = Field(512, ge=1, description="most tokens computed in one step")
        max_running: int = Field(64, ge=1, description="most requests that hold KV blocks at once")
        aging_seconds: float = Field(
            30.0, gt=0, description="seconds of waiting that count as much as one priority level"
        )
        displace: bool = Field(True, description="let a waiting request take the place of a less urgent running one")

    config: Config

    def limits(self) -> Limits:
        return Limits(self.config.max_batched_tokens, self.config.max_running)

    def key(self, request: RequestFacts) -> OrderKey:
        urgency = request.arrival_seconds + request.priority * self.config.aging_seconds
        return (urgency, request.sequence_number)

    def plan(self, view: View) -> StepPlan:
        running, waiting = list(view.running), view.waiting
        preempt: list[str] = []
        if self.config.displace and len(running) >= self.config.max_running:
            # One a step is enough: the next step sees the next pair, and a burst can't empty the batch at once.
            head = next(waiting, None)
            if head is not None:
                waiting = itertools.chain([head], waiting)
                last = max(running, key=lambda candidate: candidate.key)
                others = sum(candidate.pending_tokens for candidate in running) - last.pending_tokens
                # Without a token left for the newcomer, the place would stay empty.
                if head.key < last.key and others < self.config.max_batched_tokens:
                    preempt.append(last.request_id)
                    running.remove(last)
        return StepPlan(fill(running, waiting, self.limits()), preempt)
