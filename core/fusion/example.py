"""A few tokens to run a language model on, with the plainest attention there is.

Shapes: T tokens; H query heads; G key/value heads; D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from drivetrain.contracts.attention import AttentionSpec, LayerPages
from drivetrain.fusion.observing import Example

_NUM_TOKENS = 4


class PlainStep:
    """Attention of one sequence's first tokens; its keys and values may also be written into pages."""

    def __init__(self, spec: AttentionSpec, device: torch.device) -> None:
        self._layers = spec.layers
        dtype = getattr(torch, spec.dtype)
        shapes = [(2, 1, _NUM_TOKENS, layer.num_kv_heads, layer.head_size) for layer in spec.layers]
        self._pages = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        self._slots = torch.arange(_NUM_TOKENS, device=device)

    def attend(self, layer: int, q_THD: torch.Tensor, k_TGD: torch.Tensor, v_TGD: torch.Tensor) -> torch.Tensor:
        attention = self._layers[layer]
        repeats = attention.num_heads // attention.num_kv_heads
        q, k, v = (x.transpose(0, 1) for x in (q_THD, k_TGD, v_TGD))
        k, v = k.repeat_interleave(repeats, dim=0), v.repeat_interleave(repeats, dim=0)
        scores = torch.matmul(q, k.transpose(1, 2)).float() * attention.scale
        if attention.soft_cap is not None:
            scores = torch.tanh(scores / attention.soft_cap) * attention.soft_cap
        place = torch.arange(q.shape[1], device=q.device)
        hidden = place[None, :] > place[:, None]
        if attention.window is not None:
            hidden |= place[None, :] <= place[:, None] - attention.window
        weights = functional.softmax(scores.masked_fill(hidden, float("-inf")), dim=-1)
        return torch.matmul(weights.to(v.dtype), v).transpose(0, 1)

    def layer_pages(self, layer: int) -> LayerPages | None:
        keys, values = self._pages[layer]
        return LayerPages(keys, values, self._slots)

    def attend_written(self, layer: int, q_THD: torch.Tensor) -> torch.Tensor:
        keys, values = self._pages[layer]
        return self.attend(layer, q_THD, keys[0], values[0])


def example_of(model: Any) -> Example | None:
    """A call of a language model of this project; None for any other module."""
    spec = getattr(model, "spec", None)
    attention = getattr(spec, "attention", None)
    if not isinstance(model, nn.Module) or not isinstance(attention, AttentionSpec):
        return None
    parameter = next(model.parameters(), None)
    if parameter is None:
        return None
    ids = torch.arange(_NUM_TOKENS, device=parameter.device) * 7 % int(getattr(spec, "vocab_size", 1))
    positions = torch.arange(_NUM_TOKENS, device=parameter.device)
    return (ids, positions, PlainStep(attention, parameter.device)), {}
