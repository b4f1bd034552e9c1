"""Modules with packed weights. A quantizer makes them; kernels are bound to them once the model is built.

Shapes: ``...`` any leading dims; I, O input and output features; V vocabulary; E hidden size.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Self, cast

import torch
from torch import nn
from torch.nn import functional

from drivetrain.contracts.kernels import KernelSpec
from drivetrain.contracts.packed import PackedWeight
from drivetrain.errors import ConfigError
from drivetrain.packed.decode import DECODERS, decode


class PackedModule(nn.Module):
    """Keeps the tensors of a packed weight as buffers, so that they move and are saved with the model.

    replacements: a number that is another one whenever a packed layer, whichever, has got another tensor: who has
                  described hundreds of tensors to a library looks at this alone to know that they are the same still.
    """

    replacements: ClassVar[int] = 0

    def __init__(self, packed: PackedWeight) -> None:
        super().__init__()
        if any(tensor.requires_grad for tensor in packed.tensors.values()):
            raise _no_gradient(packed)
        self._form = dataclasses.replace(packed, tensors={}, order=None)
        self._names = tuple(packed.tensors)
        for name, tensor in packed.tensors.items():
            self.register_buffer(name, tensor)
        self.register_buffer("order", packed.order)

    @property
    def packed(self) -> PackedWeight:
        """The weight, with the buffers as they are now."""
        tensors = {name: self.get_buffer(name) for name in self._names}
        order: torch.Tensor | None = self._buffers["order"]
        return dataclasses.replace(self._form, tensors=tensors, order=order)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if value is None or isinstance(value, torch.Tensor):
            _note_replacement()

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        _note_replacement()

    def register_buffer(self, name: str, tensor: torch.Tensor | None, persistent: bool = True) -> None:
        super().register_buffer(name, tensor, persistent)
        _note_replacement()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        # What ``to``, ``half`` and the like are made of: it puts other tensors in place of the buffers.
        super()._apply(fn, recurse)
        _note_replacement()
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Raise ConfigError where a gradient is asked for: rounded weights have none, their input has one."""
        if requires_grad:
            raise _no_gradient(self._form)
        return self

    def extra_repr(self) -> str:
        form = self._form
        return f"{form.operation}, in={form.in_features}, out={form.out_features}"


_numbers = itertools.count(1)


def _note_replacement() -> None:
    PackedModule.replacements = next(_numbers)


def _no_gradient(packed: PackedWeight) -> ConfigError:
    return ConfigError(
        f"the packed weight of {packed.operation} ({packed.out_features} x {packed.in_features}) can't be trained",
        where="drivetrain.packed",
        found="a gradient of the weight was asked for",
        allowed="gradients of the layer's input",
        hint="Train with quantizer none, or keep the layers that learn with rules.",
    )


class PackedLinear(PackedModule):
    """A linear layer over a packed weight: [..., I] -> [..., O] in the dtype of the input.

    Until a kernel is bound, the weight is decoded for every call: right, and slow. Its weight has no gradient.
    """

    bias: torch.Tensor | None

    def __init__(self, packed: PackedWeight, bias: torch.Tensor | None = None) -> None:
        super().__init__(packed)
        self.in_features, self.out_features = packed.in_features, packed.out_features
        self.register_buffer("bias", bias)
        self._product: Callable[..., torch.Tensor] | None = None

    def spec(self, device_type: str, dtype: torch.dtype) -> KernelSpec:
        """The use of an operation that this layer is, with activations of ``dtype``."""
        form = self._form
        sizes = {"I": self.in_features, "O": self.out_features}
        return KernelSpec(form.operation, device_type, str(dtype).removeprefix("torch."), sizes, form.params)

    def bind(self, product: Callable[..., torch.Tensor]) -> None:
        """Multiply by this callable from now on: it has the signature of the packed weight's operation."""
        self._product = product

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._product is None:
            return self._decoded(x)
        if self.order is not None:
            x = x.index_select(-1, cast(torch.Tensor, self.order))
        out: torch.Tensor = self._product(x, *(self._buffers[name] for name in self._names), self.bias)
        return out

    def _decoded(self, x: torch.Tensor) -> torch.Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(wide)
        return functional.linear(x.to(wide), decode(self.packed, wide), bias).to(x.dtype)


class PackedEmbedding(PackedModule):
    """A table of vectors that is the packed weight of a tied output layer: only the rows looked up are decoded."""

    def __init__(self, packed: PackedWeight, dtype: torch.dtype, scale: float = 1.0) -> None:
        super().__init__(packed)
        self.dtype, self.scale = dtype, scale
        # Tensors without dims, an order of inputs and small floats need more than a gathering of rows.
        is_plain = all(t.dim() and (t.element_size() > 1 or not t.is_floating_point()) for t in packed.tensors.values())
        self._decodes_rows = is_plain and packed.order is None and packed.operation in DECODERS

    def forward(self, ids_T: torch.Tensor) -> torch.Tensor:
        """int64 [...] -> [..., E], scaled as the architecture says."""
        rows_TE = self._rows(ids_T.flatten()).to(self.dtype)
        rows_TE = rows_TE if self.scale == 1.0 else rows_TE * self.scale
        return rows_TE.unflatten(0, ids_T.shape) if ids_T.dim() != 1 else rows_TE

    def _rows(self, ids_N: torch.Tensor) -> torch.Tensor:
        if self._decodes_rows:
            # A few rows at every step: what ``PackedWeight.at`` does, without the objects.
            tensors = (self._buffers[name].index_select(0, ids_N) for name in self._names)  # type: ignore[union-attr]
            rows_NE: torch.Tensor = DECODERS[self._form.operation](*tensors, torch.float32, self._form.params)
            return rows_NE
        return decode(self.packed.at(ids_N))


def packed_layers(model: nn.Module) -> Iterator[tuple[str, PackedLinear]]:
    """Every layer with a packed weight, by its name."""
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            yield name, module


def bind_packed(model: Any, bind: Callable[[KernelSpec], Callable[..., Any]], dtype: torch.dtype) -> None:
    """Give every packed layer of ``model`` the implementation that ``bind`` chooses for it.

    dtype: of the activations.
    """
    if isinstance(model, nn.Module):
        for _, layer in packed_layers(model):
            device_type = next(layer.buffers()).device.type
            layer.bind(bind(layer.spec(device_type, dtype)))
