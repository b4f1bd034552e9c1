"""AWQ: inputs that are large get weights that are rounded finer.

Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration" (2023): a channel's
weights are multiplied by ``mean(|x|) ** ratio`` and its input is divided by it; the ratio is searched, then how much
of each group's range to cut. Errors are those of the layers' outputs over all calibration tokens, by second moments.

Beyond the paper, weights may be rounded column by column as GPTQ does, and scales and values chosen again. The ratio is
then the one that is best for that: factors that help rounding to nearest can harm it.

Shapes: O output features; I input features; N groups of a row; g weights of a group.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from drivetrain.contracts.quantizer import InputStatistics
from drivetrain.plugins.quantizer.calibrated.clipping import best_shares, diagonal_blocks
from drivetrain.plugins.quantizer.calibrated.gptq import inverse_factor, rounded_columns
from drivetrain.plugins.quantizer.calibrated.grids import Rounding
from drivetrain.plugins.quantizer.calibrated.refining import DAMPING, damped
from drivetrain.plugins.quantizer.formats import IntegerGrid

_LEAST_FACTOR = 1e-4

_MOST_ROWS = 128
"""Outputs of a weight that are rounded column by column for each ratio: enough to tell ratios apart."""

AT_ONCE_BYTES = 32 << 20
"""As many ratios are tried at a time as this holds, one at least."""

_COPIES = 9
"""Of the rows of a ratio: weights, factors, values and errors, by outputs and by inputs."""


def awq_factors(
    weights_OI: Mapping[str, torch.Tensor], statistics: InputStatistics, rounding: Rounding, steps: int
) -> torch.Tensor | None:
    """The factors with the least error over all weights that read the input and are rounded to nearest, [I]; None where
    none is best.

    steps: ratios that are tried, from 0 on and below 1.
    """
    gram_II = statistics.gram_II
    assert gram_II is not None, "it declares that it wants the second moments"

    def loss(weight_OI: torch.Tensor, factors_I: torch.Tensor) -> float:
        scaled_ONg = (weight_OI * factors_I).unflatten(1, (-1, rounding.group))
        rounded_OI = rounding.rounded(scaled_ONg).flatten(1) / factors_I
        return _loss(rounded_OI.sub_(weight_OI), gram_II)

    return _least(
        (sum(loss(weight_OI, factors_I) for weight_OI in weights_OI.values()), factors_I)
        for factors_I in _ratios(statistics, steps)
    )


def compensated_factors(
    weights_OI: Mapping[str, torch.Tensor],
    statistics: InputStatistics,
    rounding: Rounding,
    steps: int,
    *,
    clips: bool = True,
    damping: float = DAMPING,
) -> torch.Tensor | None:
    """The same for weights that are rounded column by column, judged by some of their outputs."""
    gram_II = statistics.gram_II
    assert gram_II is not None, "it declares that it wants the second moments"
    upper_II = inverse_factor(next(iter(weights_OI)), gram_II, damping).float()
    damped_II = damped(gram_II, damping)
    some = [weight_OI[:: -(-weight_OI.shape[0] // _MOST_ROWS)] for weight_OI in weights_OI.values()]
    rows_OI = torch.cat(some)
    # Of every weight as much as there is of it.
    shares_O = torch.cat(
        [
            rows.new_full((rows.shape[0],), weight_OI.shape[0] / rows.shape[0])
            for weight_OI, rows in zip(weights_OI.values(), some, strict=True)
        ]
    )

    def losses(factors_RI: torch.Tensor) -> list[float]:
        """Of several ratios at a time: short columns would cost more calls than work."""
        count = factors_RI.shape[0]
        values_OI, scales_ON, zeros_ON = rounded_columns(
            rows_OI.repeat(count, 1),
            upper_II,
            gram_II.diagonal(),
            rounding,
            clips=clips,
            factors_OI=factors_RI.repeat_interleave(rows_OI.shape[0], 0),
        )
        centred_ONg = values_OI.unflatten(1, (-1, rounding.group)) - zeros_ON.unsqueeze(2)
        rounded_ROI = (centred_ONg * scales_ON.unsqueeze(2)).flatten(1).unflatten(0, (count, -1))
        errors_ROI = rounded_ROI.div_(factors_RI.unsqueeze(1)).sub_(rows_OI)
        return [float(((error_OI @ damped_II) * error_OI).sum(1) @ shares_O) for error_OI in errors_ROI]

    ratios_RI = torch.stack(list(_ratios(statistics, steps)))
    at_once = max(1, AT_ONCE_BYTES // (_COPIES * rows_OI.numel() * rows_OI.element_size()))
    return _least(pair for some_RI in ratios_RI.split(at_once) for pair in zip(losses(some_RI), some_RI, strict=True))


def _ratios(statistics: InputStatistics, steps: int) -> Iterator[torch.Tensor]:
    """Factors for each ratio, the first all 1."""
    for step in range(steps):
        factors_I = statistics.mean_abs_I.clamp_min(_LEAST_FACTOR).pow(step / steps)
        yield factors_I / (factors_I.max() * factors_I.min()).sqrt()


def _least(tried: Iterator[tuple[float, torch.Tensor]]) -> torch.Tensor | None:
    """The factors with the least loss; None for the first, which change nothing."""
    least, _ = next(tried)
    best: torch.Tensor | None = None
    for loss, factors_I in tried:
        if loss < least:
            best, least = factors_I, loss
    return best


def _loss(error_OI: torch.Tensor, gram_II: torch.Tensor) -> float:
    """Squared error of a product, a token's mean over all outputs."""
    return float(((error_OI @ gram_II) * error_OI).sum())


def awq_grid(
    weight_OI: torch.Tensor, statistics: InputStatistics, rounding: Rounding, *, clips: bool = True
) -> IntegerGrid:
    """Round a weight whose factors are in it already, to nearest.

    clips: cut of each group's range what loses least.
    """
    gram_II = statistics.gram_II
    assert gram_II is not None, "it declares that it wants the second moments"
    if not clips:
        return rounding.grid(weight_OI)
    weight_ONg = weight_OI.unflatten(1, (-1, rounding.group))
    return rounding.grid(weight_OI, best_shares(weight_ONg, diagonal_blocks(gram_II, rounding.group), rounding))
