"""AdamW with state in 8 bits, as a torch optimizer.

A running mean is cut into blocks; a block keeps its largest absolute value as a scale, and each element one of 256
levels below it. Levels lie close together near zero, since most elements are far smaller than the largest: element
``x`` of the range 0..1 is kept as the root ``x ** (1 / 3)`` for the signed mean, and as ``x ** (1 / 5)`` for the
squares, which span twice as many orders of magnitude. No square becomes 0 that is not, so that no step is divided by
zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from drivetrain.plugins.optimizer.adamw8bit import SMALLEST

_SIGNED_POWER, _SQUARE_POWER = 3, 5


def _blocks(values: torch.Tensor, block: int) -> torch.Tensor:
    flat = values.reshape(-1)
    padding = -flat.numel() % block
    return torch.nn.functional.pad(flat, (0, padding)).view(-1, block)


def pack_signed(values: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 of the shape of ``values``, and the scale of each block."""
    blocks = _blocks(values, block)
    scales = blocks.abs().amax(1)
    shares = blocks / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    levels = shares.sign() * shares.abs().pow(1 / _SIGNED_POWER) * 127
    packed = (levels.round() + 128).to(torch.uint8)
    return packed.view(-1)[: values.numel()].view(values.shape), scales


def unpack_signed(packed: torch.Tensor, scales: torch.Tensor, block: int) -> torch.Tensor:
    shares = (_blocks(packed.float(), block) - 128) / 127
    values = shares.pow(_SIGNED_POWER) * scales[:, None]
    return values.view(-1)[: packed.numel()].view(packed.shape)


def pack_squares(values: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`pack_signed`, for values that are not negative; a value above 0 stays above it."""
    blocks = _blocks(values, block)
    scales = blocks.amax(1)
    shares = blocks / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    levels = (shares.pow(1 / _SQUARE_POWER) * 255).round_().clamp_(max=255)
    levels = torch.where(blocks > 0, levels.clamp(min=1), levels)
    return levels.to(torch.uint8).view(-1)[: values.numel()].view(values.shape), scales


def unpack_squares(packed: torch.Tensor, scales: torch.Tensor, block: int) -> torch.Tensor:
    values = (_blocks(packed.float(), block) / 255).pow(_SQUARE_POWER) * scales[:, None]
    return values.view(-1)[: packed.numel()].view(packed.shape)


class TorchAdamW8bit(torch.optim.Optimizer):
    """AdamW; parameters of at least SMALLEST elements keep their state in 8 bits."""

    def __init__(self, params: Any, *, betas: tuple[float, float], eps: float, block: int) -> None:
        super().__init__(params, {"lr": 1e-4, "weight_decay": 0.0, "betas": betas, "eps": eps, "block": block})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, parameter.grad.float(), group)

    def _step(self, parameter: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]) -> None:
        state, block = self.state[parameter], group["block"]
        is_packed = parameter.numel() >= SMALLEST
        mean, square = self._means(state, parameter, is_packed, block)
        state["step"] += 1
        first, second = group["betas"]
        mean.lerp_(gradient, 1 - first)
        square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        if is_packed:
            for key, values, pack in (("exp_avg", mean, pack_signed), ("exp_avg_sq", square, pack_squares)):
                packed, scales = pack(values, block)
                state[key].copy_(packed)
                state[f"{key}_scale"].copy_(scales)
        step = float(state["step"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        root = (square / (1 - second**step)).sqrt_().add_(group["eps"])
        parameter.addcdiv_(mean.to(parameter.dtype), root.to(parameter.dtype), value=-group["lr"] / (1 - first**step))

    @staticmethod
    def _means(
        state: dict[str, torch.Tensor], parameter: torch.Tensor, is_packed: bool, block: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Both running means in float32."""
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            for key, zero in (("exp_avg", 128), ("exp_avg_sq", 0)):
                if is_packed:
                    num_blocks = -(-parameter.numel() // block)
                    state[key] = torch.full_like(parameter, zero, dtype=torch.uint8)
                    state[f"{key}_scale"] = torch.zeros(num_blocks, dtype=torch.float32, device=parameter.device)
                else:
                    state[key] = torch.zeros_like(parameter)
        if not is_packed:
            return state["exp_avg"], state["exp_avg_sq"]
        mean = unpack_signed(state["exp_avg"], state["exp_avg_scale"], block)
        return mean, unpack_squares(state["exp_avg_sq"], state["exp_avg_sq_scale"], block)
