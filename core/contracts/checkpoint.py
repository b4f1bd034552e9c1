"""Contract of a checkpoint policy: which activations are kept, recomputed or offloaded between forward and backward."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

from drivetrain.contracts.plugin import Plugin

if TYPE_CHECKING:
    import torch


class CheckpointPolicy(Plugin):
    """Trades time for activation memory. Gradients must equal those without the policy."""

    kind = "checkpoint"

    @abstractmethod
    def apply(self, model: torch.nn.Module, units: tuple[str, ...]) -> torch.nn.Module:
        """Wrap the modules named in ``units`` (usually the decoder layers); return the model. Called once, before
        the partitioner sees it."""
