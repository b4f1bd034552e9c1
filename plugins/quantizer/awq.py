"""Checkpoints in the AWQ format."""

from __future__ import annotations

from drivetrain.contracts.plugin import Probe
from drivetrain.plugins.quantizer.calibrated.quantizers import AwqConfig, CalibratesAwq
from drivetrain.plugins.quantizer.stored import StoredQuantizer


class AwqQuantizer(CalibratesAwq, StoredQuantizer):
    """Checkpoints in the AWQ format, used packed: 4 bits in groups; drivetrain quantize makes them."""

    Config = AwqConfig
    config: AwqConfig

    method = "awq"
    format_name = "AWQ"
    uses = ("linear_int4",)
    how_to_get_one = (
        "make an AWQ checkpoint of the model with drivetrain quantize, or choose int8 or int4 for full weights"
    )

    @classmethod
    def probe_making(cls) -> Probe:
        return Probe.yes("makes them of full weights, by their inputs")
