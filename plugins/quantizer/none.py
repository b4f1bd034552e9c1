"""No quantization: weights keep the precision's dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING

from drivetrain.contracts.quantizer import Quantizer

if TYPE_CHECKING:
    import torch


class NoQuantizer(Quantizer):
    """Leaves every weight in the dtype of the chosen precision."""

    def bits_per_weight(self) -> float | None:
        return None

    def convert(self, name: str, linear: torch.nn.Linear) -> torch.nn.Module:
        return linear
