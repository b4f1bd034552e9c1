"""Weights as 4-bit integers in groups that share a scale and a minimum; activations as they are, or rounded to int8.

Shapes: N some rows; I input features; O output features; G groups of a row; g weights of a group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field

from drivetrain.contracts.packed import PackedWeight
from drivetrain.contracts.quantizer import Declaration, Quantizer, QuantizerConfig
from drivetrain.errors import ConfigError
from drivetrain.packed import PackedLinear, checked_group, pack_rows
from drivetrain.plugins.quantizer.calibrated.quantizers import SavesPacked

if TYPE_CHECKING:
    from torch import nn

Grid = tuple[torch.Tensor, torch.Tensor]
"""Scales and minima, each [N, G]."""

FitGrid = Callable[[torch.Tensor, torch.Tensor], Grid]
"""Weights and their codes, each [N, G, g] -> the grid with the least squared error for these codes."""

_MOST = 15
"""The largest of the 16 codes."""

_BLOCK = 32
"""Inputs that share a scale where activations are rounded."""

_CENTRE = 8
"""The code of zero where codes are symmetric."""

_SHARES = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.75, 0.7)
"""Shares of a group's range that the search tries: a narrower range rounds most weights finer, and cuts the largest."""


class Int4Config(QuantizerConfig):
    """Options of the quantizer ``int4``."""

    group: Literal[16, 32, 64, 128, 256] = Field(
        32, description="weights of a row that share a scale and a minimum; it must divide the inputs of every layer"
    )
    symmetric: bool = Field(
        False, description="codes lie evenly around zero: what GPTQ and others expect, at the same size and less exact"
    )
    rounding: Literal["nearest", "search"] = Field(
        "nearest",
        description="nearest: of the range from the smallest to the largest weight of a group; search: of the range "
        "and the scale with the least squared error, which takes some ten times as long to load",
    )
    scale_dtype: Literal["float16", "float32"] = Field(
        "float16", description="of scales and minima; float32 for weights beyond float16, at twice their bits"
    )
    activations: Literal["none", "int8"] = Field(
        "none",
        description="none: as they are; int8: rounded while they are used, with a scale for each 32 inputs of a token, "
        "which makes products of integers of them",
    )


class Int4Quantizer(SavesPacked, Quantizer):
    """Weights as 4-bit integers in groups with a scale and a minimum; activations as they are, or rounded to int8."""

    Config = Int4Config
    config: Int4Config

    def bits_per_weight(self) -> float | None:
        """4, and a scale and a minimum for each group: 5 for groups of 32 in float16, 4.5 for 64."""
        return 4 + 2 * 8 * self._scale_dtype.itemsize / self.config.group

    def declares(self) -> Declaration:
        config = self.config
        form = "symmetric" if config.symmetric else "asymmetric"
        weights = f"int4, {form}, a {config.scale_dtype} scale and minimum for each {config.group} weights"
        if config.activations == "int8":
            rounded = "int8, a scale for each 32 inputs of a token, dynamic"
            return Declaration(weights, rounded, group_size=config.group, operations=("linear_int4_a8",))
        return Declaration(weights, group_size=config.group, operations=("linear_int4",))

    def convert(self, name: str, linear: nn.Linear) -> nn.Module:
        config = self.config
        checked_group(name, linear.in_features, config.group)
        if config.activations == "int8":
            checked_group(name, linear.in_features, _BLOCK)
        packed = pack_int4(
            linear.weight,
            config.group,
            is_symmetric=config.symmetric,
            searches=config.rounding == "search",
            scale_dtype=self._scale_dtype,
        )
        self._check_range(name, packed)
        if config.activations == "int8":
            packed = replace(packed, operation="linear_int4_a8")
        bias = None if linear.bias is None else linear.bias.detach().clone()
        return PackedLinear(packed, bias).train(linear.training)

    @property
    def _scale_dtype(self) -> torch.dtype:
        return torch.float16 if self.config.scale_dtype == "float16" else torch.float32

    def _check_range(self, name: str, packed: PackedWeight) -> None:
        """Raise ConfigError for weights so large that their scale or minimum is no number of its dtype."""
        if packed.tensors["weight"].device.type == "meta":
            return
        beyond = sum(int((~torch.isfinite(packed.tensors[part])).sum()) for part in ("scales", "mins"))
        if beyond:
            raise ConfigError(
                f"{beyond} scales and minima are too large for {self.config.scale_dtype}",
                where=name,
                hint="Set quantizer.scale_dtype: float32.",
            )


def pack_int4(
    weight_OI: torch.Tensor,
    group: int,
    *,
    is_symmetric: bool = False,
    searches: bool = False,
    scale_dtype: torch.dtype = torch.float16,
) -> PackedWeight:
    """The weight in the layout of ``linear_int4``; ``group`` divides I."""
    packs = partial(_pack_groups, group, is_symmetric, searches, scale_dtype)
    num_rows, width = weight_OI.shape
    return PackedWeight("linear_int4", pack_rows(weight_OI, packs), num_rows, width, {"group": group})


def _pack_groups(
    group: int, is_symmetric: bool, searches: bool, scale_dtype: torch.dtype, weight_NI: torch.Tensor
) -> dict[str, torch.Tensor]:
    weight_NGg = weight_NI.unflatten(1, (-1, group))
    whole = _symmetric_grid(weight_NGg) if is_symmetric else _asymmetric_grid(weight_NGg)
    grid = _rounded(whole, scale_dtype)
    if searches:
        grid = _best_grid(weight_NGg, whole, _fit_symmetric if is_symmetric else _fit_asymmetric, scale_dtype)
    codes_NI = _codes(weight_NGg, grid).to(torch.uint8).flatten(1)
    return {
        "weight": codes_NI[:, ::2] | (codes_NI[:, 1::2] << 4),
        "scales": grid[0].to(scale_dtype),
        "mins": grid[1].to(scale_dtype),
    }


def _asymmetric_grid(weight_NGg: torch.Tensor) -> Grid:
    """16 codes from the smallest to the largest weight."""
    low_NG, high_NG = weight_NGg.amin(-1), weight_NGg.amax(-1)
    return (high_NG - low_NG) / _MOST, low_NG


def _symmetric_grid(weight_NGg: torch.Tensor) -> Grid:
    """Codes -8 .. 7 times a scale whose sign gives -8 to the weight that is the furthest from zero."""
    low_NG, high_NG = weight_NGg.amin(-1), weight_NGg.amax(-1)
    scales_NG = torch.where(-low_NG > high_NG, low_NG, high_NG) / -_CENTRE
    return scales_NG, -_CENTRE * scales_NG


def _narrowed(grid: Grid, share: float, is_symmetric: bool) -> Grid:
    """The grid over ``share`` of its range: around zero, or around the middle of the group."""
    scales_NG, mins_NG = grid
    if is_symmetric:
        return scales_NG * share, mins_NG * share
    return scales_NG * share, mins_NG + scales_NG * (_MOST * (1 - share) / 2)


def _rounded(grid: Grid, dtype: torch.dtype) -> Grid:
    """The grid as it will be stored, so that codes are chosen for what they will mean."""
    scales_NG, mins_NG = grid
    return scales_NG.to(dtype).float(), mins_NG.to(dtype).float()


def _codes(weight_NGg: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The nearest code of each weight, as floats. Where all weights of a group are equal, so are their codes: 0."""
    scales_NG1, mins_NG1 = (part.unsqueeze(-1) for part in grid)
    safe_NG1 = torch.where(scales_NG1 == 0, 1.0, scales_NG1)
    return ((weight_NGg - mins_NG1) / safe_NG1).round_().clamp_(0, _MOST)


def _error(weight_NGg: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Squared error of each group, [N, G]."""
    scales_NG1, mins_NG1 = (part.unsqueeze(-1) for part in grid)
    return (_codes(weight_NGg, grid) * scales_NG1 + mins_NG1 - weight_NGg).square_().sum(-1)


def _best_grid(weight_NGg: torch.Tensor, whole: Grid, fit: FitGrid, scale_dtype: torch.dtype) -> Grid:
    """Of the grids over the whole range and over narrower ones, as they are and fitted to the codes that they give, the
    one with the least squared error, group by group: never worse than the whole range rounded to nearest."""
    best = _rounded(whole, scale_dtype)
    least_NG = _error(weight_NGg, best)
    for share in _SHARES:
        narrowed = _rounded(_narrowed(whole, share, fit is _fit_symmetric), scale_dtype)
        fitted = _rounded(fit(weight_NGg, _codes(weight_NGg, narrowed)), scale_dtype)
        for grid in (narrowed, fitted):
            error_NG = _error(weight_NGg, grid)
            is_better_NG = error_NG < least_NG
            least_NG = torch.where(is_better_NG, error_NG, least_NG)
            best = (torch.where(is_better_NG, grid[0], best[0]), torch.where(is_better_NG, grid[1], best[1]))
    return best


def _fit_asymmetric(weight_NGg: torch.Tensor, codes_NGg: torch.Tensor) -> Grid:
    """The line ``scale * code + min`` through a group with the least squared error: ordinary linear regression."""
    mean_code_NG1, mean_weight_NG1 = codes_NGg.mean(-1, keepdim=True), weight_NGg.mean(-1, keepdim=True)
    away_NGg = codes_NGg - mean_code_NG1
    spread_NG = away_NGg.square().sum(-1)
    scales_NG = (away_NGg * (weight_NGg - mean_weight_NG1)).sum(-1) / torch.where(spread_NG == 0, 1.0, spread_NG)
    return scales_NG, mean_weight_NG1.squeeze(-1) - scales_NG * mean_code_NG1.squeeze(-1)


def _fit_symmetric(weight_NGg: torch.Tensor, codes_NGg: torch.Tensor) -> Grid:
    """The line through zero with the least squared error."""
    signed_NGg = codes_NGg - _CENTRE
    size_NG = signed_NGg.square().sum(-1)
    scales_NG = (signed_NGg * weight_NGg).sum(-1) / torch.where(size_NG == 0, 1.0, size_NG)
    return scales_NG, -_CENTRE * scales_NG
