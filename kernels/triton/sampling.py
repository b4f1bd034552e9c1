"""Drawing tokens on the device: one program a row, no sort, nothing but the token leaves it.

A token's distance is how far its score lies below the best one, divided by the temperature: never negative, so that the
bits of its float32 order like the numbers, and its weight is ``exp(-distance)``. Top-k and top-p are bounds on the
distance. Each is found by bisection over the bits, where every pass over the row takes the bounds to distances that
occur, so that about as many passes are needed as the number of candidates has digits in base 2; settings that are off
cost none. The draw is then inverted by running sums over blocks of the vocabulary.

Shapes: S sequences; V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from drivetrain.contracts.kernels import KernelSpec
from drivetrain.kernels.triton.launch import INTERPRETED, dense_last, power_of_two
from drivetrain.kernels.triton.operators import NAMESPACE, define
from drivetrain.kernels.triton.tuning import FUSED
from drivetrain.operators import Operator, visible

_LAST_KEY = tl.constexpr(0x7F7FFFFF)
"""Bits of the largest finite float32."""

_NO_KEY = tl.constexpr(0x7F800000)
"""Bits of infinity: the distance of a token that can't be drawn."""


@triton.jit
def _keys(row_ptr: tl.tensor, tokens: tl.tensor, V: tl.tensor, best: tl.tensor, heat: tl.tensor) -> tl.tensor:
    """Distances as integers of the same order; what is no number or forbidden comes last."""
    score = tl.load(row_ptr + tokens, mask=tokens < V, other=float("-inf")).to(tl.float32)
    distance = (best - score) / heat
    key = distance.to(tl.int32, bitcast=True)
    # The best has distance 0, as -0.0 too; NaN has bits beyond those of infinity, or negative ones.
    key = tl.where(distance == 0.0, 0, key)
    return tl.where((key < 0) | (key > _NO_KEY), _NO_KEY, key)


@triton.jit
def _weights(keys: tl.tensor) -> tl.tensor:
    return tl.where(keys < _NO_KEY, tl.exp(-keys.to(tl.float32, bitcast=True)), 0.0)


@triton.jit
def _best(row_ptr: tl.tensor, V: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
    """The best score and the first token that has it."""
    best = float("-inf")
    token = 0
    for start in range(0, V, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        score = tl.load(row_ptr + tokens, mask=tokens < V, other=float("-inf")).to(tl.float32)
        score = tl.where(score == score, score, float("-inf"))
        top = tl.max(score, axis=0)
        first = tl.min(tl.where(score == top, tokens, V), axis=0)
        token = tl.where(top > best, first, token)
        best = tl.maximum(best, top)
    return best, token


@triton.jit
def _bound(
    row_ptr: tl.tensor,
    V: tl.tensor,
    best: tl.tensor,
    heat: tl.tensor,
    last: tl.tensor,
    wanted: tl.tensor,
    BY_WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """The smallest key, not above ``last``, up to which tokens number ``wanted`` or more, or weigh it.

    Below ``low`` there are too few, up to ``high`` there are enough; both are keys that occur.
    """
    low = -1
    high = last
    while low + 1 < high:
        middle = low + (high - low) // 2
        measure = 0.0
        below = low
        above = high
        for start in range(0, V, BLOCK):
            keys = _keys(row_ptr, start + tl.arange(0, BLOCK), V, best, heat)
            is_near = keys <= middle
            if BY_WEIGHT:
                measure += tl.sum(tl.where(is_near, _weights(keys), 0.0), axis=0)
            else:
                measure += tl.sum(is_near.to(tl.int32), axis=0).to(tl.float32)
            below = tl.maximum(below, tl.max(tl.where(is_near, keys, -1), axis=0))
            above = tl.minimum(above, tl.min(tl.where(is_near, high, keys), axis=0))
        if measure >= wanted:
            # The bound is at most the largest key that was counted; one that occurs nowhere in between is skipped.
            high = tl.where(below > low, below, middle)
            low = tl.where(below > low, low, high - 1)
        else:
            low = tl.maximum(above - 1, middle)
    return high


@triton.jit
def _mass(
    row_ptr: tl.tensor, V: tl.tensor, best: tl.tensor, heat: tl.tensor, last: tl.tensor, BLOCK: tl.constexpr
) -> tl.tensor:
    """What all tokens up to a key weigh."""
    total = 0.0
    for start in range(0, V, BLOCK):
        keys = _keys(row_ptr, start + tl.arange(0, BLOCK), V, best, heat)
        total += tl.sum(tl.where(keys <= last, _weights(keys), 0.0), axis=0)
    return total


@triton.jit
def _kept(keys: tl.tensor, last: tl.tensor, num_ties: tl.tensor, ties_before: tl.tensor, least: tl.tensor) -> tl.tensor:
    """Weights of what the filters keep: of the tokens at the last key only the first ``num_ties``."""
    weights = _weights(keys)
    is_tie = keys == last
    rank = ties_before + tl.cumsum(is_tie.to(tl.int32), axis=0)
    is_kept = (keys < last) | (is_tie & (rank <= num_ties))
    return tl.where(is_kept & (weights >= least), weights, 0.0)


@triton.jit
def _invert(
    row_ptr: tl.tensor,
    V: tl.tensor,
    best: tl.tensor,
    heat: tl.tensor,
    last: tl.tensor,
    num_ties: tl.tensor,
    least: tl.tensor,
    draw: tl.tensor,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """The first token at which the running sum of kept weights exceeds ``draw`` of all of them."""
    total = tl.zeros([], dtype=tl.float32)
    ties = 0
    final = 0
    for start in range(0, V, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        keys = _keys(row_ptr, tokens, V, best, heat)
        kept = _kept(keys, last, num_ties, ties, least)
        total += tl.sum(kept, axis=0)
        ties += tl.sum((keys == last).to(tl.int32), axis=0)
        final = tl.maximum(final, tl.max(tl.where(kept > 0.0, tokens, 0), axis=0))
    point = (draw * total.to(tl.float64)).to(tl.float32)
    before = 0.0
    ties = 0
    found = -1
    start = 0
    while (found < 0) & (start < V):
        tokens = start + tl.arange(0, BLOCK)
        keys = _keys(row_ptr, tokens, V, best, heat)
        kept = _kept(keys, last, num_ties, ties, least)
        is_past = (kept > 0.0) & (before + tl.cumsum(kept, axis=0) > point)
        first = tl.min(tl.where(is_past, tokens, V), axis=0)
        found = tl.where(first < V, first, -1)
        before += tl.sum(kept, axis=0)
        ties += tl.sum((keys == last).to(tl.int32), axis=0)
        start += BLOCK
    # A draw so near to 1 that rounding leaves nothing beyond it takes the last token there is.
    return tl.where(found < 0, final, found)


@triton.jit
def _sample(
    logits_ptr: tl.tensor,
    temperature_ptr: tl.tensor,
    top_k_ptr: tl.tensor,
    top_p_ptr: tl.tensor,
    min_p_ptr: tl.tensor,
    draws_ptr: tl.tensor,
    out_ptr: tl.tensor,
    V: tl.tensor,
    stride: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    row_ptr = logits_ptr + row.to(tl.int64) * stride
    best, token = _best(row_ptr, V, BLOCK)
    heat = tl.load(temperature_ptr + row)
    if (heat > 0.0) & (best > float("-inf")):
        heat = tl.maximum(heat, 1e-30)
        top_k = tl.load(top_k_ptr + row)
        top_p = tl.load(top_p_ptr + row)
        least = tl.load(min_p_ptr + row)
        last = _LAST_KEY
        num_ties = V
        if (top_k > 0) & (top_k < V):
            last = _bound(row_ptr, V, best, heat, last, top_k.to(tl.float32), False, BLOCK)
        if top_p < 1.0:
            wanted = top_p * _mass(row_ptr, V, best, heat, last, BLOCK)
            last = _bound(row_ptr, V, best, heat, last, wanted, True, BLOCK)
            missing = wanted - _mass(row_ptr, V, best, heat, last - 1, BLOCK)
            each = tl.exp(-last.to(tl.float32, bitcast=True))
            num_ties = tl.maximum(1, tl.minimum(tl.ceil(missing / each), 1073741824.0).to(tl.int32))
        draw = tl.load(draws_ptr + row)
        token = _invert(row_ptr, V, best, heat, last, num_ties, least, draw, BLOCK)
    tl.store(out_ptr + row, token.to(tl.int64))


def sample(
    logits_SV: torch.Tensor,
    temperature_S: torch.Tensor,
    top_k_S: torch.Tensor,
    top_p_S: torch.Tensor,
    min_p_S: torch.Tensor,
    draws_S: torch.Tensor,
) -> torch.Tensor:
    logits_SV = dense_last(logits_SV)
    num_rows, vocab = logits_SV.shape
    out_S = torch.empty(num_rows, dtype=torch.int64, device=logits_SV.device)
    if num_rows:
        settings = (x.contiguous() for x in (temperature_S, top_k_S, top_p_S, min_p_S, draws_S))
        block = min(512 if INTERPRETED else 8192, power_of_two(vocab))
        options = {"BLOCK": block, "num_warps": 16 if block > 2048 else 4, **FUSED}
        _sample[(num_rows,)](logits_SV, *settings, out_S, vocab, logits_SV.stride(0), **options)
    return out_S


def make_sample(spec: KernelSpec) -> Callable[..., torch.Tensor]:
    overload = define(
        f"{NAMESPACE}::sample",
        "(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor draws) -> Tensor",
        sample,
        fake=lambda logits, *settings: logits.new_empty((logits.shape[0],), dtype=torch.int64),
    )
    return visible(sample, Operator(overload))
