"""Checkpoints in the AWQ format."""

from __future__ import annotations

from drivetrain.plugins.quantizer.stored import StoredQuantizer


class AwqQuantizer(StoredQuantizer):
    """Checkpoints in the AWQ format, used packed: 4 bits in groups."""

    method = "awq"
    format_name = "AWQ"
    uses = ("linear_int4",)
    how_to_get_one = "give it an AWQ checkpoint of the model, or choose int8 or int4 for full weights"
