"""Optimizers with one fault each, and the test of the kit that must catch it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from drivetrain.contracts.optimizer import NamedParameters
from drivetrain.contracts.plugin import Plugin
from drivetrain.contracts.store import StoredTensor
from drivetrain.plugins.optimizer.adafactor import Adafactor
from drivetrain.plugins.optimizer.adamw import AdamW
from drivetrain.plugins.optimizer.torch_lion import TorchLion


class GoesUp(AdamW):
    """Adds the update instead of taking it away."""

    def make(self, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(list(groups), maximize=True)


class TellsOfHalfItsState(AdamW):
    """Leaves the running square out of what it tells."""

    def state_of(self, name: str, shape: tuple[int, ...], dtype: str) -> Mapping[str, StoredTensor]:
        return {key: stored for key, stored in super().state_of(name, shape, dtype).items() if key != "exp_avg_sq"}


class CoupledDecay(AdamW):
    """Adds the decay to the gradient, as plain Adam does."""

    def make(self, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.Adam(list(groups))


class DecaysEverything(AdamW):
    """Lets norms and biases decay although nobody asked for it."""

    def groups(self, parameters: NamedParameters) -> list[dict[str, Any]]:
        decay = self.config.weight_decay
        return [{"params": list(parameters), "lr": self.config.lr, "weight_decay": decay}]


class _RemembersItsRate(TorchLion):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rates = [group["lr"] for group in self.param_groups]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group, rate in zip(self.param_groups, self.rates, strict=True):
            group["lr"] = rate
        super().step()


class IgnoresTheSchedule(AdamW):
    """Steps with the rate that it was made with."""

    def make(self, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        return _RemembersItsRate(list(groups), betas=(0.9, 0.99))


class HiddenState(AdamW):
    """Keeps its running mean where no saved state finds it."""

    def make(self, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        inner = torch.optim.AdamW(list(groups))

        class Outer(torch.optim.Optimizer):
            def __init__(self) -> None:
                super().__init__(list(groups), {})

            def step(self, closure: Any = None) -> None:  # type: ignore[override]
                for mine, theirs in zip(self.param_groups, inner.param_groups, strict=True):
                    theirs["lr"] = mine["lr"]
                inner.step()

        return Outer()


class CutsMatrices(Adafactor):
    """Claims to work on any pieces, and works on rows and columns."""

    @classmethod
    def abilities(cls) -> frozenset[str]:
        return frozenset({"elementwise"})


ZOO: dict[type[Plugin], str] = {
    GoesUp: "test_the_loss_falls",
    TellsOfHalfItsState: "test_state_is_what_was_told",
    CoupledDecay: "test_weight_decay_is_decoupled",
    DecaysEverything: "test_weight_decay_is_decoupled",
    IgnoresTheSchedule: "test_the_rate_is_read_at_every_step",
    HiddenState: "test_a_saved_state_goes_on",
    CutsMatrices: "test_elements_go_their_own_way",
}
"""Faulty optimizer -> the test that must fail for it."""
