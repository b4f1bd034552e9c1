"""Weights as float8 (e4m3) with one scale a row; activations as they are, or as float8 too.

Shapes: N some rows; I input features; O output features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field, model_validator

from drivetrain.contracts.packed import PackedWeight
from drivetrain.contracts.quantizer import Declaration, Quantizer, QuantizerConfig
from drivetrain.packed import PackedLinear, pack_rows
from drivetrain.plugins.quantizer.calibrated.quantizers import SavesPacked

if TYPE_CHECKING:
    from torch import nn

_LARGEST = 448.0
"""The largest finite number of float8_e4m3fn."""


class Fp8Config(QuantizerConfig):
    """Options of the quantizer ``fp8``."""

    activations: Literal["none", "dynamic", "static"] = Field(
        "none",
        description="none: they keep their dtype; dynamic: float8 with a scale for each token, found while it runs; "
        "static: float8 with the scale of activation_range for all, and what is larger is cut",
    )
    activation_range: float | None = Field(
        None, gt=0, description="the largest activation to keep with activations: static; 448 times the scale"
    )

    @model_validator(mode="after")
    def _check_range(self) -> Fp8Config:
        if (self.activations == "static") != (self.activation_range is not None):
            raise ValueError("activation_range goes with activations: static, and with nothing else")
        return self


class Fp8Quantizer(SavesPacked, Quantizer):
    """Weights as float8 (e4m3) with one scale a row; activations as they are, or float8 too."""

    Config = Fp8Config
    config: Fp8Config

    def bits_per_weight(self) -> float | None:
        """8, and a float32 scale a row: 0.5 bits for a row of 64, less for longer ones."""
        return 8.5

    def declares(self) -> Declaration:
        activations = {
            "none": None,
            "dynamic": "float8_e4m3, a scale a token, dynamic",
            "static": f"float8_e4m3, cut at {self.config.activation_range}",
        }[self.config.activations]
        return Declaration("float8_e4m3, a float32 scale a row", activations, operations=(self._operation,))

    def convert(self, name: str, linear: nn.Linear) -> nn.Module:
        tensors = pack_rows(linear.weight, round_to_float8)
        if self.config.activations != "none":
            # 0 asks for a scale of each token.
            tensors["x_scale"] = torch.tensor((self.config.activation_range or 0.0) / _LARGEST, dtype=torch.float32).to(
                linear.weight.device
            )
        packed = PackedWeight(self._operation, tensors, *linear.weight.shape)
        bias = None if linear.bias is None else linear.bias.detach().clone()
        return PackedLinear(packed, bias).train(linear.training)

    @property
    def _operation(self) -> str:
        return "linear_fp8" if self.config.activations == "none" else "linear_fp8a8"


def round_to_float8(weight_NI: torch.Tensor) -> dict[str, torch.Tensor]:
    """Each row as float8 of its largest weight / 448."""
    # A row of zeros has no scale of its own; any will do, but not 0.
    scales_N = (weight_NI.abs().amax(dim=1) / _LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
    quotients_NI = (weight_NI / scales_N.unsqueeze(1)).clamp_(-_LARGEST, _LARGEST)
    return {"weight": quotients_NI.to(torch.float8_e4m3fn), "scales": scales_N}
