"""No checkpointing: all activations are kept."""

from __future__ import annotations

from typing import TYPE_CHECKING

from drivetrain.contracts.checkpoint import CheckpointPolicy

if TYPE_CHECKING:
    import torch


class NoCheckpointing(CheckpointPolicy):
    """Keeps every activation until backward: the fastest, and the one that takes most memory."""

    def apply(self, model: torch.nn.Module, units: tuple[str, ...]) -> torch.nn.Module:
        return model
