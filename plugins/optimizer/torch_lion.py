"""Lion as a torch optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class TorchLion(torch.optim.Optimizer):
    """``p -= lr * (sign(b1 m + (1 - b1) g) + decay p)``, and then ``m = b2 m + (1 - b2) g``."""

    def __init__(self, params: Any, *, betas: tuple[float, float]) -> None:
        super().__init__(params, {"lr": 1e-4, "weight_decay": 0.0, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            first, second = group["betas"]
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                mean = state["exp_avg"]
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(torch.lerp(gradient, mean, first).sign_(), alpha=group["lr"])
                mean.lerp_(gradient, 1 - second)
