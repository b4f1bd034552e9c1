"""A Llama-like model of 13.8 million parameters that every contestant trains: plain torch, the same lines for all.

Shapes: B rows, T positions, E hidden size, H heads, D head size.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

VOCAB, HIDDEN, LAYERS, HEADS, INNER = 8192, 320, 8, 5, 1024


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.RMSNorm(HIDDEN), nn.RMSNorm(HIDDEN)
        self.q, self.k, self.v, self.o = (nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in range(4))
        self.gate, self.up = nn.Linear(HIDDEN, INNER, bias=False), nn.Linear(HIDDEN, INNER, bias=False)
        self.down = nn.Linear(INNER, HIDDEN, bias=False)

    def forward(self, x_BTE: torch.Tensor, cos_TD: torch.Tensor, sin_TD: torch.Tensor) -> torch.Tensor:
        normed = self.attention_norm(x_BTE)
        q, k, v = (linear(normed).unflatten(-1, (HEADS, -1)).transpose(1, 2) for linear in (self.q, self.k, self.v))
        q, k = _turned(q, cos_TD, sin_TD), _turned(k, cos_TD, sin_TD)
        heads = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BTE = x_BTE + self.o(heads.transpose(1, 2).flatten(2))
        normed = self.mlp_norm(x_BTE)
        return x_BTE + self.down(functional.silu(self.gate(normed)) * self.up(normed))


def _turned(x_BHTD: torch.Tensor, cos_TD: torch.Tensor, sin_TD: torch.Tensor) -> torch.Tensor:
    first, second = x_BHTD.chunk(2, -1)
    return x_BHTD * cos_TD + torch.cat((-second, first), -1) * sin_TD


class Network(nn.Module):
    """Token ids [B, T] and the tokens that should follow, to the mean loss."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)
        self.head.weight = self.embed.weight
        nn.init.normal_(self.embed.weight, std=0.02)

    def forward(self, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        half = HIDDEN // HEADS // 2
        rates = 1e4 ** -(torch.arange(half, dtype=torch.float32) / half)
        angles = torch.outer(torch.arange(ids.shape[1], dtype=torch.float32), rates).repeat(1, 2)
        x, cos, sin = self.embed(ids), angles.cos(), angles.sin()
        for layer in self.layers:
            x = layer(x, cos, sin)
        return functional.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


def make_network() -> Network:
    torch.manual_seed(0)
    return Network()


def batch_of(step: int, rank: int, rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Text-like tokens: frequent ones are frequent, and half of them repeat the one before the last."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    tokens = (torch.rand(rows, length + 1, generator=generator) ** 3 * VOCAB).long()
    tokens[:, 2::2] = tokens[:, 0:-2:2]
    return tokens[:, :-1], tokens[:, 1:]
