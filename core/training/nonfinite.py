"""Which module a loss or gradient that is not finite came from first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass
class _Watch:
    """What was seen of one pass, and what stands accused."""

    offender: str | None = None
    how: str = ""
    sound_gradient_of: str | None = None
    handles: list[Any] = field(default_factory=list)

    def accuse(self, name: str, how: str) -> None:
        if self.offender is None:
            self.offender, self.how = name, how


def find_offender(model: nn.Module, run: Callable[[], torch.Tensor]) -> tuple[str, str] | None:
    """Run forward and backward again under watch: the first module whose output, or else whose gradient, is not finite,
    and which of the two. None when everything is finite this time.

    run: makes one forward and backward, and returns the loss.
    """
    watch = _Watch()
    for name, module in model.named_modules():
        watch.handles.append(module.register_forward_hook(_forward_hook(watch, name or "the model")))
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                watch.handles.append(parameter.register_hook(_parameter_hook(watch, name or "the model", own)))
    try:
        loss = run()
    finally:
        for handle in watch.handles:
            handle.remove()
    if watch.offender is None and not bool(torch.isfinite(loss.detach()).all()):
        watch.accuse("the loss", "its value")
    return None if watch.offender is None else (watch.offender, watch.how)


def _forward_hook(watch: _Watch, name: str) -> Callable[..., None]:
    def look(module: nn.Module, args: object, output: object) -> None:
        is_leaf = not any(module.children())
        for tensor in _tensors(output):
            if not bool(torch.isfinite(tensor.detach()).all()):
                watch.accuse(name, "its output in the forward pass")
            elif is_leaf and tensor.requires_grad:
                watch.handles.append(tensor.register_hook(_gradient_hook(watch, name)))

    return look


def _gradient_hook(watch: _Watch, name: str) -> Callable[[torch.Tensor], None]:
    def look(gradient: torch.Tensor) -> None:
        if bool(torch.isfinite(gradient).all()):
            watch.sound_gradient_of = name
        else:
            # It arrived from what used this output; the last module whose own gradient was sound has made it.
            watch.accuse(watch.sound_gradient_of or "the loss", "what its backward pass hands on")

    return look


def _parameter_hook(watch: _Watch, name: str, own: str) -> Callable[[torch.Tensor], None]:
    def look(gradient: torch.Tensor) -> None:
        if not bool(torch.isfinite(gradient).all()):
            watch.accuse(name, f"the gradient of its {own}")

    return look


def _tensors(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)


def last_parameter_not_finite(model: nn.Module) -> str | None:
    """The last parameter, in the model's order, whose gradient is not finite: backward meets it first."""
    bad = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all())
    ]
    return bad[-1] if bad else None
