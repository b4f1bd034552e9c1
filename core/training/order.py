"""The order of samples: a function of the seed alone, whatever the number of ranks."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field


@dataclass
class SampleOrder:
    """Position in the run -> index of a sample. Each epoch visits every sample once, each in another order.

    num_samples: of the data set.
    """

    num_samples: int
    seed: int
    shuffle: bool = True
    _epoch: int = field(default=-1, repr=False)
    _permutation: list[int] = field(default_factory=list, repr=False)

    def index(self, position: int) -> int:
        """The sample at ``position``, counted from the run's beginning."""
        epoch, place = divmod(position, self.num_samples)
        if not self.shuffle:
            return place
        if epoch != self._epoch:
            self._epoch, self._permutation = epoch, self._permuted(epoch)
        return self._permutation[place]

    def _permuted(self, epoch: int) -> list[int]:
        import torch

        # torch's generator on the CPU takes 32 bits of a seed, so that epoch and seed are mixed.
        mixed = int.from_bytes(hashlib.sha256(f"{self.seed}/{epoch}".encode()).digest()[:4], "big")
        generator = torch.Generator().manual_seed(mixed)
        order: list[int] = torch.randperm(self.num_samples, generator=generator).tolist()
        return order


@dataclass(frozen=True)
class StepShape:
    """How a step's samples are shared out.

    micro_batch: samples of one forward and backward of one rank.
    accumulate:  micro-batches of each rank.
    world_size:  ranks.
    """

    micro_batch: int
    accumulate: int
    world_size: int

    @property
    def batch(self) -> int:
        """Samples of a step, over all ranks."""
        return self.micro_batch * self.accumulate * self.world_size

    def positions(self, seen: int, rank: int, index: int) -> range:
        """Positions of the samples of ``rank``'s micro-batch ``index``, after ``seen`` samples in earlier steps.

        Ranks take turns, so that more ranks with fewer micro-batches each work on the same parts.
        """
        first = seen + (index * self.world_size + rank) * self.micro_batch
        return range(first, first + self.micro_batch)
