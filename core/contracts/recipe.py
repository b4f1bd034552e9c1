"""Contract of a recipe: what is trained. It turns data into samples, samples into batches, and batches into a loss.

Shapes: T tokens of a micro-batch, packed flat over documents; E hidden size.

The order of samples, and which rank gets which, are the trainer's business: the order depends on the seed alone, so
that a run which was interrupted, or goes on with another number of ranks, sees the same samples in the same order.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from drivetrain.contracts.plugin import Plugin

if TYPE_CHECKING:
    import torch

    from drivetrain.contracts.loader import TokenizerData

IGNORED = -100
"""Target of a place whose prediction does not count; ``linear_cross_entropy`` gives it a loss of 0."""


@dataclass(frozen=True)
class Sample:
    """What one row of a micro-batch holds: one or more documents, one after the other.

    ids:     token ids.
    targets: the token that should follow each, as long as ``ids``; IGNORED where nothing is to be learnt.
    lengths: tokens of each document; they sum to ``len(ids)``. Attention sees a document's own tokens only.
    """

    ids: Sequence[int]
    targets: Sequence[int]
    lengths: tuple[int, ...]


class Samples(Protocol):
    """Everything there is to train on, in a fixed order. Reading one changes nothing."""

    @property
    def digest(self) -> str:
        """Tells whether two data sets give the same samples; a saved state carries it."""

    def __len__(self) -> int:
        """How many there are, at least one."""

    def __getitem__(self, index: int) -> Sample:
        """The sample at ``index``, the same at every call."""


@dataclass(frozen=True)
class RecipeContext:
    """What a recipe is told.

    tokenizer:    of the model.
    vocab_size:   token ids are below it.
    max_position: tokens of context that the model was made for.
    eos_token_id: ends a document; None where the model names none.
    note:         called with a sentence that users should see (lines that were skipped, and why).
    """

    tokenizer: TokenizerData
    vocab_size: int
    max_position: int
    eos_token_id: int | None
    note: Callable[[str], None]


@dataclass(frozen=True)
class TokenBatch:
    """One micro-batch on the device.

    ids_T, targets_T, positions_T: int64 [T]; positions count from 0 in each document.
    lengths:                       tokens of each document, in order; their sum is T.
    num_targets:                   places whose prediction counts. The step's loss is the mean over all of them, of all
                                   micro-batches and ranks.
    extra:                         whatever else the recipe's loss needs.
    """

    ids_T: torch.Tensor
    targets_T: torch.Tensor
    positions_T: torch.Tensor
    lengths: tuple[int, ...]
    num_targets: int
    extra: Mapping[str, Any] = field(default_factory=dict)


class Forward(Protocol):
    """The model in training, as a recipe's loss sees it."""

    def hidden(self, batch: TokenBatch) -> torch.Tensor:
        """Final hidden states, [T, E], each document attending to itself alone."""

    def token_losses(self, hidden_TE: torch.Tensor, targets_T: torch.Tensor) -> torch.Tensor:
        """Cross entropy of each place's target, float32 [T]; 0 where the target is IGNORED."""


class Recipe(Plugin):
    """What is learnt from which data."""

    kind = "recipe"

    @abstractmethod
    def open(self, context: RecipeContext) -> Samples:
        """Read and check the data. Every rank calls it, and must come to the same samples.

        Raises DataError that names file and line for what can't be read, and for data without a single sample.
        """

    def collate(self, samples: Sequence[Sample], device: torch.device) -> TokenBatch:
        """One micro-batch of these samples, packed flat. Pure."""
        import numpy as np
        import torch

        lengths = tuple(length for sample in samples for length in sample.lengths)
        ids = np.concatenate([np.asarray(sample.ids, dtype=np.int64) for sample in samples])
        targets = np.concatenate([np.asarray(sample.targets, dtype=np.int64) for sample in samples])
        positions = np.concatenate([np.arange(length, dtype=np.int64) for length in lengths])
        packed = torch.from_numpy(np.stack([ids, targets, positions])).to(device)
        num_targets = int(np.count_nonzero(targets != IGNORED))
        return TokenBatch(packed[0], packed[1], packed[2], lengths, num_targets)

    def loss(self, forward: Forward, batch: TokenBatch) -> torch.Tensor:
        """The sum of the loss over the batch's targets, a float32 scalar; the trainer divides it by the number of all
        targets of the step."""
        return forward.token_losses(forward.hidden(batch), batch.targets_T).sum()
