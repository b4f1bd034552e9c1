"""Contract of an optimizer: how gradients change parameters, how fast, and how that speed goes over the run."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from drivetrain.contracts.plugin import Plugin, PluginConfig

if TYPE_CHECKING:
    import torch

    from drivetrain.contracts.store import StoredTensor

NamedParameters = Iterable[tuple[str, "torch.nn.Parameter"]]
"""(logical name, parameter) in the order of the model; what is shared occurs once, under its first name."""


class ScheduleConfig(BaseModel):
    """How the learning rate goes over a run, as a factor on every group's own rate.

    It rises in a line over ``warmup`` steps and then follows ``name``: ``constant``; ``cosine`` and ``linear`` fall to
    ``floor`` at the last step; ``wsd`` (warm-up, stable, decay) stays, and falls over the last ``decay`` ones.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: Literal["constant", "cosine", "linear", "wsd"] = Field("constant", description="the curve after the warm-up")
    warmup: int | float = Field(
        0, ge=0, description="steps of the rise from 0; a fraction below 1 is a share of all steps"
    )
    floor: float = Field(0.0, ge=0, le=1, description="factor that cosine, linear and wsd fall to")
    decay: int | float = Field(
        0.2, gt=0, description="wsd: steps of the fall at the end; a fraction below 1 is a share of all steps"
    )

    @model_validator(mode="after")
    def _says_nothing_of_other_curves(self) -> Self:
        for name, curves in (("floor", ("cosine", "linear", "wsd")), ("decay", ("wsd",))):
            if name in self.model_fields_set and self.name not in curves:
                which = " and ".join(curves)
                raise ValueError(f"{self.name} has no {name}, a setting of {which}; name such a curve, or leave it out")
        return self


class GroupConfig(BaseModel):
    """Parameters with settings of their own: those whose name ``match`` fits, and that no earlier group has taken."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    match: str = Field(description="pattern of logical names, with * and ?: '*.mlp.*'")
    lr: float | None = Field(None, ge=0, description="learning rate; 0 leaves them as they are; null: the optimizer's")
    weight_decay: float | None = Field(None, ge=0, description="weight decay; null: the optimizer's")


class OptimizerConfig(PluginConfig):
    """Options that every optimizer has."""

    lr: float = Field(1e-4, gt=0, description="learning rate, before the schedule")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay, in units of the learning rate")
    decay_vectors: bool = Field(False, description="let parameters of fewer than two dims (norms, biases) decay too")
    schedule: ScheduleConfig = Field(
        default_factory=lambda: ScheduleConfig.model_validate({}),
        description="how the rate goes over the run: name, warmup, floor, decay",
    )
    groups: tuple[GroupConfig, ...] = Field(
        (), description="parameters with a rate or decay of their own: a list of match, lr, weight_decay"
    )


class Optimizer(Plugin):
    """Makes a torch optimizer.

    Ability ``elementwise``: the new value of an element follows from that element's own value, gradient and state, so
    that a partitioner may hand over any pieces of the parameters. Without it the optimizer needs each parameter whole,
    and is refused where a partitioner claims ``cuts_parameters``.

    What the torch optimizer keeps for a parameter is tensors under texts, and nothing else: they are what is saved.
    """

    kind = "optimizer"

    Config = OptimizerConfig
    config: OptimizerConfig

    @abstractmethod
    def make(self, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        """The optimizer over groups as torch has them.

        Each holds ``params``, a list of (logical name, parameter), ``lr`` and ``weight_decay``. The rate of a group is
        written to ``group["lr"]`` before every step.
        """

    @abstractmethod
    def state_of(self, name: str, shape: tuple[int, ...], dtype: str) -> Mapping[str, StoredTensor]:
        """What the optimizer keeps after a step for the parameter ``name`` of this shape and dtype (torch name): key ->
        shape and dtype. Pure; plans of memory are made from it."""

    def groups(self, parameters: NamedParameters) -> list[dict[str, Any]]:
        """The parameters by learning rate and decay, as ``make`` takes them, by the configuration's groups.

        Raises ConfigError for a pattern that fits no parameter.
        """
        from drivetrain.training.groups import parameter_groups

        return parameter_groups(self.config, parameters)
