"""GGUF files used as they are: their blocks are what the kernels multiply by."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from drivetrain.contracts.quantizer import Declaration, QuantizerConfig
from drivetrain.plugins.quantizer.stored import StoredQuantizer

if TYPE_CHECKING:
    import torch
    from torch import nn

    from drivetrain.contracts.packed import PackedWeight


class GgufQuantizerConfig(QuantizerConfig):
    """Options of the quantizer ``gguf``."""

    activations: Literal["full", "int8"] = Field(
        "full",
        description="full: products of the dequantized model; int8: activations are rounded to 8 bits with a scale for "
        "each 32, as llama.cpp does, so that products are of integers",
    )


class GgufQuantizer(StoredQuantizer):
    """The blocks of a GGUF file, used packed as they are loaded; what the file holds otherwise is dequantized."""

    Config = GgufQuantizerConfig
    config: GgufQuantizerConfig
    method = "gguf"
    format_name = "GGUF blocks"
    uses = ("linear_gguf", "linear_gguf_a8")
    how_to_get_one = "give it a quantized GGUF file of the model, or choose int8 or int4 for full weights"

    def declares(self) -> Declaration:
        declared = super().declares()
        operation = "linear_gguf" if self.config.activations == "full" else "linear_gguf_a8"
        return dataclasses.replace(
            declared,
            activations=None if self.config.activations == "full" else "int8, a scale for each 32 inputs of a token",
            operations=(operation,),
        )

    def convert_stored(self, name: str, stored: PackedWeight, bias: torch.Tensor | None) -> nn.Module:
        (operation,) = self.declares().operations
        return super().convert_stored(name, dataclasses.replace(stored, operation=operation), bias)
