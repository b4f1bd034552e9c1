"""Which linear layers of a decoder layer read the same input, and what makes that input.

Shapes: I channels of an input; E hidden size; D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from drivetrain.contracts.attention import LayerAttention
from drivetrain.contracts.kernels import DecoderLayer, Projection


@dataclass(frozen=True)
class Source:
    """What an input is proportional to: dividing these numbers by a factor divides the input's channels by it.

    name:   of a norm's weight ("input_layernorm.weight"), or of a linear layer ("mlp.up_proj").
    rows_I: which of the norm's weights, or of the layer's outputs, each channel comes from; several channels may come
            from one.
    """

    name: str
    is_norm: bool
    rows_I: torch.Tensor

    def shared(self, values_I: torch.Tensor, *, mean: bool = True) -> torch.Tensor:
        """Values that are equal for channels from the same row: their mean, or their maximum."""
        count = int(self.rows_I.max()) + 1
        rows = self.rows_I.to(values_I.device)
        start = values_I.new_zeros(count)
        merged = start.scatter_reduce(0, rows, values_I, "mean" if mean else "amax", include_self=False)
        return merged[rows]


@dataclass(frozen=True)
class InputGroup:
    """Linear layers that read one input.

    linears: their names below the decoder layer, in the order of their use.
    source:  None where nothing can be folded into what comes before.
    """

    linears: tuple[str, ...]
    source: Source | None


def input_groups(layer: nn.Module, attention: LayerAttention) -> tuple[InputGroup, ...]:
    """The groups of a decoder layer, in the order of their use."""
    parts = cast(DecoderLayer, layer).parts()
    modules = {id(module): name for name, module in layer.named_modules()}
    weights = {id(parameter): name for name, parameter in layer.named_parameters()}

    def names(projections: Sequence[Projection]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(modules[id(projection.module)] for projection in projections))

    def norm(weight: torch.Tensor | None) -> Source | None:
        if weight is None:
            return None
        return Source(weights[id(weight)], True, torch.arange(weight.numel()))

    def outputs(projection: Projection, rows_I: torch.Tensor) -> Source:
        return Source(modules[id(projection.module)], False, projection.first + rows_I)

    head, shared_by = attention.head_size, attention.num_heads // attention.num_kv_heads
    channels = torch.arange(attention.num_heads * head)
    from_values = channels // (head * shared_by) * head + channels % head
    inner = torch.arange(cast(Any, parts.down.module).in_features)
    return (
        InputGroup(names((parts.q, parts.k, parts.v)), norm(parts.before_attention)),
        InputGroup(names((parts.o,)), outputs(parts.v, from_values)),
        InputGroup(names((parts.gate, parts.up)), norm(parts.before_mlp)),
        InputGroup(names((parts.down,)), outputs(parts.up, inner)),
    )


@torch.no_grad()
def fold(layer: nn.Module, group: InputGroup, factors_I: torch.Tensor, norm_offset: float) -> torch.Tensor:
    """Multiply the weights of a group by factors, and divide what makes their input by them.

    Returns the factors as they were used: channels from one row have the geometric mean of theirs.
    """
    source = group.source
    assert source is not None
    factors_I = source.shared(factors_I.log()).exp()
    for name in group.linears:
        linear = layer.get_submodule(name)
        cast(nn.Linear, linear).weight.mul_(factors_I)
    rows = source.rows_I.to(factors_I.device)
    if source.is_norm:
        weight = layer.get_parameter(source.name)
        divided = (weight[rows].float() + norm_offset) / factors_I - norm_offset
        weight[rows] = divided.to(weight.dtype)
        return factors_I
    before = cast(nn.Linear, layer.get_submodule(source.name))
    # Every row once, although several channels may come from it.
    divisors = torch.ones(before.out_features, device=factors_I.device)
    divisors[rows] = factors_I
    before.weight.div_(divisors.unsqueeze(1))
    if before.bias is not None:
        before.bias.div_(divisors)
    return factors_I
