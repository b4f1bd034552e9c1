"""What the machine allows: bytes that must be read and operations that must be computed, over two measured ceilings."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from drivetrain.bench.workloads import WorkItem


@dataclass(frozen=True)
class Geometry:
    """The sizes of a decoder that its costs follow from.

    num_weights:   all weights that one decoded token reads: those of the layers and of the output head. An input
                   embedding that is not also the head is looked up, not read.
    layer_weights: of these, the weights of the layers' matrices.
    head_weights:  of these, the weights of the output head.
    attention_width: query heads times head size.
    """

    num_weights: int
    layer_weights: int
    head_weights: int
    num_layers: int
    attention_width: int
    vocab_size: int


@dataclass(frozen=True)
class Ceilings:
    """Measured: bytes a second over memory, operations a second of products by the operands' dtype."""

    read_bytes_per_second: float
    float32_flops: float
    bfloat16_flops: float

    def best_of(self, other: Ceilings) -> Ceilings:
        """The higher of each: load on the machine only lowers what is measured."""
        return Ceilings(
            max(self.read_bytes_per_second, other.read_bytes_per_second),
            max(self.float32_flops, other.float32_flops),
            max(self.bfloat16_flops, other.bfloat16_flops),
        )

    def flops(self, bits: float) -> float | None:
        """The ceiling for weights of so many bits; None where no product of that kind is measured here."""
        if bits >= 32:
            return self.float32_flops
        return max(self.float32_flops, self.bfloat16_flops) if bits >= 16 else None


@dataclass(frozen=True)
class Weights:
    """The weights as an engine holds them. ``bits`` of one of a large matrix, without the scales of a group."""

    bits: float
    num_bytes: int


def read_geometry(path: Path) -> Geometry:
    """The sizes of the model in a GGUF file."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    sizes = {tensor.name: int(tensor.n_elements) for tensor in reader.tensors}

    def number(key: str) -> int:
        architecture = reader.fields["general.architecture"].contents()
        return int(reader.fields[f"{architecture}.{key}"].contents())

    embedding = sizes["token_embd.weight"]
    head = sizes.get("output.weight", embedding)
    layer_weights = sum(size for name, size in sizes.items() if name.startswith("blk.") and "norm" not in name)
    return Geometry(
        num_weights=sum(sizes.values()) - (embedding if "output.weight" in sizes else 0),
        layer_weights=layer_weights,
        head_weights=head,
        num_layers=number("block_count"),
        attention_width=number("embedding_length"),
        vocab_size=embedding // number("embedding_length"),
    )


def gguf_weight_bytes(path: Path) -> int:
    """Bytes of the tensors in a GGUF file that one decoded token reads."""
    from gguf import GGUFReader

    sizes = {tensor.name: int(tensor.n_bytes) for tensor in GGUFReader(path).tensors}
    return sum(sizes.values()) - (sizes["token_embd.weight"] if "output.weight" in sizes else 0)


def operations(geometry: Geometry, items: Sequence[WorkItem]) -> int:
    """Multiplications and additions that the items can't do without.

    Two for each weight of the layers and token, two for each weight of the head and output token, and four for each
    channel, layer and pair of a query with a key at or before it. The last output token is never an input. A prefix
    that all items share is computed once.
    """
    shared = _shared_tokens(items)
    total = 0
    for place, item in enumerate(items):
        end = len(item.prompt) + item.max_tokens - 1
        begin = shared if place else 0
        pairs = (end * (end + 1) - begin * (begin + 1)) // 2
        total += 2 * geometry.layer_weights * (end - begin)
        total += 2 * geometry.head_weights * item.max_tokens
        total += 4 * geometry.num_layers * geometry.attention_width * pairs
    return total


def least_seconds(geometry: Geometry, items: Sequence[WorkItem], weights: Weights, ceilings: Ceilings) -> float | None:
    """Least time for all items at once: arithmetic, or the weights read once for each token of the longest output.

    None where the arithmetic of these weights has no ceiling measured here.
    """
    flops = ceilings.flops(weights.bits)
    if flops is None:
        return None
    return max(operations(geometry, items) / flops, _reading_seconds(items, weights, ceilings))


def least_decode_seconds(
    geometry: Geometry, items: Sequence[WorkItem], weights: Weights, ceilings: Ceilings
) -> float | None:
    """The same for all output tokens but the first of each item. One stream is taken as bound by reading alone."""
    reading = _reading_seconds(items, weights, ceilings) * (1 - 1 / max(item.max_tokens for item in items))
    if len(items) == 1:
        return reading
    flops = ceilings.flops(weights.bits)
    if flops is None:
        return None
    firsts = [WorkItem(item.prompt, 1) for item in items]
    return max((operations(geometry, items) - operations(geometry, firsts)) / flops, reading)


def _reading_seconds(items: Sequence[WorkItem], weights: Weights, ceilings: Ceilings) -> float:
    return max(item.max_tokens for item in items) * weights.num_bytes / ceilings.read_bytes_per_second


def _shared_tokens(items: Sequence[WorkItem]) -> int:
    if len(items) < 2:
        return 0
    columns = zip(*(item.prompt for item in items), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))
