"""The layout of GPTQ checkpoints, as AutoGPTQ and GPTQModel write them and vLLM reads them.

A layer has ``qweight`` int32 [I * bits / 32, O], fields along the inputs; ``qzeros`` int32 [N, O * bits / 32], fields
along the outputs; ``scales`` [N, O]; ``g_idx`` int32 [I], the group of each input. A weight is
``(field - zero) * scale``. Files of the first version (``checkpoint_format: gptq``) hold ``zero - 1``, subtracted from
whole words, so that a zero of 0 borrows from its neighbour; those of the second (``gptq_v2``) hold ``zero`` itself.

Shapes: O output features; I input features; N groups of a row; W words.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from drivetrain.errors import ConfigError, LoaderError
from drivetrain.plugins.quantizer.formats.bits import num_words, pack_bits, unpack_bits
from drivetrain.plugins.quantizer.formats.grid import IntegerGrid, why_not_bits
from drivetrain.plugins.quantizer.formats.layer import (
    FLOATS,
    StoredLayer,
    StoredWeight,
    group_size,
    order_of,
    positive,
)

BITS = (2, 3, 4, 8)
_VERSIONS = ("gptq", "gptq_v2")


class GptqFormat:
    """Reads GPTQ checkpoints."""

    method = "gptq"
    parts = frozenset({"qweight", "qzeros", "scales", "g_idx"})

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self.where = where
        self.bits = positive(config, "bits", where)
        self.group = group_size(config, where)
        self._dynamic: Mapping[str, Mapping[str, Any]] = config.get("dynamic") or {}
        version = config.get("checkpoint_format") or config.get("format") or "gptq"
        if version not in _VERSIONS:
            raise LoaderError(
                "this version of the GPTQ format is not known", where=where, found=version, allowed=_VERSIONS
            )
        if self.bits not in BITS:
            raise LoaderError(
                "GPTQ checkpoints of these bits are not known", where=where, found=self.bits, allowed=BITS
            )
        self._subtracts_one = version == "gptq"

    def check(self, layer: StoredLayer) -> tuple[int, int]:
        bits, group = self._scheme(layer.name)
        words, rows = layer.matrix("qweight", ["I32"])
        inputs = words * 32 // bits
        if "g_idx" in layer.headers:
            layer.need("g_idx", ["I32", "I64"], (inputs,))
        if group is not None and inputs % group:
            raise layer.error(
                f"the group size of layer {layer.name} does not divide its {inputs} inputs",
                group,
                f"divisors of {inputs}",
            )
        groups = inputs // (group or inputs)
        layer.need("scales", FLOATS, (groups, rows))
        layer.need("qzeros", ["I32"], (groups, num_words(rows, bits)))
        return rows, inputs

    def why_not_packed(self) -> str | None:
        return why_not_bits(self.bits)

    def read(self, layer: StoredLayer) -> StoredWeight:
        bits, _ = self._scheme(layer.name)
        rows, inputs = self.check(layer)
        values_OI = unpack_bits(layer.read("qweight").T, bits, inputs)
        scales_NO = layer.read("scales")
        zeros_NO = self._zeros(layer.read("qzeros"), bits, rows)
        order = order_of(layer, "g_idx", scales_NO.shape[0])
        if order is not None:
            values_OI = values_OI[:, order]
        return StoredWeight.of_grid(
            IntegerGrid(bits, values_OI, scales_NO.T.contiguous(), zeros_NO.T.contiguous(), order)
        )

    def form(self, layer: StoredLayer) -> StoredWeight:
        # Of 8 bits, zero points and scales decide whether an operation multiplies by them.
        decides = ("scales", "qzeros") if self._scheme(layer.name)[0] == 8 else ()
        return self.read(layer.without_values(*decides))

    def _scheme(self, name: str) -> tuple[int, int | None]:
        """Bits and group size of one layer: ``dynamic`` may make exceptions, by regular expressions."""
        for pattern, changes in self._dynamic.items():
            if not pattern.startswith("-") and re.match(pattern.removeprefix("+:"), name):
                own = {"bits": self.bits, "group_size": self.group or -1, **changes}
                return positive(own, "bits", self.where), group_size(own, self.where)
        return self.bits, self.group

    def _zeros(self, words_NW: torch.Tensor, bits: int, rows: int) -> torch.Tensor:
        """Zero points, uint8 [N, O]."""
        if not self._subtracts_one:
            return unpack_bits(words_NW, bits, rows)
        if 32 % bits:
            return unpack_bits(words_NW, bits, rows) + 1 & (1 << bits) - 1
        return unpack_bits(_added(words_NW, bits, 1), bits, rows)


def _added(words: torch.Tensor, bits: int, change: int) -> torch.Tensor:
    """``change`` added to every field as one sum over the whole word, as GPTQModel does: carries go on."""
    ones = sum(1 << place for place in range(0, 32, bits))
    total = (words.long() & 0xFFFFFFFF) + change * ones & 0xFFFFFFFF
    return torch.where(total >= 1 << 31, total - (1 << 32), total).to(torch.int32)


def gptq_tensors(name: str, grid: IntegerGrid, version: str = "gptq") -> dict[str, torch.Tensor]:
    """The tensors of a layer in the GPTQ layout, by part. Raises ConfigError for a weight that it can't hold."""

    def error(what: str, found: object, allowed: object) -> ConfigError:
        return ConfigError(
            f"layer {name}: {what}, as the GPTQ format needs", where=name, found=found, allowed=str(allowed)
        )

    rows, inputs = grid.values_OI.shape
    bits, group = grid.bits, grid.group
    if inputs * bits % 32 or (inputs % 32 and bits == 3):
        raise error(f"its {inputs} inputs fill whole words", inputs, f"multiples of {32 if bits == 3 else 32 // bits}")
    if rows * bits % 32:
        raise error(f"its {rows} outputs fill whole words", rows, f"multiples of {32 if bits == 3 else 32 // bits}")
    values_OI, group_of_place = grid.values_OI, torch.arange(inputs, dtype=torch.int32) // group
    group_of_input = group_of_place
    if grid.order is not None:
        values_OI = torch.empty_like(grid.values_OI)
        values_OI[:, grid.order] = grid.values_OI
        group_of_input = torch.empty_like(group_of_place)
        group_of_input[grid.order] = group_of_place
    return {
        "qweight": pack_bits(values_OI, bits).T.contiguous(),
        "qzeros": _packed_zeros(grid.zeros_ON.T, bits, version, error),
        "scales": narrow_scales(name, grid.scales_ON.T),
        "g_idx": group_of_input,
    }


def _packed_zeros(zeros_NO: torch.Tensor, bits: int, version: str, error: Any) -> torch.Tensor:
    lowest = int(version == "gptq")
    if int(zeros_NO.min()) < lowest:
        raise error(f"zero points fit version {version}", int(zeros_NO.min()), f"{lowest} .. {(1 << bits) - 1}")
    return pack_bits((zeros_NO - lowest).contiguous(), bits)


def narrow_scales(name: str, scales: torch.Tensor) -> torch.Tensor:
    """Scales in float16, as the GPTQ and AWQ formats hold them. Raises ConfigError where one is lost in it."""
    narrow = scales.to(torch.float16)
    if not bool(torch.isfinite(narrow).all()) or bool(((narrow == 0) & (scales != 0)).any()):
        raise ConfigError(
            f"layer {name}: a scale does not fit float16, which the format keeps scales in",
            where=name,
            found=f"{float(scales.abs().min()):.3g} .. {float(scales.abs().max()):.3g}",
            allowed="6e-08 .. 65504",
            hint="Use format compressed-tensors.",
        )
    return narrow.contiguous()
