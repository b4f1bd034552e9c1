"""Muon (Jordan et al. 2024): momentum of matrices made orthogonal, and Adam for everything else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator

from drivetrain.contracts.optimizer import Optimizer, OptimizerConfig
from drivetrain.contracts.store import StoredTensor
from drivetrain.plugins.optimizer.fields import check_betas

if TYPE_CHECKING:
    import torch


class Muon(Optimizer):
    """Orthogonal momentum for the matrices inside the layers; Adam for embeddings, the output layer and vectors."""

    class Config(OptimizerConfig):
        lr: float = Field(2e-2, gt=0, description="learning rate of the matrices")
        weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay, in units of the learning rate")
        momentum: float = Field(0.95, ge=0, lt=1, description="decay of the running mean of gradients")
        nesterov: bool = Field(True, description="look ahead by one step of the momentum")
        iterations: int = Field(5, ge=1, description="Newton-Schulz steps that make the momentum orthogonal")
        adam_lr: float = Field(3e-4, gt=0, description="learning rate of everything else")
        betas: tuple[float, float] = Field((0.9, 0.95), description="Adam's decays, for everything else")
        eps: float = Field(1e-8, gt=0, description="Adam's eps, for everything else")
        adam: tuple[str, ...] = Field(
            ("*embed*", "*lm_head*"), description="patterns of names whose matrices go to Adam as well"
        )

        _check_betas = field_validator("betas")(check_betas)

    config: Config

    def make(self, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        from drivetrain.plugins.optimizer.torch_muon import TorchMuon, split_groups

        config = self.config
        split = split_groups(groups, config.adam, config.adam_lr / config.lr)
        return TorchMuon(
            split,
            momentum=config.momentum,
            nesterov=config.nesterov,
            iterations=config.iterations,
            betas=config.betas,
            eps=config.eps,
        )

    def state_of(self, name: str, shape: tuple[int, ...], dtype: str) -> Mapping[str, StoredTensor]:
        from drivetrain.plugins.optimizer.torch_muon import is_matrix

        if is_matrix(name, len(shape), self.config.adam):
            return {"momentum": StoredTensor(shape, dtype)}
        moments = {key: StoredTensor(shape, dtype) for key in ("exp_avg", "exp_avg_sq")}
        return {"step": StoredTensor((), "float32"), **moments}
