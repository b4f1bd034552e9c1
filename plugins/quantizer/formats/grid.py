"""Integers with a scale and a zero point for each group of inputs: what every integer format stores, unpacked.

Shapes: O output features; I input features; N groups of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from drivetrain.contracts.packed import PackedWeight
from drivetrain.errors import ConfigError
from drivetrain.packed.packing import WEIGHTS_AT_ONCE

_BLOCK = 32
_Q8_0 = 8
"""ggml's number of the type: 32 weights of 8 bits with one float16 scale."""

_GROUPS_OF_KERNELS = (128, 64, 32)
"""Kernels have these groups: a scale for a whole row is repeated for each."""


_PACKABLE = {3: 8, 4: 2, 8: 1}
"""Bits of a value -> inputs that fill a byte of the operation's layout, or bytes of it."""


def why_not_bits(bits: int) -> str | None:
    """Why no operation multiplies by integers of so many bits; None where one does."""
    return None if bits in _PACKABLE else f"no operation multiplies by weights of {bits} bits, only of 3, 4 and 8"


@dataclass(frozen=True)
class IntegerGrid:
    """One layer's weight as ``(value - zero) * scale``.

    bits:      of a value: values and zeros are 0 .. 2**bits - 1.
    values_OI: uint8; inputs in the order of ``order``.
    scales_ON: of any floating dtype.
    zeros_ON:  uint8.
    order:     int64 [I]: which input stands at each place; None where they are in order.
    """

    bits: int
    values_OI: torch.Tensor
    scales_ON: torch.Tensor
    zeros_ON: torch.Tensor
    order: torch.Tensor | None = None

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return self.values_OI.shape[1] // self.scales_ON.shape[1]

    @property
    def middle(self) -> int:
        """The zero of a symmetric grid."""
        return 1 << self.bits - 1

    @property
    def is_symmetric(self) -> bool:
        """Whether every zero is the middle."""
        return bool((self.zeros_ON == self.middle).all())

    def weights(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """What it stands for, [O, I], with inputs in the layer's own order."""
        num_rows, inputs = self.values_OI.shape
        weight_OI = torch.empty(num_rows, inputs, dtype=dtype, device=self.values_OI.device)
        step = max(1, WEIGHTS_AT_ONCE // max(1, inputs))
        for first in range(0, num_rows, step):
            rows = slice(first, first + step)
            values = self.values_OI[rows].to(dtype).unflatten(1, (-1, self.group))
            centred = values.sub_(self.zeros_ON[rows].to(dtype).unsqueeze(2))
            some = centred.mul_(self.scales_ON[rows].to(dtype).unsqueeze(2)).flatten(1)
            weight_OI[rows, slice(None) if self.order is None else self.order] = some
        return weight_OI

    def why_not_packed(self) -> str | None:
        """Why no operation multiplies by it; None where one does."""
        if self.bits not in _PACKABLE:
            return why_not_bits(self.bits)
        inputs = self.values_OI.shape[1]
        if inputs % _PACKABLE[self.bits]:
            return f"its rows of {inputs} inputs are no multiple of {_PACKABLE[self.bits]}"
        if self.bits < 8:
            return None
        if not self.is_symmetric:
            return "no operation multiplies by 8-bit weights with zero points"
        if self.group == inputs:
            return None
        if self.group % _BLOCK:
            return f"its groups of {self.group} 8-bit weights are no multiple of {_BLOCK}"
        if not _fits(self.scales_ON, torch.float16):
            return "the scales of its groups of 8-bit weights are not exact in float16"
        return None

    def packed(self) -> PackedWeight:
        """The same in the layout of the operation that multiplies by it. Raises ConfigError where none does."""
        reason = self.why_not_packed()
        if reason is not None:
            raise ConfigError(f"the weight can't be used packed: {reason}", found=tuple(self.values_OI.shape))
        if self.bits == 8:
            return self._eight_bits()
        rows, inputs = self.values_OI.shape
        group, scales, zeros = self.group, self.scales_ON, self.zeros_ON
        smaller = next((size for size in _GROUPS_OF_KERNELS if group == inputs > size and group % size == 0), None)
        if smaller is not None:
            scales, zeros = (t.repeat_interleave(group // smaller, dim=1) for t in (scales, zeros))
            group = smaller
        layout = _nibbles(self.values_OI) if self.bits == 4 else _three_bits(self.values_OI)
        tensors = {**layout, "scales": scales.contiguous(), "mins": zeros.contiguous()}
        params = {"group": group, "zero_points": 1}
        return PackedWeight(f"linear_int{self.bits}", tensors, rows, inputs, params, self.order)

    def _eight_bits(self) -> PackedWeight:
        rows, inputs = self.values_OI.shape
        signed_OI = (self.values_OI ^ 128).view(torch.int8)
        if self.group == inputs:
            tensors = {"weight": signed_OI, "scales": self.scales_ON[:, 0].contiguous()}
            return PackedWeight("linear_int8", tensors, rows, inputs, order=self.order)
        # Scales may be there while values are not, where only the form is wanted.
        scales = self.scales_ON.to(self.values_OI.device, torch.float16).repeat_interleave(self.group // _BLOCK, dim=1)
        blocks = torch.cat(
            (
                scales.contiguous().unsqueeze(2).view(torch.uint8),
                signed_OI.view(torch.uint8).unflatten(1, (-1, _BLOCK)),
            ),
            dim=2,
        )
        return PackedWeight("linear_gguf", {"blocks": blocks.flatten(1)}, rows, inputs, {"type": _Q8_0}, self.order)

    @classmethod
    def of(cls, packed: PackedWeight) -> IntegerGrid:
        """The grid that a packed weight lies on.

        Raises ConfigError for an operation of other weights, and for minima that are no whole multiples of the scales.
        """
        tensors = packed.tensors
        if packed.operation in ("linear_int8", "linear_w8a8"):
            values, scales = tensors["weight"].view(torch.uint8) ^ 128, tensors["scales"].unsqueeze(1)
            zeros = torch.full_like(scales, 128, dtype=torch.uint8)
            return cls(8, values, scales, zeros, packed.order)
        if packed.operation == "linear_gguf" and packed.params.get("type") == _Q8_0:
            return cls._of_blocks(packed)
        if packed.operation == "linear_int4":
            weight = tensors["weight"]
            values = torch.stack((weight & 15, weight >> 4), dim=-1).flatten(1)
        elif packed.operation == "linear_int3":
            low, high = tensors["low"], tensors["high"]
            values = torch.stack([low >> 2 * place & 3 for place in range(4)], dim=-1).flatten(1)
            values |= torch.stack([high >> place & 1 for place in range(8)], dim=-1).flatten(1) << 2
        else:
            raise ConfigError(
                "these weights are no integers with scales and zero points",
                found=packed.operation,
                allowed="linear_int3, linear_int4, linear_int8, linear_w8a8, and linear_gguf of type Q8_0",
            )
        bits, mins = 4 if packed.operation == "linear_int4" else 3, tensors["mins"]
        zeros = mins if mins.dtype == torch.uint8 else _zeros(tensors["scales"], mins, bits)
        return cls(bits, values, tensors["scales"], zeros, packed.order)

    @classmethod
    def _of_blocks(cls, packed: PackedWeight) -> IntegerGrid:
        blocks = packed.tensors["blocks"].unflatten(1, (-1, 2 + _BLOCK))
        scales_ON = blocks[..., :2].contiguous().view(torch.float16).squeeze(2)
        values_OI = (blocks[..., 2:] ^ 128).flatten(1)
        return cls(8, values_OI, scales_ON, torch.full_like(scales_ON, 128, dtype=torch.uint8), packed.order)


_ZERO_ERROR = 0.1
"""Scales and minima in bfloat16 leave this much of a zero point open: 16 steps with 8 bits of precision each."""


def _fits(values: torch.Tensor, dtype: torch.dtype) -> bool:
    return values.dtype == dtype or bool((values.to(dtype).double() == values.double()).all())


def _zeros(scales: torch.Tensor, mins: torch.Tensor, bits: int) -> torch.Tensor:
    """Zero points of minima: ``min = -zero * scale``."""
    exact = -mins.double() / scales.double()
    # Where the scale is 0, so is every weight, whatever its zero point.
    exact = torch.where(scales == 0, float(1 << bits - 1), exact)
    zeros = exact.round()
    error = (exact - zeros).abs().max() if exact.numel() else exact.new_zeros(())
    outside = bool(((zeros < 0) | (zeros >= 1 << bits)).any())
    if not float(error) <= _ZERO_ERROR or outside:  # a NaN fails too
        raise ConfigError(
            "the minimum of each group must be a whole multiple of its scale, since the format stores zero points",
            found=f"zero points {float(exact.min()):.3g} .. {float(exact.max()):.3g}, up to {float(error):.2g} off",
            allowed=f"whole numbers from 0 to {(1 << bits) - 1}",
            hint="Quantize with symmetric groups, or with zero points that are rounded.",
        )
    return zeros.to(torch.uint8)


def _nibbles(values_OI: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"weight": values_OI[:, ::2] | values_OI[:, 1::2] << 4}


def _three_bits(values_OI: torch.Tensor) -> dict[str, torch.Tensor]:
    fours, eights = values_OI.unflatten(1, (-1, 4)), values_OI.unflatten(1, (-1, 8))
    low = torch.zeros_like(fours[..., 0])
    for place in range(4):
        low |= (fours[..., place] & 3) << 2 * place
    high = torch.zeros_like(eights[..., 0])
    for place in range(8):
        high |= (eights[..., place] >> 2 & 1) << place
    return {"low": low, "high": high}
