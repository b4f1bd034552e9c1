"""AdamW (Loshchilov and Hutter 2019), torch's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from drivetrain.contracts.optimizer import Optimizer, OptimizerConfig
from drivetrain.contracts.store import StoredTensor
from drivetrain.plugins.optimizer.fields import check_betas

if TYPE_CHECKING:
    import torch


class AdamW(Optimizer):
    """Adam with decoupled weight decay, by torch: one fused pass over all parameters where the device has it."""

    class Config(OptimizerConfig):
        weight_decay: float = Field(0.01, ge=0, description="decoupled weight decay, in units of the learning rate")
        betas: tuple[float, float] = Field(
            (0.9, 0.999), description="decay of the running mean and square of gradients"
        )
        eps: float = Field(1e-8, gt=0, description="added to the root of the running square")
        implementation: Literal["auto", "fused", "foreach", "loop"] = Field(
            "auto", description="how a step is computed; auto: fused"
        )

        _check_betas = field_validator("betas")(check_betas)

    config: Config

    @classmethod
    def abilities(cls) -> frozenset[str]:
        return frozenset({"elementwise"})

    def make(self, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        import torch

        kind = self.config.implementation
        return torch.optim.AdamW(
            list(groups),
            betas=self.config.betas,
            eps=self.config.eps,
            fused=kind in ("auto", "fused"),
            foreach=kind == "foreach",
        )

    def state_of(self, name: str, shape: tuple[int, ...], dtype: str) -> Mapping[str, StoredTensor]:
        moments = {key: StoredTensor(shape, dtype) for key in ("exp_avg", "exp_avg_sq")}
        return {"step": StoredTensor((), "float32"), **moments}
