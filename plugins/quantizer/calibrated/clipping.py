"""The share of a group's range that loses least: what lies beyond is cut, and the rest is rounded finer.

Shapes: O output features; N groups of a row; g weights of a group.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from drivetrain.plugins.quantizer.calibrated.grids import Rounding, ranges

SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)


def best_shares(
    weight_ONg: torch.Tensor, gram_Ngg: torch.Tensor, rounding: Rounding, shares: Sequence[float] = SHARES
) -> torch.Tensor:
    """For each group the share of its range with the least ``dw gram dw``, [O, N]; of equals the largest.

    gram_Ngg: second moments of the inputs of each group.
    """
    best_ON = torch.full(weight_ONg.shape[:2], shares[0], device=weight_ONg.device)
    least_ON = torch.full_like(best_ON, torch.inf)
    for share in shares:
        error_ONg = rounding.rounded(weight_ONg, share) - weight_ONg
        loss_ON = group_losses(error_ONg, gram_Ngg)
        is_less = loss_ON < least_ON
        best_ON = torch.where(is_less, share, best_ON)
        least_ON = torch.where(is_less, loss_ON, least_ON)
    return best_ON


def best_shares_apart(
    weight_OB: torch.Tensor, squares_OB: torch.Tensor, rounding: Rounding, shares: Sequence[float] = SHARES
) -> torch.Tensor:
    """The same of one group, [O, 1], with inputs that are taken for having nothing to do with each other.

    squares_OB: mean squares of the inputs; [1, B] for all outputs alike.
    """
    low_O, high_O = ranges(weight_OB)
    best_O = torch.full_like(low_O, shares[0])
    least_O = torch.full_like(low_O, torch.inf)
    error_OB = torch.empty_like(weight_OB)
    for share in shares:
        scales_O1, zeros_O1 = (part.unsqueeze(1) for part in rounding.grids_of(low_O * share, high_O * share))
        torch.div(weight_OB, scales_O1, out=error_OB).add_(zeros_O1).round_().clamp_(0, rounding.highest)
        error_OB.sub_(zeros_O1).mul_(scales_O1).sub_(weight_OB)
        loss_O = error_OB.square_().mul_(squares_OB).sum(1)
        is_less = loss_O < least_O
        best_O[is_less] = share
        least_O = torch.where(is_less, loss_O, least_O)
    return best_O.unsqueeze(1)


def group_losses(error_ONg: torch.Tensor, gram_Ngg: torch.Tensor) -> torch.Tensor:
    """``dw gram dw`` of each group by itself, [O, N]."""
    product_NOg = torch.bmm(error_ONg.transpose(0, 1), gram_Ngg)
    return (product_NOg.transpose(0, 1) * error_ONg).sum(-1)


def diagonal_blocks(gram_II: torch.Tensor, group: int) -> torch.Tensor:
    """The blocks of each group's inputs with each other, [N, g, g]."""
    count = gram_II.shape[0] // group
    return torch.stack([gram_II[n * group : (n + 1) * group, n * group : (n + 1) * group] for n in range(count)])
