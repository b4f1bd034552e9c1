"""Scales and zero points for groups of weights, and rounding to them.

Scales are rounded to float16 before anything is rounded to them, since that is what files hold them in.

Shapes: O output features; I input features; N groups of a row; g weights of a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from drivetrain.errors import ConfigError
from drivetrain.plugins.quantizer.formats import IntegerGrid

_SMALLEST = 2.0**-14
"""The smallest normal number of float16: smaller scales lose their digits."""


@dataclass(frozen=True)
class Rounding:
    """A form of integers.

    bits:      of a value.
    group:     weights of a row that share a scale and a zero point.
    symmetric: every zero point is the middle, so that none has to be looked up; otherwise it fits the group's range.
    """

    bits: int
    group: int
    symmetric: bool

    @property
    def highest(self) -> int:
        """The highest value; the lowest is 0."""
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        """The zero point of symmetric groups."""
        return 1 << (self.bits - 1)

    @property
    def bits_per_weight(self) -> float:
        """With a scale of float16 and a zero point of a byte for each group, as they are kept in memory."""
        return self.bits + 24 / self.group

    def grids(self, weight_ONg: torch.Tensor, share: float | torch.Tensor = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales and zero points, [O, N], for ``share`` of each group's range."""
        low_ON, high_ON = ranges(weight_ONg)
        return self.grids_of(low_ON * share, high_ON * share)

    def grids_of(self, low_ON: torch.Tensor, high_ON: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales and zero points for groups from ``low``, at most 0, to ``high``, at least 0.

        Zero points are 1 or more: the first version of the GPTQ format stores them less one.
        """
        if self.symmetric:
            scales_ON = torch.maximum(high_ON / (self.highest - self.middle), -low_ON / self.middle)
            scales_ON = storable(scales_ON)
            return scales_ON, torch.full_like(scales_ON, self.middle)
        scales_ON = storable((high_ON - low_ON) / self.highest)
        zeros_ON = (-low_ON / scales_ON).round_().clamp_max_(self.highest)
        # With a zero point of 1 one value fewer is left above it: wider steps, so that the largest weight is not cut.
        is_all_above = zeros_ON < 1
        scales_ON = torch.where(is_all_above, storable(high_ON / (self.highest - 1)), scales_ON)
        return scales_ON, zeros_ON.clamp_min_(1)

    def values(self, weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
        """The nearest values, as floats; scales and zeros broadcast against the weights."""
        return (weight / scales + zeros).round_().clamp_(0, self.highest)

    def rounded(self, weight_ONg: torch.Tensor, share: float | torch.Tensor = 1.0) -> torch.Tensor:
        """What the weights become."""
        scales_ON1, zeros_ON1 = (t.unsqueeze(-1) for t in self.grids(weight_ONg, share))
        return (self.values(weight_ONg, scales_ON1, zeros_ON1) - zeros_ON1) * scales_ON1

    def grid(self, weight_OI: torch.Tensor, share: float | torch.Tensor = 1.0) -> IntegerGrid:
        """Weights rounded to nearest. share: of each group's range; one number, or [O, N]."""
        weight_ONg = weight_OI.unflatten(1, (-1, self.group))
        scales_ON, zeros_ON = self.grids(weight_ONg, share)
        values = self.values(weight_ONg, scales_ON.unsqueeze(-1), zeros_ON.unsqueeze(-1))
        return self.stored(values.flatten(1), scales_ON, zeros_ON)

    def stored(
        self,
        values_OI: torch.Tensor,
        scales_ON: torch.Tensor,
        zeros_ON: torch.Tensor,
        order: torch.Tensor | None = None,
    ) -> IntegerGrid:
        """These values, scales and zero points, as floats, in the form of files."""
        return IntegerGrid(
            self.bits, values_OI.to(torch.uint8), scales_ON.to(torch.float16), zeros_ON.to(torch.uint8), order
        )


def ranges(weight_ONg: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The least and the largest weight of each group, [O, N], and 0 where that is beyond."""
    return weight_ONg.amin(-1).clamp_max(0), weight_ONg.amax(-1).clamp_min(0)


def storable(scales_ON: torch.Tensor) -> torch.Tensor:
    """Scales as float16 holds them; a group of zeros has none of its own, and any will do but 0."""
    return scales_ON.clamp_min(_SMALLEST).to(torch.float16).float()


def check_group(name: str, width: int, rounding: Rounding) -> None:
    """Raise ConfigError for a layer whose rows of ``width`` weights are no whole groups."""
    if width % rounding.group:
        raise ConfigError(
            f"rows of {width} weights are no whole number of groups of {rounding.group}",
            where=name,
            found=f"in_features {width}, group {rounding.group}",
            allowed=f"a group that divides {width}",
            hint=f"Set another quantizer.group, or give the layer another quantizer with a rule: "
            f"quantizer.rules: {{{name}: int8}}.",
        )


def check_range(name: str, weight_OI: torch.Tensor, rounding: Rounding) -> None:
    """Raise ConfigError for weights whose scales float16 can't hold."""
    most = torch.finfo(torch.float16).max * rounding.middle
    largest = float(weight_OI.abs().max()) if weight_OI.numel() else 0.0
    if largest > most:
        raise ConfigError(
            "weights are so large that float16 holds no scale for them",
            where=name,
            found=f"{largest:.3g}",
            allowed=f"at most {most:.3g}",
            hint=f"Keep the layer as it is with a rule: quantizer.rules: {{{name}: none}}.",
        )
