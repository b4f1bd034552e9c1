"""Callables that stand before a module's own ``forward``."""

from __future__ import annotations

from torch import nn


class FusedForward:
    """Base of the callables that a fusion sets as the ``forward`` of one module."""


def is_fused(part: nn.Module) -> bool:
    """Whether one of them stands before the class's own."""
    return isinstance(vars(part).get("forward"), FusedForward)
