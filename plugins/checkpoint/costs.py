"""Which operations are worth keeping: those that take long for the bytes of their result.

A product of [T, I] and [I, O] takes 2 I operations for each number of its result, attention takes as many as there are
keys; what works element by element, or over one row, takes a handful. So the results of products and attention are
kept, and everything between them is computed again.
"""

from __future__ import annotations

from typing import Any

from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear", "matmul", "einsum", "convolution")
_PARTS = ("linear", "attention", "flash", "scaled_dot_product")
"""Parts of names by which the operators of kernel providers are known too."""


def is_costly(operator: Any) -> bool:
    """Whether the result of an operator is worth its bytes."""
    name = operator.name() if hasattr(operator, "name") else str(operator)
    short = name.partition("::")[2].partition(".")[0]
    return short in _PRODUCTS or any(part in short for part in _PARTS)


def _decide(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if is_costly(operator) else CheckpointPolicy.PREFER_RECOMPUTE


def keep_costly() -> Any:
    """Contexts of the first and the second pass, for ``torch.utils.checkpoint.checkpoint``."""
    return create_selective_checkpoint_contexts(_decide)
