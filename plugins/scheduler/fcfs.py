"""First come, first served."""

from __future__ import annotations

from pydantic import Field

from drivetrain.contracts.plugin import PluginConfig
from drivetrain.contracts.scheduler import Limits, OrderKey, RequestFacts, Scheduler, StepPlan, View
from drivetrain.plugins.scheduler.filling import fill


class FcfsScheduler(Scheduler):
    """First come, first served: by arrival, decodes and started prompts before new ones."""

    class Config(PluginConfig):
        max_batched_tokens: int = Field(512, ge=1, description="most tokens computed in one step")
        max_running: int = Field(64, ge=1, description="most requests that hold KV blocks at once")

    config: Config

    def limits(self) -> Limits:
        return Limits(self.config.max_batched_tokens, self.config.max_running)

    def key(self, request: RequestFacts) -> OrderKey:
        return (request.sequence_number,)

    def plan(self, view: View) -> StepPlan:
        return StepPlan(fill(view.running, view.waiting, self.limits()))
