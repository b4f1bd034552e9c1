"""The model in training, as a recipe's loss sees it: the same forward as in serving, over packed documents.

Shapes: T tokens of a micro-batch; N of them whose prediction counts; E hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from drivetrain.contracts.attention import AttentionBackend, AttentionBatch, AttentionSpec
from drivetrain.contracts.model import ScoresTargets
from drivetrain.contracts.recipe import IGNORED, TokenBatch


class ModelForward:
    """Runs a model over micro-batches, each document attending to itself alone."""

    def __init__(self, model: nn.Module, attention: AttentionBackend, spec: AttentionSpec) -> None:
        self.model: Any = model
        self._attention = attention
        self._spec = spec

    def hidden(self, batch: TokenBatch) -> torch.Tensor:
        step = self._attention.begin(self._spec, attention_batch(batch), None)
        hidden_TE: torch.Tensor = self.model(batch.ids_T, batch.positions_T, step)
        return hidden_TE

    def token_losses(self, hidden_TE: torch.Tensor, targets_T: torch.Tensor) -> torch.Tensor:
        rows = (targets_T != IGNORED).nonzero().squeeze(1)
        if rows.numel() == 0:
            # Nothing to learn, and yet a backward that reaches every rank's parameters.
            return targets_T.new_zeros(targets_T.shape, dtype=torch.float32) + 0.0 * hidden_TE.float().sum()
        scored_NE, wanted_N = hidden_TE.index_select(0, rows), targets_T.index_select(0, rows)
        if isinstance(self.model, ScoresTargets):
            losses_N = self.model.token_losses(scored_NE, wanted_N)
        else:
            losses_N = losses_of_logits(self.model, scored_NE, wanted_N)
        return torch.zeros(targets_T.shape, dtype=torch.float32, device=targets_T.device).index_put((rows,), losses_N)


def attention_batch(batch: TokenBatch) -> AttentionBatch:
    """A step of serving in which every document is a sequence that nothing is known of yet."""
    device = batch.ids_T.device
    lengths = torch.tensor(batch.lengths, dtype=torch.int32)
    starts = functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return AttentionBatch(batch.lengths, (0,) * len(batch.lengths), starts.to(device), lengths.to(device))


def losses_of_logits(model: Any, hidden_NE: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """Cross entropy in float32 over the model's own logits."""
    return functional.cross_entropy(model.logits(hidden_NE).float(), targets_N, reduction="none")
