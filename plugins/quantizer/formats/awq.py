"""The layout of AWQ checkpoints in the order of the GEMM kernels, as AutoAWQ writes them and vLLM reads them.

A layer has ``qweight`` int32 [I, O / 8], eight outputs in a word; ``qzeros`` int32 [N, O / 8], in the same way; and
``scales`` [N, O]. Field k of a word is output ``ORDER[k]`` of its eight. A weight is ``(field - zero) * scale``.

Shapes: O output features; I input features; N groups of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from drivetrain.errors import ConfigError, LoaderError
from drivetrain.plugins.quantizer.formats.bits import AT_ONCE, pack_bits, unpack_bits
from drivetrain.plugins.quantizer.formats.gptq import narrow_scales
from drivetrain.plugins.quantizer.formats.grid import IntegerGrid
from drivetrain.plugins.quantizer.formats.layer import FLOATS, StoredLayer, StoredWeight, group_size, positive

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_BITS = 4
_FIELDS = 8


class AwqFormat:
    """Reads AWQ checkpoints."""

    method = "awq"
    parts = frozenset({"qweight", "qzeros", "scales"})

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        bits = positive({"bits": config.get("bits", config.get("w_bit"))}, "bits", where)
        if bits != _BITS:
            raise LoaderError("AWQ checkpoints of these bits are not known", where=where, found=bits, allowed="4")
        version = str(config.get("version") or "gemm").lower()
        if version != "gemm":
            raise LoaderError("this order of AWQ weights is not known", where=where, found=version, allowed="gemm")
        group = config.get("group_size", config.get("q_group_size", -1))
        self.group = group_size({"group_size": group}, where)

    def check(self, layer: StoredLayer) -> tuple[int, int]:
        inputs, words = layer.matrix("qweight", ["I32"])
        rows = words * _FIELDS
        if self.group is not None and inputs % self.group:
            raise layer.error(
                f"the group size of layer {layer.name} does not divide its {inputs} inputs",
                self.group,
                f"divisors of {inputs}",
            )
        groups = inputs // (self.group or inputs)
        layer.need("scales", FLOATS, (groups, rows))
        layer.need("qzeros", ["I32"], (groups, words))
        return rows, inputs

    def why_not_packed(self) -> str | None:
        return None

    def read(self, layer: StoredLayer) -> StoredWeight:
        self.check(layer)
        values_OI, zeros_ON = _by_output(layer.read("qweight")), _by_output(layer.read("qzeros"))
        return StoredWeight.of_grid(IntegerGrid(_BITS, values_OI, layer.read("scales").T.contiguous(), zeros_ON))

    def form(self, layer: StoredLayer) -> StoredWeight:
        return self.read(layer.without_values())


def _by_output(words_RW: torch.Tensor) -> torch.Tensor:
    """The values of words with eight outputs in each, [O, R]; some rows at a time, as ``unpack_bits`` does."""
    rows, outputs = words_RW.shape[0], words_RW.shape[1] * _FIELDS
    values_OR = words_RW.new_empty((outputs, rows), dtype=torch.uint8)
    step = max(1, AT_ONCE // max(1, outputs))
    for first in range(0, rows if words_RW.device.type != "meta" else 0, step):
        values_OR[:, first : first + step] = _unpacked(words_RW[first : first + step]).T
    return values_OR


def _unpacked(words: torch.Tensor) -> torch.Tensor:
    fields = unpack_bits(words, _BITS, words.shape[1] * _FIELDS).unflatten(1, (-1, _FIELDS))
    return fields[..., [ORDER.index(place) for place in range(_FIELDS)]].flatten(1)


def _packed(values: torch.Tensor) -> torch.Tensor:
    return pack_bits(values.unflatten(1, (-1, _FIELDS))[..., list(ORDER)].flatten(1), _BITS)


def awq_tensors(name: str, grid: IntegerGrid) -> dict[str, torch.Tensor]:
    """The tensors of a layer in the AWQ layout, by part. Raises ConfigError for a weight that it can't hold."""
    rows, _ = grid.values_OI.shape
    reasons = {
        f"weights have {_BITS} bits": (grid.bits == _BITS, grid.bits),
        "inputs are in order": (grid.order is None, "an order of its own"),
        f"outputs come in eights, so {rows} of them": (rows % _FIELDS == 0, rows),
        "zero points have 4 bits": (int(grid.zeros_ON.max()) < 1 << _BITS, int(grid.zeros_ON.max())),
    }
    for rule, (holds, found) in reasons.items():
        if not holds:
            raise ConfigError(f"layer {name} can't be stored in the AWQ format: {rule}", where=name, found=found)
    return {
        "qweight": _packed(grid.values_OI.T),
        "qzeros": _packed(grid.zeros_ON.T),
        "scales": narrow_scales(name, grid.scales_ON.T),
    }
