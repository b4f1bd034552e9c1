"""Improves rounded weights: scales and values are chosen again, one after the other, while the rest stays as it is.

Every step has the least error of the layer's output over what it may change, so that none can make it larger. Each
group's scale has its least squares first; then each of its values is rounded for the error that all others leave, those
before it and those behind it, where GPTQ only knows what is behind.

Shapes: O output features; I input features; N groups of a row; B columns of a group.
"""

from __future__ import annotations

import torch

from drivetrain.plugins.quantizer.calibrated.grids import Rounding, storable

DAMPING = 0.1
"""Share of the mean second moment that is added to all. The paper takes 0.01: where all values are chosen again and
again, those that few tokens set apart by chance are fitted to it, and other text loses."""


def refined(
    weight_OI: torch.Tensor,
    gram_II: torch.Tensor,
    rounding: Rounding,
    grid: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    *,
    sweeps: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values [O, I], scales and zero points [O, N], as floats, with less error than those of ``grid``, or the same.

    gram_II: second moments of the inputs; the error is the mean of ``|dW x|^2``.
    sweeps:  how often all groups are gone through, at most; it ends when nothing changes any more.
    """
    values_OI, scales_ON, zeros_ON = (part.clone() for part in grid)
    groups = values_OI.unflatten(1, (-1, rounding.group))
    rounded_OI = ((groups - zeros_ON.unsqueeze(2)) * scales_ON.unsqueeze(2)).flatten(1)
    # Half of how fast the error falls as a weight grows.
    slopes_OI = (weight_OI - rounded_OI) @ gram_II
    for _ in range(sweeps):
        changed = False
        for number in range(scales_ON.shape[1]):
            columns = slice(number * rounding.group, (number + 1) * rounding.group)
            gram_BB = gram_II[columns, columns]
            slopes_BO, values_BO = slopes_OI[:, columns].T.contiguous(), values_OI[:, columns].T.contiguous()
            zeros_O, before_O = zeros_ON[:, number], scales_ON[:, number].clone()
            before_BO = (values_BO - zeros_O) * before_O
            scales_O = _fitted(values_BO - zeros_O, before_O, slopes_BO, gram_BB)
            slopes_BO -= gram_BB @ ((values_BO - zeros_O) * (scales_O - before_O))
            _choose_values(values_BO, slopes_BO, scales_O, zeros_O, gram_BB, rounding)
            change_BO = (values_BO - zeros_O) * scales_O - before_BO
            if not bool(change_BO.any()):
                continue
            changed = True
            slopes_OI.addmm_(change_BO.T, gram_II[columns], alpha=-1)
            values_OI[:, columns], scales_ON[:, number] = values_BO.T, scales_O
        if not changed:
            break
    return values_OI, scales_ON, zeros_ON


def _fitted(
    centred_BO: torch.Tensor, scales_O: torch.Tensor, slopes_BO: torch.Tensor, gram_BB: torch.Tensor
) -> torch.Tensor:
    """The scales with the least error for values as they are, as files hold them; only where they gain something."""
    gain_O = (centred_BO * slopes_BO).sum(0)
    curvature_O = ((gram_BB @ centred_BO) * centred_BO).sum(0)
    best_O = storable(scales_O + gain_O / curvature_O.clamp_min(torch.finfo(torch.float32).tiny))
    change_O = best_O - scales_O
    is_less = 2 * change_O * gain_O - change_O**2 * curvature_O > 0
    return torch.where(is_less & torch.isfinite(best_O), best_O, scales_O)


def _choose_values(
    values_BO: torch.Tensor,
    slopes_BO: torch.Tensor,
    scales_O: torch.Tensor,
    zeros_O: torch.Tensor,
    gram_BB: torch.Tensor,
    rounding: Rounding,
) -> None:
    """Round each column of a group for the error that all the others leave; ``slopes_BO`` are used up."""
    diagonal = gram_BB.diagonal().tolist()
    for place, moment in enumerate(diagonal):
        if moment <= 0:
            continue
        before_O = values_BO[place]
        wanted_O = (before_O - zeros_O) * scales_O + slopes_BO[place] / moment
        found_O = rounding.values(wanted_O, scales_O, zeros_O)
        change_O = (found_O - before_O) * scales_O
        values_BO[place] = found_O
        slopes_BO[place + 1 :].addr_(gram_BB[place + 1 :, place], change_O, alpha=-1)


def damped(gram_II: torch.Tensor, share: float) -> torch.Tensor:
    """Second moments with a share of the mean diagonal added to it."""
    damped_II = gram_II.clone()
    damped_II.diagonal().add_(share * float(gram_II.diagonal().mean()))
    return damped_II
