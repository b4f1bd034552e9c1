"""Gradients of the C++ operations, in torch's own operations, so that torch.compile can trace them.

Computed in float32 or wider and rounded once.

Shapes: ``...`` any leading dims; E, I, O features; T tokens; R rotary dims.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

_GELU_SCALE = math.sqrt(2 / math.pi)
_GELU_CUBE = 0.044715


def _wide(*tensors: Tensor) -> list[Tensor]:
    return [tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors]


def rms_norm(grad: Tensor, x: Tensor, weight_E: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """Of x and weight. With n = x / rms(x): dx = (g w - n mean(g w n)) / rms(x), dw = sum of g n."""
    grad_w, x_w, weight_w = _wide(grad, x, weight_E)
    inverse = torch.rsqrt(x_w.square().mean(dim=-1, keepdim=True) + eps)
    normed, scaled = x_w * inverse, grad_w * (weight_w + offset)
    grad_x = inverse * (scaled - normed * (scaled * normed).mean(dim=-1, keepdim=True))
    grad_weight = (grad_w * normed).flatten(0, -2).sum(dim=0)
    return grad_x.to(x.dtype), grad_weight.to(weight_E.dtype)


def rotate(grad: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """Of queries or keys [T, H, D]: the transposed rotation of the first R dims."""
    rotary = cos_TR.shape[-1]
    (wide,) = _wide(grad)
    first, second = wide[..., :rotary].chunk(2, dim=-1)
    cos, sin = cos_TR.unsqueeze(1).to(wide.dtype), sin_TR.unsqueeze(1).to(wide.dtype)
    (cos1, cos2), (sin1, sin2) = cos.chunk(2, dim=-1), sin.chunk(2, dim=-1)
    parts = (first * cos1 + second * sin2, second * cos2 - first * sin1, wide[..., rotary:])
    return torch.cat(parts, dim=-1).to(grad.dtype)


def gated(grad: Tensor, gate: Tensor, up: Tensor, activation: int) -> tuple[Tensor, Tensor]:
    """Of gate and up, for silu (0) or gelu with the tanh approximation (1)."""
    grad_w, gate_w, up_w = _wide(grad, gate, up)
    if activation == 0:
        sigmoid = torch.sigmoid(gate_w)
        value, slope = gate_w * sigmoid, sigmoid * (1 + gate_w * (1 - sigmoid))
    else:
        inner = torch.tanh(_GELU_SCALE * (gate_w + _GELU_CUBE * gate_w**3))
        value = 0.5 * gate_w * (1 + inner)
        slope = 0.5 * (1 + inner) + 0.5 * gate_w * (1 - inner**2) * _GELU_SCALE * (1 + 3 * _GELU_CUBE * gate_w**2)
    return (grad_w * up_w * slope).to(gate.dtype), (grad_w * value).to(up.dtype)


def linear(grad: Tensor, x: Tensor, weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Of x and weight."""
    return grad @ weight_OI, grad.flatten(0, -2).T @ x.flatten(0, -2)


def gated_linear(
    grad: Tensor, x: Tensor, gate_OI: Tensor, up_OI: Tensor, activation: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Of x, gate and up; the two products are computed again."""
    grad_gate, grad_up = gated(grad, functional.linear(x, gate_OI), functional.linear(x, up_OI), activation)
    (x_by_gate, weight_gate), (x_by_up, weight_up) = linear(grad_gate, x, gate_OI), linear(grad_up, x, up_OI)
    return x_by_gate + x_by_up, weight_gate, weight_up
