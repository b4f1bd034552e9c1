"""What a training run takes on one rank, in bytes, before it is started.

State follows from the shapes of parameters, the precision, the optimizer and the partitioner; each says its part by its
contract. Activations follow from the architecture: bytes of every tensor that the decoder's operations keep for
backward, for each token, see :func:`decoder_activations`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from drivetrain.contracts.checkpoint import CheckpointPolicy, UnitActivations
from drivetrain.contracts.partitioner import Footprint, ParameterFacts, Partitioner, StateFormats
from drivetrain.contracts.precision import Dtypes

if TYPE_CHECKING:
    from drivetrain.contracts.loader import Checkpoint
    from drivetrain.contracts.optimizer import Optimizer

_ITEMSIZE = {"float64": 8, "float32": 4, "int64": 8, "bfloat16": 2, "float16": 2, "uint8": 1, "int8": 1}
_UNIT = re.compile(r"(?:^|\.)layers\.(\d+)\.")


@dataclass(frozen=True)
class Ledger:
    """Bytes of one rank. activations: kept for backward at the end of a forward, with the largest recomputed unit."""

    footprint: Footprint
    activations: int

    @property
    def peak(self) -> int:
        return self.footprint.state + self.footprint.buffers + self.activations


def formats_of(dtypes: Dtypes, optimizer: Optimizer) -> StateFormats:
    """What elements take in a run of this precision and optimizer. Gradients add up where the optimizer works."""
    param, wide = _ITEMSIZE[dtypes.param], dtypes.master_weight or dtypes.reduce
    has_master = dtypes.master_weight is not None and param < _ITEMSIZE[wide]
    works_in = wide if has_master else dtypes.param

    def state(name: str, shape: tuple[int, ...]) -> int:
        kept = optimizer.state_of(name, shape, works_in)
        return sum(_ITEMSIZE[tensor.dtype] * math.prod(tensor.shape) for tensor in kept.values())

    gradient = max(param, _ITEMSIZE[wide])
    return StateFormats(param, gradient, _ITEMSIZE[wide] if has_master else 0, state)


def parameters_of(checkpoint: Checkpoint) -> list[ParameterFacts]:
    """The parameters of a model by its files; a head that is tied to the embeddings is counted with them."""
    is_tied = bool(checkpoint.config.get("tie_word_embeddings", False))
    facts = []
    for name in checkpoint.names():
        if is_tied and name == "lm_head.weight":
            continue
        unit = _UNIT.search(name)
        facts.append(ParameterFacts(name, checkpoint.shape(name), int(unit[1]) if unit else None))
    return facts


def decoder_activations(config: Mapping[str, Any], dtype: str) -> UnitActivations:
    """Of one layer of a decoder, from the keys of its ``config.json``.

    Kept are the input of each norm and each product: the layer's input, the normed input, the sum after attention and
    its norm (4 hidden sizes); queries, turned queries and attention's result (3 of all heads); keys, turned keys and
    values (3 of the key heads), the logarithm of each head's sum of exponents; gate, up, and their product (3 inner
    sizes).
    """
    hidden, inner = int(config["hidden_size"]), int(config["intermediate_size"])
    heads = int(config["num_attention_heads"])
    size = int(config.get("head_dim") or hidden // heads)
    queries, keys = heads * size, int(config.get("num_key_value_heads") or heads) * size
    each = _ITEMSIZE[dtype]
    everything = each * (4 * hidden + 3 * queries + 3 * keys + 3 * inner) + 4 * heads
    products = each * (2 * queries + 2 * keys + hidden + 2 * inner + hidden)
    return UnitActivations(each * hidden, products, everything)


def activation_bytes(policy: CheckpointPolicy, unit: UnitActivations, num_units: int, tokens: int) -> int:
    """Of one micro-batch. A policy that computes something again needs room for one unit of it."""
    kept = [policy.kept(unit, number) for number in range(num_units)]
    again = max((unit.everything - of_unit for of_unit in kept), default=0)
    return tokens * (sum(kept) + again)


def loss_bytes(config: Mapping[str, Any], tokens: int) -> int:
    """Logits in float32, their gradient, and the last hidden states: at most, since kernels may hold but a chunk."""
    return tokens * 4 * (2 * int(config["vocab_size"]) + 2 * int(config["hidden_size"]))


def plan_ranks(
    partitioners: Mapping[str, Partitioner],
    parameters: Sequence[ParameterFacts],
    formats: StateFormats,
    ranks: int,
    activations: int,
) -> dict[str, Ledger]:
    """Name of each partitioner -> what a rank holds under it."""
    return {
        name: Ledger(partitioner.footprint(parameters, formats, ranks), activations)
        for name, partitioner in partitioners.items()
    }
