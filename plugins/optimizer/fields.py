"""Checks of options that several optimizers have."""

from __future__ import annotations


def check_betas(betas: tuple[float, float]) -> tuple[float, float]:
    """Each is the share of a running mean that stays in a step: with 1, it would never begin."""
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError("must be numbers from 0 on, below 1")
    return betas
