"""AdamW whose running means take 8 bits (Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization")."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator

from drivetrain.contracts.optimizer import Optimizer, OptimizerConfig
from drivetrain.contracts.store import StoredTensor
from drivetrain.plugins.optimizer.fields import check_betas

if TYPE_CHECKING:
    import torch

SMALLEST = 4096
"""Elements from which on a parameter's state is kept in 8 bits: small ones, norms above all, take no room anyway."""


class AdamW8bit(Optimizer):
    """AdamW with its two running means in 8 bits, by blocks with a scale each: a quarter of the state."""

    class Config(OptimizerConfig):
        weight_decay: float = Field(0.01, ge=0, description="decoupled weight decay, in units of the learning rate")
        betas: tuple[float, float] = Field(
            (0.9, 0.999), description="decay of the running mean and square of gradients"
        )
        eps: float = Field(1e-8, gt=0, description="added to the root of the running square")
        block: int = Field(256, ge=16, description="elements that share a scale")

        _check_betas = field_validator("betas")(check_betas)

    config: Config

    def make(self, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        from drivetrain.plugins.optimizer.torch_adamw8bit import TorchAdamW8bit

        config = self.config
        return TorchAdamW8bit(list(groups), betas=config.betas, eps=config.eps, block=config.block)

    def state_of(self, name: str, shape: tuple[int, ...], dtype: str) -> Mapping[str, StoredTensor]:
        size = 1
        for dim in shape:
            size *= dim
        step = {"step": StoredTensor((), "float32")}
        if size < SMALLEST:
            return {**step, **{key: StoredTensor(shape, dtype) for key in ("exp_avg", "exp_avg_sq")}}
        blocks = -(-size // self.config.block)
        state = dict(step)
        for key in ("exp_avg", "exp_avg_sq"):
            state[key] = StoredTensor(shape, "uint8")
            state[f"{key}_scale"] = StoredTensor((blocks,), "float32")
        return state
