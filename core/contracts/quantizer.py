"""Contract of a quantizer: the formats in which a model's weights are kept."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

from drivetrain.contracts.plugin import Plugin

if TYPE_CHECKING:
    import torch


class Quantizer(Plugin):
    """Turns full-precision linear layers into quantized ones while a model is loaded, one module at a time, so that
    never more than one module is held in both forms.

    Optional ability: ``batch_invariant`` (a row's product does not depend on the other rows, to the last bit)."""

    kind = "quantizer"

    @abstractmethod
    def bits_per_weight(self) -> float | None:
        """Bits one quantized weight takes, scales included; None when weights keep the precision's dtype."""

    @abstractmethod
    def convert(self, name: str, linear: torch.nn.Linear) -> torch.nn.Module:
        """The module that replaces ``linear`` (weights loaded, on the device): same call, [..., in] -> [..., out].

        name: dotted path of the layer, so that a quantizer can leave out the ones it must not touch; returning
        ``linear`` itself keeps it as it is.
        """
