"""Packed weights: what a quantizer or a loader hands over, and a kernel multiplies by.

Shapes: O output features; I input features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class PackedWeight:
    """The weight of one linear layer in fewer bits.

    operation:    the logical operation that multiplies by it: ``"linear_int4"``. It fixes the layout of ``tensors``.
    tensors:      the operation's weight arguments, by name and in the order of its signature (all between ``x`` and
                  ``bias``). The first dim of each is O, so that a slice of it is some of the outputs; but for a tensor
                  without dims, which holds for all of them.
    out_features, in_features: O and I.
    params:       what the operation's spec must say: ``{"group": 64}``.
    order:        int64 [I]: which input stands at each place of the packed rows; None where they are in order.
    """

    operation: str
    tensors: Mapping[str, torch.Tensor]
    out_features: int
    in_features: int
    params: Mapping[str, float] = field(default_factory=dict)
    order: torch.Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of everything that is kept."""
        kept = [*self.tensors.values(), *([] if self.order is None else [self.order])]
        return sum(tensor.numel() * tensor.element_size() for tensor in kept)

    @property
    def bits_per_weight(self) -> float:
        """Bits that one weight takes, scales and all included."""
        return 8 * self.num_bytes / max(1, self.out_features * self.in_features)

    def rows(self, first: int, count: int) -> PackedWeight:
        """Outputs ``first`` .. ``first + count - 1``: views, no copies."""
        tensors = {name: t[first : first + count] if t.dim() else t for name, t in self.tensors.items()}
        return dataclasses.replace(self, tensors=tensors, out_features=count)

    def at(self, ids: torch.Tensor) -> PackedWeight:
        """The outputs with these numbers (int64 [N]), gathered: a table of which only these are looked up."""
        tensors = {name: _gathered(t, ids) if t.dim() else t for name, t in self.tensors.items()}
        return dataclasses.replace(self, tensors=tensors, out_features=ids.numel())

    def to(self, device: torch.device) -> PackedWeight:
        """The same on ``device``."""
        tensors = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        return dataclasses.replace(self, tensors=tensors, order=None if self.order is None else self.order.to(device))


def _gathered(tensor: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Some rows. Small floats are gathered as bytes: torch has no indexing for them on every device."""
    import torch

    if tensor.is_floating_point() and tensor.element_size() == 1:
        return tensor.view(torch.uint8).index_select(0, ids).view(tensor.dtype)
    return tensor.index_select(0, ids)
