"""What quantizers share: packing a weight some rows at a time.

Shapes: O output features; I input features.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from drivetrain.errors import ConfigError

WEIGHTS_AT_ONCE = 2**18
"""Weights that are packed in one go. Small enough for a cache, large enough to hide what a call costs."""

SCRATCH_BYTES = 32 * 2**20
"""What packing some rows may take on the side: 2**18 weights of 4 bytes, 32 times; the ledger counts on it."""

PackRows = Callable[[torch.Tensor], dict[str, torch.Tensor]]
"""Rows of a weight, float32 [N, I] -> their packed tensors by name, each with N rows."""


def pack_rows(weight_OI: torch.Tensor, pack: PackRows) -> dict[str, torch.Tensor]:
    """The packed tensors of a whole weight, made from some rows at a time: however large the layer, what is held beside
    it and its packed form is bounded. Works on the meta device, and leaves the weight as it is."""
    num_rows, width = weight_OI.shape
    step = max(1, WEIGHTS_AT_ONCE // max(1, width))
    made: dict[str, torch.Tensor] = {}
    # Without values, one row says all there is to say.
    is_meta = weight_OI.device.type == "meta"
    for first in range(0, 1 if is_meta else num_rows, step):
        for name, part in pack(weight_OI[first : first + step].detach().float()).items():
            if name not in made:
                made[name] = part.new_empty(num_rows, *part.shape[1:])
            if not is_meta:
                made[name][first : first + step] = part
    return made


def checked_group(name: str, in_features: int, group: int) -> None:
    """Raise ConfigError unless rows of ``in_features`` weights are whole groups."""
    if in_features % group:
        raise ConfigError(
            f"rows of {in_features} weights are no whole number of groups of {group}",
            where=name,
            found=f"in_features {in_features}, group {group}",
            allowed=f"a group that divides {in_features}",
            hint=f"Set another quantizer.group, or give the layer another quantizer with a rule: "
            f"quantizer.rules: {{{name}: int8}}.",
        )
