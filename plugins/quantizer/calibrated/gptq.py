"""GPTQ: weights are rounded column by column, and each column's error is made up for in those that are still to come.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (2022), algorithm 1,
with groups whose scales are taken from the weights as they are when the group begins.

Shapes: O output features; I input features; N groups of a row; g weights of a group; B columns of a block.
"""

from __future__ import annotations

import torch

from drivetrain.contracts.quantizer import InputStatistics
from drivetrain.errors import CalibrationError
from drivetrain.plugins.quantizer.calibrated.clipping import SHARES, best_shares
from drivetrain.plugins.quantizer.calibrated.grids import Rounding
from drivetrain.plugins.quantizer.calibrated.refining import damped, refined
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
    damping: float = 0.01,
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
    upper_II = _inverse_factor(name, gram_II, damping).to(weight_OI.dtype)
    # An input that is always 0 says nothing of its weights; they become the value of 0.
    weight_OI = weight_OI.masked_fill(gram_II.diagonal() == 0, 0)
    rest_OI = weight_OI.clone()
    importance_I = gram_II.diagonal()
    values_OI = torch.empty_like(rest_OI)
    scales, zeros = [], []
    for first in range(0, rest_OI.shape[1], rounding.group):
        columns = slice(first, first + rounding.group)
        block_OB = rest_OI[:, columns]
        share: float | torch.Tensor = 1.0
        if clips:
            share = best_shares(block_OB.unsqueeze(1), torch.diag(importance_I[columns]).unsqueeze(0), rounding, SHARES)
        scales_O1, zeros_O1 = rounding.grids(block_OB.unsqueeze(1), share)
        values_OI[:, columns], errors_OB = _round_block(
            block_OB, upper_II[columns, columns], rounding, scales_O1, zeros_O1
        )
        rest_OI[:, columns.stop :].addmm_(errors_OB, upper_II[columns, columns.stop :], alpha=-1)
        scales.append(scales_O1)
        zeros.append(zeros_O1)
    grid = values_OI, torch.cat(scales, 1), torch.cat(zeros, 1)
    if sweeps:
        grid = refined(weight_OI, damped(gram_II, damping), rounding, grid, sweeps=sweeps)
    return rounding.stored(*grid, order)


def _order(gram_II: torch.Tensor) -> torch.Tensor:
    return torch.argsort(gram_II.diagonal(), descending=True, stable=True)


def _round_block(
    block_OB: torch.Tensor,
    upper_BB: torch.Tensor,
    rounding: Rounding,
    scales_O1: torch.Tensor,
    zeros_O1: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values of a block's weights, and each column's error over its diagonal, for the columns behind the block."""
    scales_O, zeros_O = scales_O1[:, 0], zeros_O1[:, 0]
    values_OB, errors_OB = torch.empty_like(block_OB), torch.empty_like(block_OB)
    diagonal = upper_BB.diagonal().tolist()
    for place in range(block_OB.shape[1]):
        column_O = block_OB[:, place]
        values_O = rounding.values(column_O, scales_O, zeros_O)
        error_O = (column_O - (values_O - zeros_O) * scales_O) / diagonal[place]
        block_OB[:, place + 1 :].addr_(error_O, upper_BB[place, place + 1 :], alpha=-1)
        values_OB[:, place], errors_OB[:, place] = values_O, error_O
    return values_OB, errors_OB


def _inverse_factor(name: str, gram_II: torch.Tensor, damping: float) -> torch.Tensor:
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
