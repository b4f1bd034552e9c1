"""How quantized layers are stored in safetensors files: read into packed weights, and written from them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from drivetrain.errors import LoaderError, nearest
from drivetrain.plugins.quantizer.formats.awq import AwqFormat
from drivetrain.plugins.quantizer.formats.compressed_tensors import CompressedTensorsFormat
from drivetrain.plugins.quantizer.formats.gptq import GptqFormat
from drivetrain.plugins.quantizer.formats.grid import IntegerGrid
from drivetrain.plugins.quantizer.formats.layer import StoredFormat, StoredLayer, StoredWeight
from drivetrain.plugins.quantizer.formats.writing import FORMATS, write_quantized

READERS: Mapping[str, type[StoredFormat]] = {
    reader.method: reader for reader in (AwqFormat, CompressedTensorsFormat, GptqFormat)
}
"""``quant_method`` -> what reads such files."""

__all__ = [
    "FORMATS",
    "READERS",
    "IntegerGrid",
    "StoredFormat",
    "StoredLayer",
    "StoredWeight",
    "open_format",
    "write_quantized",
]


def open_format(config: object, file: Path) -> StoredFormat:
    """What reads the layers that a ``quantization_config`` describes.

    file: where it stands. Raises LoaderError for a method, a version or a number of bits that is not known.
    """
    method = config.get("quant_method") if isinstance(config, Mapping) else config
    reader = READERS.get(str(method))
    if reader is None or not isinstance(config, Mapping):
        close = nearest(str(method), READERS)
        raise LoaderError(
            "the weights are stored quantized, in a format that this loader does not read",
            where=str(file),
            found=method,
            allowed=READERS,
            hint=f"Did you mean {close!r}?"
            if close and close != method
            else "Use the unquantized checkpoint of this model, or a GGUF file",
        )
    settings: Mapping[str, Any] = config
    return reader(settings, f"{file}: quantization_config")
