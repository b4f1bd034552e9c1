"""Schedulers with one fault each, over the built-in ones."""

from __future__ import annotations

import dataclasses

from drivetrain.contracts.plugin import Plugin, PluginConfig
from drivetrain.contracts.scheduler import Candidate, Grant, OrderKey, RequestFacts, StepPlan, View
from drivetrain.plugins.scheduler.fcfs import FcfsScheduler
from drivetrain.plugins.scheduler.filling import fill


class StarvesThePatient(FcfsScheduler):
    """Priority without aging: urgent arrivals overtake for ever."""

    def key(self, request: RequestFacts) -> OrderKey:
        return (request.priority, request.sequence_number)


class LastComeFirstServed(FcfsScheduler):
    """The newest request is always first, and the oldest never."""

    def key(self, request: RequestFacts) -> OrderKey:
        return (-request.sequence_number,)


class ShortestFirst(FcfsScheduler):
    """Short prompts overtake a long one for ever."""

    def key(self, request: RequestFacts) -> OrderKey:
        return (request.num_prompt_tokens, request.sequence_number)


class OverBudget(FcfsScheduler):
    """Forgets that chunks of prompts count: it grants whole prompts."""

    def plan(self, view: View) -> StepPlan:
        plan = super().plan(view)
        pending = {candidate.request_id: candidate.pending_tokens for candidate in view.running}
        grants = [Grant(g.request_id, pending.get(g.request_id, g.num_tokens)) for g in plan.grants]
        return StepPlan(grants, plan.preempt)


class OneTooMany(FcfsScheduler):
    """Lets one request more run than it promises."""

    def plan(self, view: View) -> StepPlan:
        limits = dataclasses.replace(self.limits(), max_running=self.limits().max_running + 1)
        return StepPlan(fill(view.running, view.waiting, limits))


class GrantsTwice(FcfsScheduler):
    """Splits a chunk of two tokens or more into two grants."""

    def plan(self, view: View) -> StepPlan:
        grants: list[Grant] = []
        for grant in super().plan(view).grants:
            half = grant.num_tokens // 2
            parts = [half, grant.num_tokens - half] if half else [grant.num_tokens]
            grants += [Grant(grant.request_id, part) for part in parts]
        return StepPlan(grants)


class DropsARequest(FcfsScheduler):
    """Takes the head of the queue and passes it over when the step has room for a second."""

    def plan(self, view: View) -> StepPlan:
        newcomers = list(view.waiting) if len(view.running) < self.limits().max_running else []
        return StepPlan(fill(view.running, iter(newcomers[1:] or newcomers), self.limits()))


class NewcomersFirst(FcfsScheduler):
    """Grants in the order of arrival turned round: those that wait before those that run."""

    def plan(self, view: View) -> StepPlan:
        plan = super().plan(view)
        running = {candidate.request_id for candidate in view.running}
        return StepPlan(sorted(plan.grants, key=lambda grant: grant.request_id in running))


class ReadsTheWholeQueue(FcfsScheduler):
    """Makes a list of all that wait, at every step."""

    def plan(self, view: View) -> StepPlan:
        return StepPlan(fill(view.running, iter(list(view.waiting)), self.limits()))


class TakesTurnsByCounting(FcfsScheduler):
    """Serves in turns that it counts: after a swap the turn is lost."""

    def __init__(self, config: PluginConfig) -> None:
        super().__init__(config)
        self._turn = 0

    def plan(self, view: View) -> StepPlan:
        self._turn += 1
        cut = self._turn % max(1, len(view.running))
        running = [*view.running[cut:], *view.running[:cut]]
        return StepPlan(fill(running, view.waiting, self.limits()))


class EqualKeys(FcfsScheduler):
    """Two requests of one moment have one key."""

    def key(self, request: RequestFacts) -> OrderKey:
        return (request.arrival_seconds,)


class IdlesOnPrefills(FcfsScheduler):
    """Grants nothing while prompts are all there is and none fits into a step."""

    def plan(self, view: View) -> StepPlan:
        plan = super().plan(view)
        pending = {candidate.request_id: candidate.pending_tokens for candidate in view.running}
        return StepPlan([g for g in plan.grants if g.num_tokens == pending.get(g.request_id, g.num_tokens)])


class EatsTheView(FcfsScheduler):
    """Takes the running requests off the engine's own list."""

    def plan(self, view: View) -> StepPlan:
        plan = super().plan(view)
        running = view.running
        if isinstance(running, list):
            running.clear()
        return plan


class PreemptsWhatItServes(FcfsScheduler):
    """Preempts the last running request and grants it as well."""

    def plan(self, view: View) -> StepPlan:
        plan = super().plan(view)
        full: list[Candidate] = list(view.running)[self.limits().max_running - 1 :]
        return StepPlan(plan.grants, [candidate.request_id for candidate in full])


ZOO: dict[type[Plugin], str] = {
    StarvesThePatient: "test_an_endless_stream_of_urgent_requests_starves_nobody",
    LastComeFirstServed: "test_nothing_overtakes_for_ever",
    ShortestFirst: "test_nothing_overtakes_for_ever",
    OverBudget: "test_the_token_budget_is_kept",
    OneTooMany: "test_the_running_limit_is_kept",
    GrantsTwice: "test_each_request_is_granted_once",
    DropsARequest: "test_waiting_requests_start_in_key_order",
    NewcomersFirst: "test_running_requests_are_granted_before_waiting_ones",
    ReadsTheWholeQueue: "test_waiting_is_read_no_farther_than_needed",
    TakesTurnsByCounting: "test_a_fresh_scheduler_makes_the_same_plan",
    EqualKeys: "test_keys_order_every_two_requests",
    IdlesOnPrefills: "test_something_is_granted_whenever_there_is_work",
    EatsTheView: "test_the_view_is_left_alone",
    PreemptsWhatItServes: "test_only_running_requests_are_preempted",
}
"""Broken scheduler -> the test that has to catch it."""
