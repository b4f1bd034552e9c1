"""What a calibration takes, known before it begins: memory within a bound, and space on the disk.

Everything but the input and the output of a layer is there for one decoder layer at a time; those two lie in files that
are mapped into memory, so that the system may take their pages back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from drivetrain.calibration.groups import InputGroup, input_groups
from drivetrain.contracts.model import LayeredModel
from drivetrain.contracts.quantizer import Calibrates, Quantizer
from drivetrain.errors import MemoryBudgetError

_MOST_WINDOWS = 8
"""Windows that run at once, at most: more gain nothing on the machines that were tried."""

_SCORES_BYTES = 64 * 2**20
"""The most that attention holds of scores or masks at once; a backend may hold two such."""

_SLACK_BYTES = 48 * 2**20
"""What the allocator and libraries keep to themselves."""

_COPIES_WHILE_READING = 4
"""A tensor that is dequantized passes through several forms, one of them as integers of 32 bits."""

_FLOAT32 = 4


@dataclass(frozen=True)
class CalibrationPlan:
    """What it takes, beside what the process has already.

    memory_bytes:      at most.
    shares:            what that is for.
    disk_bytes:        beside the model that is written; freed at the end.
    windows_per_batch: windows that run through a layer at once.
    """

    memory_bytes: int
    shares: Mapping[str, int]
    disk_bytes: int
    windows_per_batch: int


def make_plan(
    model: LayeredModel,
    quantizers: Mapping[str, Quantizer],
    num_windows: int,
    context: int,
    dtype: torch.dtype,
    memory_bytes: int | None,
) -> CalibrationPlan:
    """Decide how much runs at once.

    quantizers:   name of each linear layer of the decoder layers -> what packs it.
    num_windows:  of calibration text, ``context`` tokens each; 0 where none is needed.
    memory_bytes: the bound; None for none.
    Raises MemoryBudgetError when the least that it takes is more than the bound.
    """
    shares = _largest_layer(model, quantizers, dtype)
    one_window = _window_bytes(model, context, dtype) if num_windows else 0
    embedding = model.embedding_bytes() if num_windows else 0
    fixed = sum(shares.values()) + _SLACK_BYTES
    least = max(fixed + one_window, embedding + _SLACK_BYTES)
    if memory_bytes is not None and least > memory_bytes:
        raise MemoryBudgetError(
            f"quantizing layer by layer takes at least {_mib(least)}: {_told(shares, one_window, embedding)}",
            where="--memory",
            found=_mib(memory_bytes),
            allowed=f"{_mib(least)} or more",
            hint="Give it more, or windows of fewer tokens with --context.",
        )
    room = math.inf if memory_bytes is None else memory_bytes - fixed
    windows = int(min(_MOST_WINDOWS, max(1, num_windows), room // max(1, one_window)))
    batch = windows * one_window
    disk = 2 * num_windows * context * model.spec.hidden_size * dtype.itemsize
    shares = {**shares, "tokens that run at once": batch, "the allocator": _SLACK_BYTES}
    return CalibrationPlan(max(fixed + batch, embedding + _SLACK_BYTES), shares, disk, windows)


def _largest_layer(model: LayeredModel, quantizers: Mapping[str, Quantizer], dtype: torch.dtype) -> dict[str, int]:
    largest: dict[str, int] = {}
    for number in range(model.spec.num_layers):
        shares = _layer_bytes(model, number, quantizers, dtype)
        if sum(shares.values()) > sum(largest.values()):
            largest = shares
    outer = max((rows * width for rows, width in model.outer_linears().values()), default=0)
    # A packed output layer is made by itself, from a copy of its weight.
    packs_outer = any(_packs(quantizers.get(name)) for name in model.outer_linears())
    beside = outer * dtype.itemsize * 3 if packs_outer else 0
    if beside > sum(largest.values()):
        return {"the output layer and its packed form": beside}
    return largest


def _packs(quantizer: Quantizer | None) -> bool:
    return quantizer is not None and quantizer.declares().weights is not None


def _layer_bytes(
    model: LayeredModel, number: int, quantizers: Mapping[str, Quantizer], dtype: torch.dtype
) -> dict[str, int]:
    layer, prefix = model.describe_layer(number), model.layer_name(number)
    groups = input_groups(layer, model.spec.attention.layers[number])
    sizes = {name: layer.get_parameter(f"{name}.weight").shape for group in groups for name in group.linears}
    weights = sum(parameter.numel() for parameter in layer.parameters()) * dtype.itemsize
    reading = _COPIES_WHILE_READING * max(parameter.numel() for parameter in layer.parameters()) * _FLOAT32
    work = packed = grams = 0
    for name, (rows, width) in sizes.items():
        full_name = f"{prefix}.{name}"
        quantizer = quantizers.get(full_name)
        if not _packs(quantizer):
            continue
        assert quantizer is not None
        own = (
            quantizer.work_bytes(full_name, rows, width)
            if isinstance(quantizer, Calibrates)
            else 2 * rows * width * _FLOAT32
        )
        # Beside what the quantizer takes: the weight in float32 twice, before and as it is decoded.
        work = max(work, own + 2 * rows * width * _FLOAT32)
        packed += int(rows * width * (quantizer.bits_per_weight() or 8 * dtype.itemsize) / 8)
    for group in groups:
        if any(wants_gram(quantizers.get(f"{prefix}.{name}")) for name in group.linears):
            grams += sizes[group.linears[0]][1] ** 2 * _FLOAT32
    return {
        "one layer's weights": weights,
        "its packed weights": packed,
        "its inputs' statistics": grams,
        "reading or packing one weight": max(work, reading),
    }


def wants_gram(quantizer: Quantizer | None) -> bool:
    """Whether a quantizer needs the whole matrix of second moments."""
    return isinstance(quantizer, Calibrates) and quantizer.wants_gram


def _window_bytes(model: LayeredModel, context: int, dtype: torch.dtype) -> int:
    """What one window takes on its way through a layer, with the numbers that its statistics are made of."""
    layer = model.describe_layer(0)
    linears = [module for module in layer.modules() if isinstance(module, nn.Linear)]
    between = sum(linear.in_features + 2 * linear.out_features for linear in linears) + 6 * model.spec.hidden_size
    widest = max(linear.in_features for linear in linears)
    heads = max(attention.num_heads for attention in model.spec.attention.layers)
    scores = 2 * min(_SCORES_BYTES, heads * context * context * _FLOAT32)
    return context * (between * dtype.itemsize + 3 * widest * _FLOAT32) + scores


def groups_of(model: LayeredModel, number: int) -> tuple[InputGroup, ...]:
    """The groups of a layer that is not loaded."""
    return input_groups(model.describe_layer(number), model.spec.attention.layers[number])


def _mib(num_bytes: int) -> str:
    return f"{math.ceil(num_bytes / 2**20)} MiB"


def _told(shares: Mapping[str, int], window: int, embedding: int) -> str:
    told = [f"{_mib(value)} for {name}" for name, value in shares.items() if value]
    told += [f"{_mib(window)} for one window of tokens"] if window else []
    told += [f"before that {_mib(embedding)} for the embeddings"] if embedding else []
    return ", ".join(told)
