"""Modules with packed weights. A quantizer makes them; kernels are bound to them once the model is built.

Shapes: ``...`` any leading dims; I, O input and output features; V vocabulary; E hidden size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Self, cast

import torch
from torch import nn
from torch.nn import functional

from drivetrain.contracts.kernels import KernelSpec
from drivetrain.contracts.packed import PackedWeight
from drivetrain.errors import ConfigError
from drivetrain.packed.decode import decode


class PackedModule(nn.Module):
    """Keeps the tensors of a packed weight as buffers, so that they move and are saved with the model."""

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

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Raise ConfigError where a gradient is asked for: rounded weights have none, their input has one."""
        if requires_grad:
            raise _no_gradient(self._form)
        return self

    def extra_repr(self) -> str:
        form = self._form
        return f"{form.operation}, in={form.in_features}, out={form.out_features}"


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

    def forward(self, ids_T: torch.Tensor) -> torch.Tensor:
        """int64 [...] -> [..., E], scaled as the architecture says."""
        rows_TE = decode(self.packed.at(ids_T.flatten())).to(self.dtype)
        rows_TE = rows_TE if self.scale == 1.0 else rows_TE * self.scale
        return rows_TE.unflatten(0, ids_T.shape) if ids_T.dim() != 1 else rows_TE


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
