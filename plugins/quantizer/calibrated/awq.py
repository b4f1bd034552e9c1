"""AWQ: inputs that are large get weights that are rounded finer.

Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration" (2023): a channel's
weights are multiplied by ``mean(|x|) ** ratio`` and its input is divided by it; the ratio is searched, then how much
of each group's range to cut. Beyond the paper, scales and values may then be chosen again. Errors are those of the
layers' outputs over all calibration tokens, by second moments.

Shapes: O output features; I input features; N groups of a row; g weights of a group.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from drivetrain.contracts.quantizer import InputStatistics
from drivetrain.plugins.quantizer.calibrated.clipping import best_shares, diagonal_blocks
from drivetrain.plugins.quantizer.calibrated.grids import Rounding
from drivetrain.plugins.quantizer.calibrated.refining import damped, refined
from drivetrain.plugins.quantizer.formats import IntegerGrid

_LEAST_FACTOR = 1e-4

_DAMPING = 0.01
"""Share of the mean second moment that is added to all, so that values are not fitted to chance in few tokens."""


def awq_factors(
    weights_OI: Iterable[torch.Tensor], statistics: InputStatistics, rounding: Rounding, steps: int
) -> torch.Tensor | None:
    """The factors with the least error over all weights that read the input, [I]; None where none is best.

    steps: ratios that are tried, from 0 on and below 1.
    """
    weights_OI, gram_II = list(weights_OI), statistics.gram_II
    assert gram_II is not None, "it declares that it wants the second moments"
    best: torch.Tensor | None = None
    least = sum(_loss(weight_OI, weight_OI, None, gram_II, rounding) for weight_OI in weights_OI)
    for step in range(1, steps):
        factors_I = statistics.mean_abs_I.clamp_min(_LEAST_FACTOR).pow(step / steps)
        factors_I = factors_I / (factors_I.max() * factors_I.min()).sqrt()
        loss = sum(_loss(w_OI, w_OI * factors_I, factors_I, gram_II, rounding) for w_OI in weights_OI)
        if loss < least:
            best, least = factors_I, loss
    return best


def _loss(
    weight_OI: torch.Tensor,
    scaled_OI: torch.Tensor,
    factors_I: torch.Tensor | None,
    gram_II: torch.Tensor,
    rounding: Rounding,
) -> float:
    """Squared error of a product with the scaled weight rounded, a token's mean over all outputs."""
    rounded_OI = rounding.rounded(scaled_OI.unflatten(1, (-1, rounding.group))).flatten(1)
    if factors_I is not None:
        rounded_OI = rounded_OI / factors_I
    error_OI = rounded_OI.sub_(weight_OI)
    return float(((error_OI @ gram_II) * error_OI).sum())


def awq_grid(
    weight_OI: torch.Tensor, statistics: InputStatistics, rounding: Rounding, *, clips: bool = True, sweeps: int = 0
) -> IntegerGrid:
    """Round a weight whose factors are in it already.

    clips:  cut of each group's range what loses least.
    sweeps: how often scales and values are chosen again afterwards, at most (see :mod:`.refining`); 0 leaves the
            published algorithm.
    """
    gram_II = statistics.gram_II
    assert gram_II is not None, "it declares that it wants the second moments"
    weight_ONg = weight_OI.unflatten(1, (-1, rounding.group))
    share: float | torch.Tensor = 1.0
    if clips:
        share = best_shares(weight_ONg, diagonal_blocks(gram_II, rounding.group), rounding)
    if not sweeps:
        return rounding.grid(weight_OI, share)
    scales_ON, zeros_ON = rounding.grids(weight_ONg, share)
    values_OI = rounding.values(weight_ONg, scales_ON.unsqueeze(-1), zeros_ON.unsqueeze(-1)).flatten(1)
    damped_II = damped(gram_II, _DAMPING)
    return rounding.stored(*refined(weight_OI, damped_II, rounding, (values_OI, scales_ON, zeros_ON), sweeps=sweeps))
