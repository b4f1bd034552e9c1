"""Muon as a torch optimizer, with Adam for what is no matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch

_QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients of the iteration x -> a x + b (x x') x + c (x x')^2 x, which brings singular values near 1 in few steps
(https://kellerjordan.github.io/posts/muon)."""


def is_matrix(name: str, num_dims: int, adam: Sequence[str]) -> bool:
    """Whether a parameter is stepped as a matrix."""
    return num_dims == 2 and not any(fnmatchcase(name, pattern) for pattern in adam)


def split_groups(groups: Sequence[dict[str, Any]], adam: Sequence[str], adam_factor: float) -> list[dict[str, Any]]:
    """Each group as one of matrices and one of the rest, whose rate is ``adam_factor`` times the group's."""
    split = []
    for group in groups:
        matrices = [(name, p) for name, p in group["params"] if is_matrix(name, p.dim(), adam)]
        taken = {name for name, _ in matrices}
        rest = [(name, parameter) for name, parameter in group["params"] if name not in taken]
        if matrices:
            split.append({**group, "params": matrices, "is_matrix": True})
        if rest:
            split.append({**group, "params": rest, "is_matrix": False, "lr": group["lr"] * adam_factor})
    return split


def orthogonal(matrix: torch.Tensor, iterations: int) -> torch.Tensor:
    """The nearest matrix with orthonormal rows or columns, about: singular values come out between 0.7 and 1.2."""
    a, b, c = _QUINTIC
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.mT if is_tall else matrix
    x = x / (torch.linalg.matrix_norm(x) + 1e-7)
    for _ in range(iterations):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if is_tall else x


class TorchMuon(torch.optim.Optimizer):
    """Groups with ``is_matrix`` by orthogonal momentum, the others by Adam."""

    def __init__(
        self,
        params: Any,
        *,
        momentum: float,
        nesterov: bool,
        iterations: int,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        defaults = {"lr": 1e-2, "weight_decay": 0.0, "is_matrix": False, "momentum": momentum, "nesterov": nesterov}
        super().__init__(params, defaults | {"iterations": iterations, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    (self._step_matrix if group["is_matrix"] else self._step_adam)(parameter, group)

    def _step_matrix(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        mean = state["momentum"].lerp_(gradient, 1 - group["momentum"])
        update = torch.lerp(gradient, mean, group["momentum"]) if group["nesterov"] else mean
        rows, columns = parameter.shape[0], max(1, parameter.shape[1])
        # A tall matrix's update has a smaller root mean square at the same norm.
        size = max(1.0, rows / columns) ** 0.5
        parameter.sub_(orthogonal(update, group["iterations"]), alpha=group["lr"] * size)

    def _step_adam(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        first, second = group["betas"]
        state["exp_avg"].lerp_(gradient, 1 - first)
        state["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
        step = float(state["step"])
        root = (state["exp_avg_sq"] / (1 - second**step)).sqrt_().add_(group["eps"])
        parameter.addcdiv_(state["exp_avg"], root, value=-group["lr"] / (1 - first**step))
