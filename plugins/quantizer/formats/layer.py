"""One quantized layer as the files hold it: several tensors that share the layer's name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch

from drivetrain.errors import LoaderError, MissingTensorError

if TYPE_CHECKING:
    from drivetrain.contracts.packed import PackedWeight
    from drivetrain.plugins.quantizer.formats.grid import IntegerGrid

FLOATS = ("F32", "F16", "BF16")
"""What scales may be stored in, by the names of safetensors."""


_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
}
"""What the tensors of a layer may be stored in."""

_TELLING = ("g_idx", "weight_g_idx", "weight_shape")
"""Small tensors without which the form of a layer is not known."""


class Header(Protocol):
    """Type and shape of a stored tensor."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class StoredLayer:
    """The tensors of one layer.

    name:    of the layer: ``"model.layers.0.mlp.up_proj"``.
    where:   the files, for errors.
    headers: part (``"qweight"``) -> type and shape.
    read:    part -> its data; it may be a view of the mapped file.
    """

    name: str
    where: str
    headers: Mapping[str, Header]
    read: Callable[[str], torch.Tensor]

    def without_values(self, *but: str) -> StoredLayer:
        """The same with tensors on the meta device: their types and shapes say what the layer will take. Those that
        tell its form are read all the same, and those that are named."""
        told = {*_TELLING, *but}

        def read(part: str) -> torch.Tensor:
            header = self.headers[part]
            if part in told:
                return self.read(part)
            return torch.empty(header.shape, dtype=_DTYPES[header.dtype], device="meta")

        return replace(self, read=read)

    def need(self, part: str, dtypes: Iterable[str], shape: tuple[int, ...] | None = None) -> tuple[int, ...]:
        """The shape of a tensor that must be there. Raises MissingTensorError, or LoaderError for another type or shape
        than it must have."""
        allowed = tuple(dtypes)
        header = self.headers.get(part)
        if header is None:
            raise MissingTensorError(
                f"the quantized layer {self.name} lacks its tensor {self.name}.{part}",
                where=self.where,
                found=sorted(self.headers),
                hint="The files are not complete, or their quantization_config is of another format.",
            )
        if header.dtype not in allowed:
            raise self.error(f"tensor {self.name}.{part} has a type that it can't have", header.dtype, allowed)
        if shape is not None and header.shape != shape:
            raise self.error(f"tensor {self.name}.{part} has another shape than its layer needs", header.shape, shape)
        return header.shape

    def matrix(self, part: str, dtypes: Iterable[str]) -> tuple[int, int]:
        """``need`` for a tensor that must have two dims, neither of them empty."""
        shape = self.need(part, dtypes)
        if len(shape) != 2 or 0 in shape:
            raise self.error(f"tensor {self.name}.{part} must be a matrix", shape, "two dims")
        return shape[0], shape[1]

    def check_range(self, part: str, values: torch.Tensor, low: int, high: int) -> None:
        """Raise LoaderError unless all integers are from ``low`` to ``high``."""
        if values.numel() and not low <= int(values.min()) <= int(values.max()) <= high:
            raise self.error(
                f"tensor {self.name}.{part} holds values that make no sense",
                f"{int(values.min())} .. {int(values.max())}",
                f"{low} .. {high}",
            )

    def error(self, what: str, found: object, allowed: object) -> LoaderError:
        """An error about this layer."""
        listed = allowed if isinstance(allowed, str) else str(allowed)
        return LoaderError(what, where=self.where, found=found, allowed=listed)


@dataclass(frozen=True)
class StoredWeight:
    """What a format reads of a layer: packed, with its dequantized form beside it.

    packed:  makes the operation's layout.
    tensor:  makes the weights in float32, [O, I].
    reason:  why it can't be packed; None where it can.
    """

    packed: Callable[[], PackedWeight]
    tensor: Callable[[], torch.Tensor]
    reason: str | None = None

    @classmethod
    def of_grid(cls, grid: IntegerGrid) -> StoredWeight:
        return cls(grid.packed, grid.weights, grid.why_not_packed())


class StoredFormat(Protocol):
    """One way to store quantized layers in safetensors files.

    method: ``quant_method`` of the ``quantization_config``, and the name of the quantizer that uses the layers packed.
    parts:  what the tensors of a quantized layer are called, but for those that a plain layer has too.
    """

    method: str
    parts: frozenset[str]

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        """Raises LoaderError for a configuration that it does not know."""

    def check(self, layer: StoredLayer) -> tuple[int, int]:
        """Outputs and inputs of a layer. Reads no data. Raises LoaderError for whatever is missing or does not fit."""

    def why_not_packed(self) -> str | None:
        """Why the layers can't be used as they are stored, as far as the configuration tells."""

    def read(self, layer: StoredLayer) -> StoredWeight:
        """The layer's weight. Raises LoaderError for values that make no sense."""

    def form(self, layer: StoredLayer) -> StoredWeight:
        """The same, its packed form without values; of the data, only what decides about that form is read."""


def positive(config: Mapping[str, Any], key: str, where: str, default: int | None = None) -> int:
    """A whole number of at least 1 out of a ``quantization_config``. Raises LoaderError."""
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise LoaderError(
            f"quantization_config has no usable {key}", where=where, found=value, allowed="a whole number >= 1"
        )
    return value


def group_size(config: Mapping[str, Any], where: str) -> int | None:
    """Inputs that share a scale; None for whole rows, which the formats write as -1. Raises LoaderError."""
    value = config.get("group_size", -1)
    if value in (None, -1):
        return None
    return positive(config, "group_size", where)


def order_of(layer: StoredLayer, part: str, groups: int) -> torch.Tensor | None:
    """The inputs by group, out of a tensor that holds the group of each; None where they are in order already.

    Raises LoaderError for groups that are not there, or not all of one size.
    """
    if part not in layer.headers:
        return None
    group_of_input = layer.read(part).long()
    layer.check_range(part, group_of_input, 0, groups - 1)
    order = group_of_input.argsort(stable=True)
    inputs = group_of_input.numel()
    sizes = torch.bincount(group_of_input, minlength=groups)
    if not bool((sizes == inputs // groups).all()):
        raise layer.error(
            f"tensor {layer.name}.{part} puts different numbers of inputs into its groups",
            f"{int(sizes.min())} .. {int(sizes.max())}",
            f"{inputs // groups} each",
        )
    return None if torch.equal(order, torch.arange(inputs)) else order
