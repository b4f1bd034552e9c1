"""Layers whose weights are packed: what takes the place of a linear layer and of a tied embedding."""

from __future__ import annotations

from drivetrain.packed.decode import DECODERS, decode
from drivetrain.packed.layers import PackedEmbedding, PackedLinear, bind_packed, packed_layers
from drivetrain.packed.packing import checked_group, pack_rows

__all__ = [
    "DECODERS",
    "PackedEmbedding",
    "PackedLinear",
    "bind_packed",
    "checked_group",
    "decode",
    "pack_rows",
    "packed_layers",
]
