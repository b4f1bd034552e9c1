"""Contract of a checkpoint policy: which activations are kept, recomputed or offloaded between forward and backward."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from drivetrain.contracts.plugin import Plugin

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class UnitActivations:
    """Bytes that one unit keeps for backward, for each token.

    input:    what it is called with.
    products: results of matrix products and of attention.
    everything: all that its operations keep.
    """

    input: int
    products: int
    everything: int


class CheckpointPolicy(Plugin):
    """Trades time for activation memory. Gradients must equal those without the policy."""

    kind = "checkpoint"

    @abstractmethod
    def apply(self, model: torch.nn.Module, units: tuple[str, ...]) -> torch.nn.Module:
        """Wrap the modules named in ``units`` (usually the decoder layers); return the model. Called once, before
        the partitioner sees it."""

    def kept(self, unit: UnitActivations, number: int) -> int:
        """Bytes for each token that stay on the device from the forward of unit ``number`` to its backward. Pure."""
        return unit.everything
