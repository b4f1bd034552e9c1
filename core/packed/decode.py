"""What packed weights stand for: one function for each operation's layout, in plain torch.

Shapes: O output features; I input features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from drivetrain.contracts.packed import PackedWeight
from drivetrain.errors import ConfigError
from drivetrain.packed.gguf import by_block

Decoder = Callable[..., torch.Tensor]
"""The operation's weight arguments, the dtype of the result (float32 or wider) and its spec's params -> [O, I]."""


def by_row(
    weight_OI: torch.Tensor, scales_O: torch.Tensor, dtype: torch.dtype, params: Mapping[str, float]
) -> torch.Tensor:
    """Integers or small floats with one scale for each output."""
    return weight_OI.to(dtype) * scales_O.to(dtype).unsqueeze(1)


def by_float8(
    weight_OI: torch.Tensor,
    scales_O: torch.Tensor,
    x_scale: torch.Tensor,
    dtype: torch.dtype,
    params: Mapping[str, float],
) -> torch.Tensor:
    """``by_row``; how activations are rounded does not change the weights."""
    return by_row(weight_OI, scales_O, dtype, params)


def by_nibble(
    weight: torch.Tensor,
    scales: torch.Tensor,
    mins: torch.Tensor,
    dtype: torch.dtype,
    params: Mapping[str, float],
) -> torch.Tensor:
    """Two weights a byte, the even one in the low nibble; ``nibble * scale + min`` of its group of inputs."""
    return _by_group(torch.stack((weight & 15, weight >> 4), dim=-1).flatten(1), scales, mins, dtype)


def by_three_bits(
    low: torch.Tensor,
    high: torch.Tensor,
    scales: torch.Tensor,
    mins: torch.Tensor,
    dtype: torch.dtype,
    params: Mapping[str, float],
) -> torch.Tensor:
    """Two bits of four weights in a byte of ``low``, the third bit of eight in one of ``high``, the first weight in the
    lowest bits; ``value * scale + min`` of its group of inputs."""
    pairs_OI = torch.stack([(low >> shift) & 3 for shift in (0, 2, 4, 6)], dim=-1).flatten(1)
    bits_OI = torch.stack([(high >> shift) & 1 for shift in range(8)], dim=-1).flatten(1)
    return _by_group(pairs_OI | bits_OI << 2, scales, mins, dtype)


def mins_of(scales: torch.Tensor, mins: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What an operation's ``mins`` stand for: themselves, or of zero points (uint8) ``-zero * scale``."""
    return -(mins.to(dtype) * scales.to(dtype)) if mins.dtype == torch.uint8 else mins.to(dtype)


def _by_group(values_OI: torch.Tensor, scales: torch.Tensor, mins: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    group = values_OI.shape[1] // scales.shape[1]
    grouped = values_OI.to(dtype).unflatten(1, (-1, group))
    scales, mins = scales.to(dtype), mins_of(scales, mins, dtype)
    return (grouped * scales.unsqueeze(2) + mins.unsqueeze(2)).flatten(1)


DECODERS: dict[str, Decoder] = {
    "linear_int8": by_row,
    "linear_fp8": by_row,
    "linear_int4": by_nibble,
    "linear_int4_a8": by_nibble,
    "linear_int3": by_three_bits,
    "linear_w8a8": by_row,
    "linear_fp8a8": by_float8,
    "linear_gguf": by_block,
    "linear_gguf_a8": by_block,
}
"""Operation -> what its packed weights stand for."""


def decode(packed: PackedWeight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The weights that ``packed`` stands for, [O, I], with inputs in the layer's own order."""
    decoder = DECODERS.get(packed.operation)
    if decoder is None:
        raise ConfigError(
            "no packed weights belong to this operation",
            where="drivetrain.packed",
            found=packed.operation,
            allowed=sorted(DECODERS),
        )
    weight_OI = decoder(*packed.tensors.values(), dtype, packed.params)
    if packed.order is None:
        return weight_OI
    in_order = torch.empty_like(weight_OI)
    in_order[:, packed.order] = weight_OI
    return in_order
