"""A model of three blocks, small enough to be trained on one core in milliseconds, for the training kinds' suites."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

VOCAB_SIZE = 23
HIDDEN_SIZE = 12
NUM_BLOCKS = 3
SHARD_UNITS = tuple(f"layers.{index}" for index in range(NUM_BLOCKS))


class Block(nn.Module):
    """A normed, gated feed-forward with a residual connection and dropout."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN_SIZE)
        self.up = nn.Linear(HIDDEN_SIZE, 2 * HIDDEN_SIZE)
        self.gate = nn.Linear(HIDDEN_SIZE, 2 * HIDDEN_SIZE, bias=False)
        self.down = nn.Linear(2 * HIDDEN_SIZE, HIDDEN_SIZE)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        normed = self.norm(hidden)
        inner = functional.silu(self.gate(normed)) * self.up(normed)
        return hidden + self.down(self.dropout(inner))


class TinyNet(nn.Module):
    """Token ids [B, T] to logits [B, T, VOCAB_SIZE]."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB_SIZE, HIDDEN_SIZE)
        self.layers = nn.ModuleList(Block(dropout) for _ in range(NUM_BLOCKS))
        self.head = nn.Linear(HIDDEN_SIZE, VOCAB_SIZE)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(ids)
        for layer in self.layers:
            hidden = layer(hidden)
        logits: torch.Tensor = self.head(hidden)
        return logits


class AwkwardNet(nn.Module):
    """As :class:`TinyNet`, of parameters that are awkward to cut: a shared matrix, a frozen bias, a parameter without
    dims and one without elements, dtypes that differ, and fewer rows than there may be ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB_SIZE, HIDDEN_SIZE)
        self.layers = nn.ModuleList(Block(0.0) for _ in range(NUM_BLOCKS))
        self.squeeze = nn.Linear(HIDDEN_SIZE, 1)
        self.widen = nn.Linear(1, HIDDEN_SIZE)
        self.gain = nn.Parameter(torch.tensor(1.5))
        self.nothing = nn.Parameter(torch.empty(0, 4))
        self.head = nn.Linear(HIDDEN_SIZE, VOCAB_SIZE, bias=False)
        self.head.weight = self.embed.weight
        self.widen.bias.requires_grad_(False)
        self.squeeze.bfloat16()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(ids)
        for layer in self.layers:
            hidden = layer(hidden)
        hidden = self.gain * hidden + self.widen(self.squeeze(hidden)) + self.nothing.sum()
        logits: torch.Tensor = self.head(hidden)
        return logits


def make_awkward_net(seed: int = 0) -> AwkwardNet:
    """A net whose weights depend on ``seed`` only."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AwkwardNet()


def make_net(dropout: float = 0.0, seed: int = 0) -> TinyNet:
    """A net whose weights depend on ``seed`` only."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TinyNet(dropout)


def make_batch(rows: int = 8, length: int = 5, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and the tokens that should follow, both [rows, length]."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCAB_SIZE, (rows, length + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def loss_of(net: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Mean cross entropy over all tokens."""
    logits = net(batch[0])
    return functional.cross_entropy(logits.reshape(-1, VOCAB_SIZE), batch[1].reshape(-1))
