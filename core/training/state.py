"""State by logical name: what a partitioner saves of a model and of an optimizer. Partitioners build on it."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch

from drivetrain.errors import StoreError

_WITH_STATE: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
"""Optimizers whose state was made: some keep nothing, and must not be asked again."""


def model_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """``model.NAME`` -> parameter or persistent buffer. What is shared occurs once, under its first name."""
    named: dict[str, torch.Tensor] = {name: parameter.detach() for name, parameter in model.named_parameters()}
    persistent = model.state_dict(keep_vars=True)
    for name, buffer in model.named_buffers():
        if name in persistent:
            named[name] = buffer
    return {f"model.{name}": tensor for name, tensor in named.items()}


def optimizer_state(
    optimizer: torch.optim.Optimizer, named: Iterable[tuple[str, torch.nn.Parameter]]
) -> dict[str, torch.Tensor]:
    """``optimizer.NAME.KEY`` -> what the optimizer keeps; made first where it has not made a step yet.

    named: logical name of each of the optimizer's parameters. Raises StoreError for what is no tensor.
    """
    if not optimizer.state and optimizer not in _WITH_STATE:
        make_state(optimizer)
    _WITH_STATE.add(optimizer)
    state: dict[str, torch.Tensor] = {}
    for name, parameter in named:
        for key, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, torch.Tensor):
                raise StoreError(
                    f"the optimizer keeps something under {key!r} that is no tensor, and can't be saved",
                    where=type(optimizer).__name__,
                    found=type(value).__name__,
                )
            state[f"optimizer.{name}.{key}"] = value
    return state


@torch.no_grad()
def make_state(optimizer: torch.optim.Optimizer) -> None:
    """Have an optimizer make its state as its first step would: by a step of no length with gradients of zero.

    The step is not counted, so that the first one with gradients is still the first: Adam's corrections go by it.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    gradients = [parameter.grad for parameter in parameters]
    rates = [group["lr"] for group in optimizer.param_groups]
    try:
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        for group in optimizer.param_groups:
            group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], torch.Tensor) else 0.0
        optimizer.step()
        for kept in optimizer.state.values():
            if isinstance(kept.get("step"), torch.Tensor):
                kept["step"].zero_()
    finally:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
