"""Weights as int8 with one scale a row; activations stay as they are.

Shapes: I input features; O output features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from drivetrain.contracts.packed import PackedWeight
from drivetrain.contracts.quantizer import Declaration, Quantizer
from drivetrain.packed import PackedLinear

if TYPE_CHECKING:
    from torch import nn


def pack_int8(weight_OI: torch.Tensor) -> PackedWeight:
    """Round each row to the nearest of 255 multiples of its largest weight / 127."""
    wide_OI = weight_OI.detach().float()
    # A row of zeros has no scale of its own; any will do, but not 0.
    scales_O = wide_OI.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny) / 127
    rounded_OI = (wide_OI / scales_O.unsqueeze(1)).round().clamp(-127, 127).to(torch.int8)
    return PackedWeight("linear_int8", {"weight": rounded_OI, "scales": scales_O}, *weight_OI.shape)


class Int8Quantizer(Quantizer):
    """Weights as int8 with one scale a row, rounded to nearest; activations stay as they are."""

    def bits_per_weight(self) -> float | None:
        """8, and a float32 scale a row: 0.5 bits for a row of 64, less for longer ones."""
        return 8.5

    def declares(self) -> Declaration:
        return Declaration("int8, a float32 scale a row", operations=("linear_int8",))

    def convert(self, name: str, linear: nn.Linear) -> nn.Module:
        bias = None if linear.bias is None else linear.bias.detach().clone()
        return PackedLinear(pack_int8(linear.weight), bias).train(linear.training)
