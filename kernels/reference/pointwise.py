"""Norms, rotary embedding and activations in plain torch.

Shapes: ``...`` any leading dims; E features; T tokens; H query heads; G key/value heads; D head size; R rotary dims; B
blocks of the cache; N tokens in a block.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from drivetrain.contracts.kernels import KernelSpec


def make_rms_norm(spec: KernelSpec) -> Callable[..., torch.Tensor]:
    """``(x [..., E], weight [E]) -> [..., E]``; computed in float32 or wider and rounded once. Source: Zhang & Sennrich
    2019, "Root Mean Square Layer Normalization", equation 4."""
    eps = float(spec.params.get("eps", 1e-6))
    offset = float(spec.params.get("weight_offset", 0.0))

    def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, weight.shape, weight, eps)

    def rms_norm_with_offset(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        # Weight and offset are added in float32: 1 + weight would lose the weight's low bits in bfloat16.
        wide = torch.promote_types(x.dtype, torch.float32)
        return (functional.rms_norm(x.to(wide), weight.shape, None, eps) * (weight.to(wide) + offset)).to(x.dtype)

    return rms_norm_with_offset if offset else rms_norm


def make_add_rms_norm(spec: KernelSpec) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """``(x [..., E], residual [..., E], weight [E]) -> (normed, summed)``: the norm is of the sum as it is kept."""
    rms_norm = make_rms_norm(spec)

    def add_rms_norm(
        x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        summed = residual + x
        return rms_norm(summed, weight), summed

    return add_rms_norm


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


def rope(
    q_THD: torch.Tensor, k_TGD: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate the first R dims of queries and keys in the wider of their own and the angles' dtype, and return them in
    their own. Source: Su et al. 2021, "RoFormer", equation 34, with dims i and i + R/2 as the pair."""
    rotary_size = cos_TR.shape[-1]
    cos, sin = cos_TR.unsqueeze(1), sin_TR.unsqueeze(1)
    if rotary_size == q_THD.shape[-1]:
        return _rotate(q_THD, cos, sin), _rotate(k_TGD, cos, sin)
    q, k = (torch.cat((_rotate(x[..., :rotary_size], cos, sin), x[..., rotary_size:]), dim=-1) for x in (q_THD, k_TGD))
    return q, k


@torch.no_grad()
def rope_write(
    q_THD: torch.Tensor,
    k_TGD: torch.Tensor,
    v_TGD: torch.Tensor,
    cos_TR: torch.Tensor,
    sin_TR: torch.Tensor,
    keys_BNGD: torch.Tensor,
    values_BNGD: torch.Tensor,
    slots_T: torch.Tensor,
) -> torch.Tensor:
    """:func:`rope`, with keys and values written where the cache has a place for them."""
    q, k = rope(q_THD, k_TGD, cos_TR, sin_TR)
    blocks_T, offsets_T = slots_T // keys_BNGD.shape[1], slots_T % keys_BNGD.shape[1]
    for cache_BNGD, new_TGD in ((keys_BNGD, k), (values_BNGD, v_TGD)):
        cache_BNGD.index_put_((blocks_T, offsets_T), new_TGD.to(cache_BNGD.dtype))
    return q


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up``. Source: Shazeer 2020, "GLU Variants Improve Transformer", equation 5 (SwiGLU)."""
    return functional.silu(gate) * up


def gelu_tanh_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """``gelu(gate) * up`` with the tanh approximation of Hendrycks & Gimpel 2016, section 2."""
    return functional.gelu(gate, approximate="tanh") * up
