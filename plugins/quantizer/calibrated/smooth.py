"""SmoothQuant: what is hard to round in the activations moves into the weights.

Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models" (2022),
equation 4.

Shapes: O output features; I input features.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from drivetrain.contracts.quantizer import InputStatistics

_LEAST = 1e-5


def smoothing_factors(weights_OI: Iterable[torch.Tensor], statistics: InputStatistics, strength: float) -> torch.Tensor:
    """``max(|x|) ** strength / max(|w|) ** (1 - strength)`` of each channel, over all weights that read it, [I]."""
    largest_I = torch.stack([weight_OI.abs().amax(0) for weight_OI in weights_OI]).amax(0)
    factors_I = statistics.max_abs_I.clamp_min(_LEAST).pow(strength) / largest_I.clamp_min(_LEAST).pow(1 - strength)
    return factors_I.clamp_min(_LEAST)
