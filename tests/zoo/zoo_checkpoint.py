"""Checkpoint policies with one fault each, and the test of the kit that must catch it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from drivetrain.contracts.checkpoint import CheckpointPolicy
from drivetrain.contracts.plugin import Plugin


class RecomputesAll(CheckpointPolicy):
    """Recomputes every unit. Without fault: what the policies below do wrong is theirs alone."""

    def apply(self, model: nn.Module, units: tuple[str, ...]) -> nn.Module:
        for name in units:
            unit = model.get_submodule(name)
            unit.forward = self.around(unit.forward)  # type: ignore[method-assign]
        return model

    def around(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        return partial(checkpoint, forward, use_reentrant=False)


class OtherDropout(RecomputesAll):
    """Draws new random numbers when it recomputes."""

    def around(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        return partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)


class CutsTheGraph(RecomputesAll):
    """Detaches the input of what it recomputes, so that nothing before it is trained."""

    def around(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        return lambda hidden: checkpoint(forward, hidden.detach(), use_reentrant=False)


class HalvesWhatItKeeps(RecomputesAll):
    """Keeps what backward needs in bfloat16."""

    def around(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def pack(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.dtype]:
            return (tensor.bfloat16() if tensor.is_floating_point() else tensor), tensor.dtype

        def unpack(packed: tuple[torch.Tensor, torch.dtype]) -> torch.Tensor:
            return packed[0].to(packed[1])

        def run(hidden: torch.Tensor) -> Any:
            with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
                return forward(hidden)

        return run


class _Renaming(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: torch.Tensor) -> Any:
        return checkpoint(self.inner, hidden, use_reentrant=False)


class RenamesParameters(CheckpointPolicy):
    """Puts a module of its own around each unit, which then shows in the saved state."""

    def apply(self, model: nn.Module, units: tuple[str, ...]) -> nn.Module:
        for name in units:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, _Renaming(model.get_submodule(name)))
        return model


class KeepsTwice(RecomputesAll):
    """Keeps a copy of each unit's input beside all that it would have kept anyway."""

    def around(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        return lambda hidden: forward(hidden * torch.ones_like(hidden))


ZOO: dict[type[Plugin], str] = {
    OtherDropout: "test_dropout_draws_the_same_numbers_again",
    CutsTheGraph: "test_gradients_equal_those_without_the_policy",
    HalvesWhatItKeeps: "test_gradients_equal_those_without_the_policy",
    RenamesParameters: "test_names_and_saved_state_stay",
    KeepsTwice: "test_no_more_is_kept_than_without_the_policy",
}
"""Faulty policy -> the test that must fail for it."""
