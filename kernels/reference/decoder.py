"""The layers of a decoder, called one after the other: the meaning of every coarse kernel.

Shapes: T tokens of a step; E hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from drivetrain.contracts.attention import AttentionStep
from drivetrain.contracts.kernels import Angles, DecoderLayer


def decoder_layers(
    layers: Sequence[DecoderLayer],
    x_TE: torch.Tensor,
    angles: Sequence[Angles],
    ropes: Sequence[int | None],
    step: AttentionStep,
) -> torch.Tensor:
    """The residual stream behind the last layer, [T, E]."""
    for layer, rope in zip(layers, ropes, strict=True):
        x_TE = layer(x_TE, None if rope is None else angles[rope], step)
    return x_TE
