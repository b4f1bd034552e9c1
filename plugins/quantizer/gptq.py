"""Checkpoints in the GPTQ format."""

from __future__ import annotations

from drivetrain.plugins.quantizer.stored import StoredQuantizer


class GptqQuantizer(StoredQuantizer):
    """Checkpoints in the GPTQ format, used packed: 3 and 4 bits in groups, and 8 bits."""

    method = "gptq"
    format_name = "GPTQ"
    uses = ("linear_int4", "linear_int3", "linear_int8", "linear_gguf")
    how_to_get_one = "give it a GPTQ checkpoint of the model, or choose int8 or int4 for full weights"
