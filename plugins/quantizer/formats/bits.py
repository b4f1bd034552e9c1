"""Small integers side by side in 32-bit words, the first in the lowest bits, running on from word to word.

Three-bit fields cross the borders of words: 32 of them fill 3 words. GPTQ and compressed-tensors both pack so; they
differ in the dim that they pack along.

Shapes: R rows; C values of a row; W words of a row.
"""

from __future__ import annotations

import torch

AT_ONCE = 2**18
"""Fields that are unpacked in one go: few enough for a cache."""

UNPACKING_BYTES = 16 * AT_ONCE
"""What that takes on the side, at most: several forms of them, one of them as integers of 64 bits."""


def num_words(count: int, bits: int) -> int:
    """Words that ``count`` fields of ``bits`` bits take."""
    return -(-count * bits // 32)


def unpack_bits(words_RW: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The first ``count`` fields of each row: int32 [R, W] -> uint8 [R, C]. Some rows at a time: beside the result it
    takes no more than ``UNPACKING_BYTES``, or what one row takes."""
    num_rows, step = words_RW.shape[0], max(1, AT_ONCE // max(1, count))
    fields_RC = words_RW.new_empty((num_rows, count), dtype=torch.uint8)
    if words_RW.device.type != "meta":
        for first in range(0, num_rows, step):
            fields_RC[first : first + step] = _unpacked(words_RW[first : first + step], bits, count)
    return fields_RC


def _unpacked(words_RW: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    bytes_RB = words_RW.contiguous().view(torch.uint8)
    if bits == 8:
        return bytes_RB[:, :count]
    # Eight fields are as many bytes as a field has bits.
    bytes_RB = torch.nn.functional.pad(bytes_RB, (0, -bytes_RB.shape[1] % bits))
    runs_RNb = bytes_RB.unflatten(1, (-1, bits)).long()
    runs_RN = sum(runs_RNb[..., place] << 8 * place for place in range(bits))
    assert isinstance(runs_RN, torch.Tensor)
    fields = runs_RN.new_empty((*runs_RN.shape, 8), dtype=torch.uint8)
    for place in range(8):
        fields[..., place] = runs_RN >> bits * place & (1 << bits) - 1
    return fields.flatten(1)[:, :count]


def pack_bits(values_RC: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse: uint8 [R, C] -> int32 [R, W], zeros behind the last value."""
    padded_RC = torch.nn.functional.pad(values_RC, (0, -values_RC.shape[1] % 32))
    fields = padded_RC.unflatten(1, (-1, 8))
    runs_RN = torch.zeros(fields.shape[:2], dtype=torch.long, device=values_RC.device)
    for place in range(8):
        runs_RN |= fields[..., place].long() << bits * place
    bytes_RNb = runs_RN.new_empty((*runs_RN.shape, bits), dtype=torch.uint8)
    for place in range(bits):
        bytes_RNb[..., place] = runs_RN >> 8 * place & 255
    words_RW = bytes_RNb.flatten(1).view(torch.int32)
    return words_RW[:, : num_words(values_RC.shape[1], bits)].contiguous()
