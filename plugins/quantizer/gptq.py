"""Checkpoints in the GPTQ format."""

from __future__ import annotations

from drivetrain.contracts.plugin import Probe
from drivetrain.plugins.quantizer.calibrated.quantizers import CalibratesGptq, GptqConfig
from drivetrain.plugins.quantizer.stored import StoredQuantizer


class GptqQuantizer(CalibratesGptq, StoredQuantizer):
    """Checkpoints in the GPTQ format, used packed: 3, 4 and 8 bits; drivetrain quantize makes them."""

    Config = GptqConfig
    config: GptqConfig

    method = "gptq"
    format_name = "GPTQ"
    uses = ("linear_int4", "linear_int3", "linear_int8", "linear_gguf")
    how_to_get_one = (
        "make a GPTQ checkpoint of the model with drivetrain quantize, or choose int8 or int4 for full weights"
    )

    @classmethod
    def probe_making(cls) -> Probe:
        return Probe.yes("makes them of full weights, by their inputs")
