"""Folders of safetensors whose linear layers are stored quantized, as their ``quantization_config`` says."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from drivetrain.contracts.loader import Checkpoint, TokenizerData
from drivetrain.errors import LoaderError
from drivetrain.plugins.loader.safetensors import SafetensorsCheckpoint, StoredTensor
from drivetrain.plugins.quantizer.formats import StoredLayer, StoredWeight, open_format
from drivetrain.plugins.quantizer.formats.bits import UNPACKING_BYTES

if TYPE_CHECKING:
    import torch

    from drivetrain.contracts.packed import PackedWeight

_PACKED_DTYPES = ("I8", "U8", "F8_E4M3", "F8_E5M2")
"""A weight of these types means nothing without its scales."""


class QuantizedCheckpoint(Checkpoint):
    """An opened folder in which several tensors make up the weight of a layer.

    To its users it holds one ``weight`` for each, of the layer's shape. Each layer's tensors are checked against each
    other on construction; their data is read when a weight is asked for, one layer at a time.
    """

    is_packed_first = True

    def __init__(self, files: SafetensorsCheckpoint) -> None:
        self.path = files.path
        self.generation_config = files.generation_config
        self.config = {key: value for key, value in files.config.items() if key != "quantization_config"}
        self._files = files
        self._format = open_format(files.config["quantization_config"], files.path / "config.json")
        self.packed_by = self._format.method
        self.why_not_packed = self._format.why_not_packed()
        self._layers = self._find_layers()
        self._shapes = {f"{name}.weight": self._format.check(layer) for name, layer in self._layers.items()}
        parts = {f"{name}.{part}" for name, layer in self._layers.items() for part in layer.headers}
        self._plain = [name for name in files.names() if name not in parts]

    def names(self) -> Sequence[str]:
        return (*self._plain, *self._shapes)

    def __contains__(self, name: str) -> bool:
        return name in self._shapes or name in self._plain

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name] if name in self._shapes else self._files.shape(name)

    def stored_bytes(self) -> int:
        return self._files.stored_bytes()

    def tensor(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        if name not in self._shapes:
            return self._files.tensor(name, dtype)
        return self._weight(name).tensor().to(dtype)

    def packed(self, name: str) -> PackedWeight | None:
        if name not in self._shapes:
            return None
        weight = self._weight(name)
        return None if weight.reason else weight.packed()

    def packed_form(self, name: str) -> PackedWeight | None:
        import torch

        if name not in self._shapes:
            return None
        weight = self._format.form(self._layer_of(name))
        return None if weight.reason else weight.packed().to(torch.device("meta"))

    def repacking_bytes(self, name: str) -> int:
        # One byte a weight, unpacked, and as many while they are put into order; what is unpacked at a time.
        return 2 * math.prod(self._shapes[name]) + UNPACKING_BYTES

    def stored_bits(self, name: str) -> float | None:
        if name not in self._shapes:
            return self._files.stored_bits(name)
        rows, inputs = self._shapes[name]
        layer = name.removesuffix(".weight")
        num_bytes = sum(self._files.headers[f"{layer}.{part}"].num_bytes for part in self._layers[layer].headers)
        return 8 * num_bytes / (rows * inputs)

    def tokenizer(self) -> TokenizerData:
        return self._files.tokenizer()

    def _weight(self, name: str) -> StoredWeight:
        return self._format.read(self._layer_of(name))

    def _layer_of(self, name: str) -> StoredLayer:
        return self._layers[name.removesuffix(".weight")]

    def _find_layers(self) -> dict[str, StoredLayer]:
        found: dict[str, dict[str, StoredTensor]] = defaultdict(dict)
        for name, header in self._files.headers.items():
            layer, _, part = name.rpartition(".")
            if part in self._format.parts or (part == "weight" and header.dtype in _PACKED_DTYPES):
                found[layer][part] = header
        for layer, parts in found.items():
            weight = self._files.headers.get(f"{layer}.weight")
            if weight is not None and "weight" not in parts:
                raise LoaderError(
                    f"tensor {layer}.weight is stored in full, and yet {', '.join(sorted(parts))} belong to it",
                    where=str(weight.file),
                    found=weight.dtype,
                    allowed=_PACKED_DTYPES,
                )
        if not found:
            raise LoaderError(
                f"config.json says that layers are stored quantized by {self.packed_by}, but none is",
                where=str(self.path),
                allowed=sorted(self._format.parts),
                hint="Remove quantization_config from config.json if the weights are the full ones.",
            )
        return {name: self._layer(name, parts) for name, parts in found.items()}

    def _layer(self, name: str, parts: dict[str, StoredTensor]) -> StoredLayer:
        file = next(iter(parts.values())).file
        return StoredLayer(name, str(file), parts, lambda part: self._files.stored(f"{name}.{part}"))
