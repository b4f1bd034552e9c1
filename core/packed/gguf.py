"""Weights as GGUF files keep them: rows of blocks, each with its scales and its small integers.

The layouts are those of ggml's ``block_q4_0`` and its kin. Each decoder computes in the order that gives float32 the
bits of the ``gguf`` package's ``dequantize``.

Shapes: O output features; I input features; N blocks of all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from drivetrain.errors import ConfigError


@dataclass(frozen=True)
class BlockType:
    """One of ggml's types. ``size`` inputs lie in a block of ``num_bytes``.

    values: uint8 [N, num_bytes], and the dtype to compute in -> [N, size].
    halves: at which bytes of a block a float16 stands.
    """

    name: str
    size: int
    num_bytes: int
    values: Callable[[torch.Tensor, torch.dtype], torch.Tensor]
    halves: tuple[int, ...]

    def row_bytes(self, in_features: int) -> int:
        """Bytes of one output's weights. Raises ConfigError where ``in_features`` are no whole blocks."""
        if in_features % self.size:
            raise ConfigError(
                f"rows of {self.name} are whole blocks",
                where="drivetrain.packed.gguf",
                found=f"{in_features} input features",
                allowed=f"multiples of {self.size}",
            )
        return in_features // self.size * self.num_bytes


def _half(blocks: torch.Tensor, at: int, dtype: torch.dtype) -> torch.Tensor:
    """The float16 at this byte of each block, [N, 1]."""
    return blocks[:, at : at + 2].clone(memory_format=torch.contiguous_format).view(torch.float16).to(dtype)


def _nibbles(packed: torch.Tensor, run: int) -> torch.Tensor:
    """Of each run of bytes first all low nibbles, then all high ones: uint8 [N, B] -> [N, 2 B]."""
    runs = packed.unflatten(1, (-1, 1, run))
    return torch.cat((runs & 15, runs >> 4), dim=2).flatten(1)


def _bits(packed: torch.Tensor, shifts: tuple[int, ...], run: int, mask: int) -> torch.Tensor:
    """Of each run of bytes, one shift after another: uint8 [N, B] -> [N, len(shifts) * B]."""
    runs = packed.unflatten(1, (-1, 1, run))
    return torch.cat([(runs >> shift) & mask for shift in shifts], dim=2).flatten(1)


def _fifth_bits(packed: torch.Tensor) -> torch.Tensor:
    """Bit i of four bytes belongs to input i: uint8 [N, 4] -> [N, 32]."""
    return torch.stack([(packed >> bit) & 1 for bit in range(8)], dim=2).flatten(1)


def _q4_0(blocks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return _half(blocks, 0, dtype) * (_nibbles(blocks[:, 2:], 16).to(dtype) - 8)


def _q4_1(blocks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return _half(blocks, 0, dtype) * _nibbles(blocks[:, 4:], 16).to(dtype) + _half(blocks, 2, dtype)


def _q5_0(blocks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    values = _nibbles(blocks[:, 6:], 16) | _fifth_bits(blocks[:, 2:6]) << 4
    return _half(blocks, 0, dtype) * (values.to(dtype) - 16)


def _q5_1(blocks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    values = _nibbles(blocks[:, 8:], 16) | _fifth_bits(blocks[:, 4:8]) << 4
    return _half(blocks, 0, dtype) * values.to(dtype) + _half(blocks, 2, dtype)


def _q8_0(blocks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return blocks[:, 2:].view(torch.int8).to(dtype) * _half(blocks, 0, dtype)


def _k_scales(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eight scales and eight minima of six bits each: uint8 [N, 12] -> twice [N, 8].

    The upper two bits of the first eight bytes are the upper bits of scales and minima 4 to 7.
    """
    scales, mins, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    return (
        torch.cat((scales & 63, rest & 15 | scales >> 2 & 48), dim=1),
        torch.cat((mins & 63, rest >> 4 | mins >> 2 & 48), dim=1),
    )


def _scaled(values: torch.Tensor, blocks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``value * scale - min`` of eight runs of 32, as Q4_K and Q5_K have them."""
    scales, mins = (part.to(dtype) for part in _k_scales(blocks[:, 4:16]))
    scales, mins = _half(blocks, 0, dtype) * scales, _half(blocks, 2, dtype) * mins
    return (values.to(dtype).unflatten(1, (8, 32)) * scales.unsqueeze(2) - mins.unsqueeze(2)).flatten(1)


def _q4_k(blocks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return _scaled(_nibbles(blocks[:, 16:], 32), blocks, dtype)


def _q5_k(blocks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    fifth = _bits(blocks[:, 16:48], tuple(range(8)), 32, 1)
    return _scaled(_nibbles(blocks[:, 48:], 32) | fifth << 4, blocks, dtype)


def _q6_k(blocks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    values = _nibbles(blocks[:, :128], 64) | _bits(blocks[:, 128:192], (0, 2, 4, 6), 32, 3) << 4
    scales = _half(blocks, 208, dtype) * blocks[:, 192:208].view(torch.int8).to(dtype)
    return ((values.to(dtype) - 32).unflatten(1, (16, 16)) * scales.unsqueeze(2)).flatten(1)


BLOCK_TYPES: Mapping[int, BlockType] = {
    2: BlockType("Q4_0", 32, 18, _q4_0, (0,)),
    3: BlockType("Q4_1", 32, 20, _q4_1, (0, 2)),
    6: BlockType("Q5_0", 32, 22, _q5_0, (0,)),
    7: BlockType("Q5_1", 32, 24, _q5_1, (0, 2)),
    8: BlockType("Q8_0", 32, 34, _q8_0, (0,)),
    12: BlockType("Q4_K", 256, 144, _q4_k, (0, 2)),
    13: BlockType("Q5_K", 256, 176, _q5_k, (0, 2)),
    14: BlockType("Q6_K", 256, 210, _q6_k, (208,)),
}
"""ggml's number of a type -> its layout."""


def block_type(params: Mapping[str, float]) -> BlockType:
    """The type that a spec's or a packed weight's params name. Raises ConfigError."""
    number = params.get("type")
    found = BLOCK_TYPES.get(int(number)) if number is not None and number == int(number) else None
    if found is None:
        raise ConfigError(
            "no such type of GGUF blocks",
            where="drivetrain.packed.gguf",
            found=f"type {number}",
            allowed=", ".join(f"{key} ({kind.name})" for key, kind in BLOCK_TYPES.items()),
        )
    return found


def by_block(blocks: torch.Tensor, dtype: torch.dtype, params: Mapping[str, float]) -> torch.Tensor:
    """uint8 [O, bytes of a row] -> [O, I]."""
    kind = block_type(params)
    if blocks.shape[1] % kind.num_bytes:
        raise ConfigError(
            f"rows of {kind.name} are whole blocks",
            where="drivetrain.packed.gguf",
            found=f"{blocks.shape[1]} bytes a row",
            allowed=f"multiples of {kind.num_bytes}",
        )
    num_blocks = blocks.shape[1] // kind.num_bytes
    values = kind.values(blocks.reshape(-1, kind.num_bytes), dtype)
    return values.reshape(blocks.shape[0], num_blocks * kind.size)
