"""Adafactor (Shazeer and Stern 2018), torch's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from drivetrain.contracts.optimizer import Optimizer, OptimizerConfig
from drivetrain.contracts.store import StoredTensor

if TYPE_CHECKING:
    import torch


class Adafactor(Optimizer):
    """Adam's second moment as one number a row and one a column; no first moment. It needs matrices whole."""

    class Config(OptimizerConfig):
        lr: float = Field(1e-2, gt=0, description="learning rate, relative to the size of each parameter's values")
        beta2_decay: float = Field(-0.8, lt=0, description="how the decay of the running square grows with the steps")
        clip_threshold: float = Field(1.0, ge=1, description="bound on the root mean square of an update")

    config: Config

    def make(self, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        import torch

        # torch divides by the number of elements.
        filled = [{**group, "params": [(n, p) for n, p in group["params"] if p.numel()]} for group in groups]
        return torch.optim.Adafactor(filled, beta2_decay=self.config.beta2_decay, d=self.config.clip_threshold)

    def state_of(self, name: str, shape: tuple[int, ...], dtype: str) -> Mapping[str, StoredTensor]:
        step = {"step": StoredTensor((), "float32")}
        if len(shape) < 2:
            return {**step, "variance": StoredTensor(shape, dtype)}
        return {
            **step,
            "row_var": StoredTensor((*shape[:-1], 1), dtype),
            "col_var": StoredTensor((*shape[:-2], 1, shape[-1]), dtype),
        }
