"""GPTQ: weights are rounded column by column, and each column's error is made up for in those that are still to come.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (2022), algorithm 1,
with groups whose scales are taken from the weights as they are when the group begins. Beyond the paper, inputs may be
given factors as AWQ does (:mod:`.awq`), the best for rounding in this way.

Shapes: O output features; I input features; N groups of a row; g weights of a group; B columns of a block.
"""

from __future__ import annotations

import torch

from drivetrain.contracts.quantizer import InputStatistics
from drivetrain.errors import CalibrationError
from drivetrain.plugins.quantizer.calibrated.clipping import best_shares_apart
from drivetrain.plugins.quantizer.calibrated.grids import Rounding
from drivetrain.plugins.quantizer.calibrated.refining import DAMPING, damped, refined
from drivetrain.plugins.quantizer.formats import IntegerGrid

_MOST_DAMPING = 1.0
"""With this share of the mean diagonal added, any matrix of second moments has a Cholesky factor."""


def gptq(
    name: str,
    weight_OI: torch.Tensor,
    statistics: InputStatistics,
    rounding: Rounding,
    *,
    act_order: bool = False,
    damping: float = DAMPING,
    clips: bool = True,
    sweeps: int = 0,
) -> IntegerGrid:
    """Round a weight for the inputs that ``statistics`` describes.

    act_order: take the inputs with the largest second moments first, whose errors then can still be made up for.
    damping:   share of the mean diagonal that is added to it.
    clips:     search the share of a group's range that gives the least error, rather than taking all of it.
    sweeps:    how often scales and values are chosen again afterwards, at most (see :mod:`.refining`).
    Raises CalibrationError where the second moments have no Cholesky factor whatever is added.
    """
    gram_II = statistics.gram_II
    assert gram_II is not None, "it declares that it wants the second moments"
    order = _order(gram_II) if act_order else None
    if order is not None:
        weight_OI, gram_II = weight_OI[:, order], gram_II[order][:, order]
    upper_II = inverse_factor(name, gram_II, damping).to(weight_OI.dtype)
    # An input that is always 0 says nothing of its weights; they become the value of 0.
    weight_OI = weight_OI.masked_fill(gram_II.diagonal() == 0, 0)
    grid = rounded_columns(weight_OI, upper_II, gram_II.diagonal(), rounding, clips=clips)
    if sweeps:
        grid = refined(weight_OI, damped(gram_II, damping), rounding, grid, sweeps=sweeps)
    return rounding.stored(*grid, order)


def rounded_columns(
    weight_OI: torch.Tensor,
    upper_II: torch.Tensor,
    importance_I: torch.Tensor,
    rounding: Rounding,
    *,
    clips: bool,
    factors_OI: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values [O, I], scales and zero points [O, N] of a weight that is rounded column by column, as floats.

    upper_II:     of :func:`inverse_factor`.
    importance_I: mean squares of the inputs, by which ranges are cut.
    factors_OI:   what is rounded is the weight times these, for inputs that are divided by them; [1, I] for all outputs
                  alike. Weights and second moments are given as they are without.
    """
    rest_IO, lower_II = weight_OI.T.contiguous(), upper_II.T.contiguous()
    factors_IO = None if factors_OI is None else factors_OI.T.contiguous()
    values_IO = torch.empty_like(rest_IO)
    scales, zeros = [], []
    for first in range(0, rest_IO.shape[0], rounding.group):
        columns = slice(first, first + rounding.group)
        block_BO, by_BO = rest_IO[columns], None if factors_IO is None else factors_IO[columns]
        scaled_OB = (block_BO if by_BO is None else block_BO * by_BO).T
        share: float | torch.Tensor = 1.0
        if clips:
            squares_B1 = importance_I[columns].unsqueeze(1)
            squares_OB = (squares_B1 if by_BO is None else squares_B1 / by_BO**2).T
            share = best_shares_apart(scaled_OB, squares_OB, rounding)
        scales_O1, zeros_O1 = rounding.grids(scaled_OB.unsqueeze(1), share)
        errors_BO = _round_block(
            block_BO, values_IO[columns], lower_II[columns, columns], rounding, (scales_O1, zeros_O1), by_BO
        )
        rest_IO[columns.stop :].addmm_(lower_II[columns.stop :, columns], errors_BO, alpha=-1)
        scales.append(scales_O1)
        zeros.append(zeros_O1)
    return values_IO.T.contiguous(), torch.cat(scales, 1), torch.cat(zeros, 1)


def _order(gram_II: torch.Tensor) -> torch.Tensor:
    return torch.argsort(gram_II.diagonal(), descending=True, stable=True)


def _round_block(
    block_BO: torch.Tensor,
    values_BO: torch.Tensor,
    lower_BB: torch.Tensor,
    rounding: Rounding,
    grid: tuple[torch.Tensor, torch.Tensor],
    factors_BO: torch.Tensor | None,
) -> torch.Tensor:
    """Write the values of a block's weights, and return each column's error over its diagonal, [B, O], for the columns
    behind the block; the weights are used up."""
    scales_O, zeros_O = (part[:, 0].contiguous() for part in grid)
    errors_BO = torch.empty_like(block_BO)
    diagonal = lower_BB.diagonal().tolist()
    for place, pivot in enumerate(diagonal):
        column_O = block_BO[place]
        steps_O = scales_O if factors_BO is None else scales_O / factors_BO[place]
        values_O = rounding.values(column_O, steps_O, zeros_O)
        error_O = torch.sub(column_O, (values_O - zeros_O).mul_(steps_O), out=errors_BO[place]).div_(pivot)
        block_BO[place + 1 :].addr_(lower_BB[place + 1 :, place], error_O, alpha=-1)
        values_BO[place] = values_O
    return errors_BO


def inverse_factor(name: str, gram_II: torch.Tensor, damping: float) -> torch.Tensor:
    """The upper Cholesky factor of the inverse of the second moments, in float64."""
    wide_II = gram_II.double()
    diagonal = wide_II.diagonal()
    diagonal[diagonal == 0] = 1
    mean = float(diagonal.mean())
    share = damping
    while True:
        damped_II = wide_II.clone()
        damped_II.diagonal().add_(share * mean)
        lower_II, info = torch.linalg.cholesky_ex(damped_II)
        if int(info) == 0:
            inverse_II = torch.cholesky_inverse(lower_II)
            upper_II, info = torch.linalg.cholesky_ex(inverse_II, upper=True)
            if int(info) == 0:
                return upper_II
        if share >= _MOST_DAMPING:
            raise CalibrationError(
                "the second moments of the layer's inputs have no Cholesky factor",
                where=name,
                found=f"a diagonal from {float(diagonal.min()):.3g} to {float(diagonal.max()):.3g}",
                hint="Calibrate on more tokens (--tokens).",
            )
        share = min(_MOST_DAMPING, max(share, 1e-4) * 10)
