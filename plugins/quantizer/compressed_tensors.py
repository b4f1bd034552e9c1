"""Checkpoints of the compressed-tensors library."""

from __future__ import annotations

from drivetrain.plugins.quantizer.stored import StoredQuantizer


class CompressedTensorsQuantizer(StoredQuantizer):
    """Checkpoints of compressed-tensors, used packed: 3 to 8 bits, also with 8-bit activations, and float8."""

    method = "compressed-tensors"
    format_name = "compressed-tensors"
    uses = (
        "linear_int4",
        "linear_int3",
        "linear_int8",
        "linear_w8a8",
        "linear_fp8",
        "linear_fp8a8",
        "linear_gguf",
    )
    how_to_get_one = "give it such a checkpoint of the model, or choose int8 or int4 for full weights"
