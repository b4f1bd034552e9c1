"""Drawing tokens in plain torch, with the settings of each row in tensors: nothing waits for the device.

Shapes: S sequences; V vocabulary.
"""

from __future__ import annotations

import math

import torch

LEAST_TEMPERATURE = 1e-30
"""Anything less is no normal float32, and draws the most likely token just the same."""


@torch.no_grad()
def sample(
    logits_SV: torch.Tensor,
    temperature_S: torch.Tensor,
    top_k_S: torch.Tensor,
    top_p_S: torch.Tensor,
    min_p_S: torch.Tensor,
    draws_S: torch.Tensor,
) -> torch.Tensor:
    """One token a row, int64 [S]: by inverting the cumulative sum of its distribution, or the best one."""
    scores_SV = logits_SV.to(torch.promote_types(logits_SV.dtype, torch.float32))
    best_S = scores_SV.argmax(dim=-1)
    cumulative_SV = _filtered(scores_SV, temperature_S, top_k_S, top_p_S, min_p_S).double().cumsum(dim=-1)
    points_S1 = draws_S.double().unsqueeze(1) * cumulative_SV[:, -1:]
    drawn_S = torch.searchsorted(cumulative_SV, points_S1, right=True).squeeze(1).clamp(max=logits_SV.shape[-1] - 1)
    return torch.where(temperature_S <= 0, best_S, drawn_S)


def _filtered(
    scores_SV: torch.Tensor,
    temperature_S: torch.Tensor,
    top_k_S: torch.Tensor,
    top_p_S: torch.Tensor,
    min_p_S: torch.Tensor,
) -> torch.Tensor:
    """The distribution of each row; each filter works on what the one before left."""
    vocab_size = scores_SV.shape[-1]
    # Distances from the best score have the same distribution, and no temperature turns them into infinity - infinity.
    scores_SV = scores_SV - scores_SV.amax(dim=-1, keepdim=True)
    scores_SV = scores_SV / temperature_S.to(scores_SV.dtype).clamp(min=LEAST_TEMPERATURE).unsqueeze(1)
    sorted_SV, token_SV = scores_SV.sort(dim=-1, descending=True, stable=True)
    limit_S1 = torch.where(top_k_S > 0, top_k_S, vocab_size).clamp(max=vocab_size).unsqueeze(1)
    sorted_SV = sorted_SV.masked_fill(sorted_SV < sorted_SV.gather(1, limit_S1 - 1), -math.inf)
    probs_SV = sorted_SV.softmax(dim=-1)
    before_SV = probs_SV.cumsum(dim=-1) - probs_SV
    top_p_S1, min_p_S1 = top_p_S.unsqueeze(1), min_p_S.unsqueeze(1)
    outside_SV = (before_SV >= top_p_S1) & (top_p_S1 < 1)
    outside_SV[:, :1] = False  # the most likely token stays whatever p is
    probs_SV = _renormalized(probs_SV.masked_fill(outside_SV, 0))
    floor_S1 = probs_SV.amax(dim=-1, keepdim=True) * min_p_S1
    probs_SV = _renormalized(probs_SV.masked_fill(probs_SV < floor_S1, 0))
    return torch.zeros_like(probs_SV).scatter(1, token_SV, probs_SV)


def _renormalized(probs_SV: torch.Tensor) -> torch.Tensor:
    return probs_SV / probs_SV.sum(dim=-1, keepdim=True)
