"""Weights as int8 with one scale a row; activations stay as they are.

Shapes: N some rows; I input features; O output features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from drivetrain.contracts.packed import PackedWeight
from drivetrain.contracts.quantizer import Declaration, Quantizer
from drivetrain.packed import PackedLinear, pack_rows
from drivetrain.plugins.quantizer.calibrated.quantizers import SavesPacked

if TYPE_CHECKING:
    from torch import nn


def round_rows(weight_NI: torch.Tensor) -> dict[str, torch.Tensor]:
    """Each row rounded to the nearest of 255 multiples of its largest weight / 127."""
    # A row of zeros has no scale of its own; any will do, but not 0.
    scales_N = (weight_NI.abs().amax(dim=1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    rounded_NI = (weight_NI / scales_N.unsqueeze(1)).round_().clamp_(-127, 127).to(torch.int8)
    return {"weight": rounded_NI, "scales": scales_N}


def pack_int8(weight_OI: torch.Tensor) -> PackedWeight:
    """The weight in the layout of ``linear_int8``."""
    return PackedWeight("linear_int8", pack_rows(weight_OI, round_rows), *weight_OI.shape)


class Int8Quantizer(SavesPacked, Quantizer):
    """Weights as int8 with one scale a row, rounded to nearest; activations stay as they are."""

    def bits_per_weight(self) -> float | None:
        """8, and a float32 scale a row: 0.5 bits for a row of 64, less for longer ones."""
        return 8.5

    def declares(self) -> Declaration:
        return Declaration("int8, a float32 scale a row", operations=("linear_int8",))

    def convert(self, name: str, linear: nn.Linear) -> nn.Module:
        bias = None if linear.bias is None else linear.bias.detach().clone()
        return PackedLinear(pack_int8(linear.weight), bias).train(linear.training)
