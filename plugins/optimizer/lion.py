"""Lion (Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", algorithm 2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator

from drivetrain.contracts.optimizer import Optimizer, OptimizerConfig
from drivetrain.contracts.store import StoredTensor
from drivetrain.plugins.optimizer.fields import check_betas

if TYPE_CHECKING:
    import torch


class Lion(Optimizer):
    """Steps of one size by the sign of a running mean: half the state of Adam, and a tenth of its rate."""

    class Config(OptimizerConfig):
        betas: tuple[float, float] = Field((0.9, 0.99), description="weight of the mean in the step, and its decay")

        _check_betas = field_validator("betas")(check_betas)

    config: Config

    @classmethod
    def abilities(cls) -> frozenset[str]:
        return frozenset({"elementwise"})

    def make(self, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        from drivetrain.plugins.optimizer.torch_lion import TorchLion

        return TorchLion(list(groups), betas=self.config.betas)

    def state_of(self, name: str, shape: tuple[int, ...], dtype: str) -> Mapping[str, StoredTensor]:
        return {"exp_avg": StoredTensor(shape, dtype)}
