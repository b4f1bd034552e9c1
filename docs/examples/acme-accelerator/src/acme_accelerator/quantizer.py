"""The quantizer ``acme``: weights as int8 with one scale a row, kept on the card; activations stay as they are.

Shapes: I input features; O output features.
"""

from __future__ import annotations

import torch
from drivetrain.contracts.plugin import Tier
from drivetrain.contracts.quantizer import Declaration, Quantizer, QuantizerConfig
from pydantic import Field
from torch import nn
from torch.nn import functional

from acme_accelerator.card import zeros

_LARGEST = 127


class AcmeLinear(nn.Module):
    """A linear layer whose weight is ``int8 [O, I]`` times a float32 scale for each row."""

    weight_OI: torch.Tensor
    scale_O: torch.Tensor
    bias_O: torch.Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight_OI = linear.weight.detach().float()
        # A row of zeros has no scale of its own; any will do, but not 0.
        scale_O = weight_OI.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny) / _LARGEST
        rounded_OI = (weight_OI / scale_O[:, None]).round().clamp(-_LARGEST, _LARGEST)
        self.register_buffer("weight_OI", _on_card(rounded_OI, torch.int8))
        self.register_buffer("scale_O", _on_card(scale_O, torch.float32))
        self.register_buffer("bias_O", None if linear.bias is None else _on_card(linear.bias, linear.bias.dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., I] -> [..., O] in the dtype of ``x``; the product is accumulated in float32."""
        out = functional.linear(x.float(), self.weight_OI.float()) * self.scale_O
        return (out if self.bias_O is None else out + self.bias_O.float()).to(x.dtype)


def _on_card(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A copy of ``tensor``; on the meta device, where only sizes are asked for, it takes nothing of the card."""
    if tensor.is_meta:
        return torch.empty(tuple(tensor.shape), dtype=dtype, device="meta")
    return zeros(tuple(tensor.shape), dtype, tensor.device).copy_(tensor.detach())


class AcmeQuantizer(Quantizer):
    """Weights as int8 with one scale a row, kept on the card."""

    contract_version = "1.0"
    tier = Tier.REFERENCE

    class Config(QuantizerConfig):
        keep: tuple[str, ...] = Field(
            ("lm_head",), description="Last parts of the names of layers that keep their full precision."
        )

    config: Config

    def bits_per_weight(self) -> float | None:
        """8, and a float32 scale a row: 0.5 bits for a row of 64, less for longer ones."""
        return 8.5

    def declares(self) -> Declaration:
        """What is known of it before any weight is there."""
        return Declaration("int8, one scale a row")

    def convert(self, name: str, linear: nn.Linear) -> nn.Module:
        """As in the contract. Raises MemoryBudgetError when the card is full."""
        if name.rpartition(".")[2] in self.config.keep:
            return linear
        return AcmeLinear(linear).train(linear.training)
