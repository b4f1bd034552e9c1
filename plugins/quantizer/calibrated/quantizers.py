"""What the quantizers ``gptq``, ``awq`` and ``w8a8`` do in ``drivetrain quantize``: mixed into their classes.

Shapes: O output features; I input features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field

from drivetrain.contracts.packed import PackedWeight
from drivetrain.contracts.quantizer import InputStatistics, QuantizerConfig
from drivetrain.errors import ConfigError
from drivetrain.plugins.quantizer.calibrated.awq import AT_ONCE_BYTES, awq_factors, awq_grid, compensated_factors
from drivetrain.plugins.quantizer.calibrated.gptq import gptq
from drivetrain.plugins.quantizer.calibrated.grids import Rounding, check_group, check_range
from drivetrain.plugins.quantizer.calibrated.refining import DAMPING
from drivetrain.plugins.quantizer.calibrated.smooth import smoothing_factors
from drivetrain.plugins.quantizer.formats import IntegerGrid, write_quantized

if TYPE_CHECKING:
    from pathlib import Path

    from drivetrain.contracts.loader import Checkpoint

_FLOAT32, _FLOAT64 = 4, 8


class GroupsConfig(QuantizerConfig):
    """Options of a calibrated quantizer of 3 and 4 bits; files that are packed already have their own."""

    bits: Literal[3, 4] = Field(4, description="of a weight, for drivetrain quantize")
    group: Literal[16, 32, 64, 128] = Field(
        64,
        description="weights of a row that share a scale and a zero point, for drivetrain quantize; it must divide the "
        "inputs of every layer",
    )
    clip: bool = Field(
        True,
        description="cut of each group's range what loses least, instead of keeping all of it; drivetrain quantize",
    )
    sweeps: int = Field(
        8,
        ge=0,
        le=100,
        description="how often every scale and value is chosen again once all are rounded, at most; 0 leaves the "
        "published algorithm; drivetrain quantize",
    )
    steps: int = Field(
        10,
        ge=1,
        le=100,
        description="ratios that are tried for an input's factors, which move into the norm or the layer before; 1 for "
        "no factors; drivetrain quantize",
    )
    damping: float = Field(
        DAMPING, gt=0, le=1, description="share of the mean second moment that is added to all; drivetrain quantize"
    )


class GptqConfig(GroupsConfig):
    """Options of the quantizer ``gptq``."""

    symmetric: bool = Field(
        False, description="zero points all in the middle, which some kernels need, and less exact; drivetrain quantize"
    )
    act_order: bool = Field(
        False,
        description="round the weights of the largest inputs first: more exact, and the inputs have to be gathered in "
        "that order whenever the layer is used; drivetrain quantize",
    )


class AwqConfig(GroupsConfig):
    """Options of the quantizer ``awq``."""


class SmoothConfig(QuantizerConfig):
    """Options of the quantizer ``w8a8``."""

    smoothing: float = Field(
        0.5,
        ge=0,
        le=1,
        description="how much of what is hard to round moves from the activations into the weights, for drivetrain "
        "quantize; 0 for nothing",
    )


class SavesPacked:
    """Writes a model folder in one of the formats of :mod:`drivetrain.plugins.quantizer.formats`."""

    saves_as: str = "compressed-tensors"

    def save(
        self,
        folder: Path,
        source: Checkpoint,
        packed: Iterable[tuple[str, PackedWeight]],
        changed: Mapping[str, torch.Tensor],
        notes: Mapping[str, Any],
        wrote: Callable[[str, int], None],
    ) -> None:
        write_quantized(folder, source, packed, self.saves_as, changed=changed, notes=notes, wrote=wrote)


class CalibratesSmooth(SavesPacked):
    """SmoothQuant: factors for inputs, and weights that are rounded to nearest after them."""

    config: Any

    wants_gram = False

    def work_bytes(self, name: str, out_features: int, in_features: int) -> int:
        return 6 * _FLOAT32 * out_features * in_features

    def input_factors(self, weights_OI: Mapping[str, torch.Tensor], statistics: InputStatistics) -> torch.Tensor | None:
        strength = self.config.smoothing
        return smoothing_factors(weights_OI.values(), statistics, strength) if strength else None


class _CalibratesGroups(SavesPacked):
    config: Any

    wants_gram = True

    @property
    def _rounding(self) -> Rounding:
        config = self.config
        return Rounding(config.bits, config.group, getattr(config, "symmetric", False))

    def _compensated(
        self, name: str, weight_OI: torch.Tensor, statistics: InputStatistics, *, act_order: bool = False
    ) -> IntegerGrid:
        config = self.config
        return gptq(
            name,
            weight_OI,
            statistics,
            self._rounding,
            act_order=act_order,
            damping=config.damping,
            clips=config.clip,
            sweeps=config.sweeps,
        )

    def _compensated_factors(
        self, weights_OI: Mapping[str, torch.Tensor], statistics: InputStatistics
    ) -> torch.Tensor | None:
        config = self.config
        if config.steps == 1:  # no ratio but that of no factors
            return None
        return compensated_factors(
            weights_OI, statistics, self._rounding, config.steps, clips=config.clip, damping=config.damping
        )

    def _compensating_bytes(self, out_features: int, in_features: int) -> int:
        # The second moments in float64 three times, and once more in order; beside them first the ratios that are tried
        # at a time, then weights, values and errors, and what values and scales are chosen again by.
        moments = (4 * _FLOAT64 + 2 * _FLOAT32) * in_features**2
        return moments + max(AT_ONCE_BYTES, 8 * _FLOAT32 * out_features * in_features)


class CalibratesGptq(_CalibratesGroups):
    """GPTQ over the inputs of each layer, saved in the GPTQ format."""

    saves_as = "gptq"

    def work_bytes(self, name: str, out_features: int, in_features: int) -> int:
        check_group(name, in_features, self._rounding)
        self._check_words(name, out_features, in_features)
        return self._compensating_bytes(out_features, in_features)

    def input_factors(self, weights_OI: Mapping[str, torch.Tensor], statistics: InputStatistics) -> torch.Tensor | None:
        for name, weight_OI in weights_OI.items():
            check_range(name, weight_OI, self._rounding)
        return self._compensated_factors(weights_OI, statistics)

    def _check_words(self, name: str, out_features: int, in_features: int) -> None:
        """Raise ConfigError, before anything is computed, for sizes that files of the format can't hold."""
        multiple = 32 if self.config.bits == 3 else 8
        for size, what in ((in_features, "inputs"), (out_features, "outputs")):
            if size % multiple:
                raise ConfigError(
                    f"the {what} of the layer fill no whole words of the GPTQ format",
                    where=name,
                    found=size,
                    allowed=f"multiples of {multiple}",
                    hint=f"Keep the layer as it is with a rule: quantizer.rules: {{{name}: none}}.",
                )

    def pack(self, name: str, weight_OI: torch.Tensor, statistics: InputStatistics) -> PackedWeight:
        check_range(name, weight_OI, self._rounding)
        return self._compensated(name, weight_OI, statistics, act_order=self.config.act_order).packed()


class CalibratesAwq(_CalibratesGroups):
    """AWQ over the inputs of each layer, saved in the AWQ format; of 3 bits, which it does not have, as
    compressed-tensors."""

    @property
    def saves_as(self) -> str:  # type: ignore[override]
        return "awq" if self.config.bits == 4 else "compressed-tensors"

    def work_bytes(self, name: str, out_features: int, in_features: int) -> int:
        check_group(name, in_features, self._rounding)
        # Weights of several layers that read one input, in float32, beside rounded copies of one.
        nearest = 10 * _FLOAT32 * out_features * in_features
        return max(nearest, self._compensating_bytes(out_features, in_features)) if self.config.sweeps else nearest

    def input_factors(self, weights_OI: Mapping[str, torch.Tensor], statistics: InputStatistics) -> torch.Tensor | None:
        for name, weight_OI in weights_OI.items():
            check_range(name, weight_OI, self._rounding)
        if self.config.sweeps or self.config.steps == 1:
            return self._compensated_factors(weights_OI, statistics)
        return awq_factors(weights_OI, statistics, self._rounding, self.config.steps)

    def pack(self, name: str, weight_OI: torch.Tensor, statistics: InputStatistics) -> PackedWeight:
        check_range(name, weight_OI, self._rounding)
        if not self.config.sweeps:
            return awq_grid(weight_OI, statistics, self._rounding, clips=self.config.clip).packed()
        return self._compensated(name, weight_OI, statistics).packed()
