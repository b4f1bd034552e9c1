"""Weights as int8, and activations rounded to int8 while they are used: products of integers.

Shapes: N some rows; I input features; O output features; B blocks of a row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field

from drivetrain.contracts.packed import PackedWeight
from drivetrain.contracts.quantizer import Declaration, InputStatistics, Quantizer
from drivetrain.packed import PackedLinear, checked_group, pack_rows
from drivetrain.plugins.quantizer.calibrated.quantizers import CalibratesSmooth, SmoothConfig
from drivetrain.plugins.quantizer.int8 import round_rows

if TYPE_CHECKING:
    from torch import nn

_BLOCK = 32
_Q8_0 = 8.0
"""ggml's number of the type whose blocks are a float16 scale and 32 integers of 8 bits."""


class W8A8Config(SmoothConfig):
    """Options of the quantizer ``w8a8``."""

    scales: Literal["token", "block"] = Field(
        "token",
        description="token: one scale for each token and each row of weights; block: one for each 32 inputs of both, "
        "which a few large activations disturb less",
    )


class W8A8Quantizer(CalibratesSmooth, Quantizer):
    """Weights and activations as int8, activations rounded for each token: products of integers."""

    Config = W8A8Config
    config: W8A8Config

    def bits_per_weight(self) -> float | None:
        """8, and a scale: 0.5 bits of a block, or of a row of 64, and less of a longer row."""
        return 8.5

    def declares(self) -> Declaration:
        if self.config.scales == "block":
            return Declaration(
                "int8, a float16 scale for each 32 weights",
                "int8, a scale for each 32 inputs of a token, dynamic",
                group_size=_BLOCK,
                operations=("linear_gguf_a8",),
            )
        return Declaration("int8, a float32 scale a row", "int8, a scale a token, dynamic", operations=("linear_w8a8",))

    def convert(self, name: str, linear: nn.Linear) -> nn.Module:
        bias = None if linear.bias is None else linear.bias.detach().clone()
        return PackedLinear(self._packed(name, linear.weight), bias).train(linear.training)

    def pack(self, name: str, weight_OI: torch.Tensor, statistics: InputStatistics) -> PackedWeight:
        return self._packed(name, weight_OI)

    def _packed(self, name: str, weight_OI: torch.Tensor) -> PackedWeight:
        if self.config.scales == "block":
            checked_group(name, weight_OI.shape[1], _BLOCK)
            rows, width = weight_OI.shape
            return PackedWeight("linear_gguf_a8", pack_rows(weight_OI, round_blocks), rows, width, {"type": _Q8_0})
        return PackedWeight("linear_w8a8", pack_rows(weight_OI, round_rows), *weight_OI.shape)


def round_blocks(weight_NI: torch.Tensor) -> dict[str, torch.Tensor]:
    """Blocks of 32 weights as a float16 scale and 32 integers, as GGUF's Q8_0 lays them out."""
    blocks_NB32 = weight_NI.unflatten(1, (-1, _BLOCK))
    scales_NB1 = (blocks_NB32.abs().amax(-1, keepdim=True) / 127).half()
    steps_NB1 = scales_NB1.float()
    # Codes are those of the scale as it is stored; where it is 0, so are they.
    codes_NB32 = (blocks_NB32 / torch.where(steps_NB1 == 0, 1.0, steps_NB1)).round_().clamp_(-127, 127)
    blocks = torch.cat((scales_NB1.view(torch.uint8), codes_NB32.to(torch.int8).view(torch.uint8)), dim=-1)
    return {"blocks": blocks.flatten(1)}
