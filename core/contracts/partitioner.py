"""Contract of a partitioner: how parameters, gradients and optimizer state lie over ranks."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from drivetrain.contracts.plugin import Plugin

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from contextlib import AbstractContextManager

    import torch
    from torch.distributed.device_mesh import DeviceMesh

    from drivetrain.contracts.precision import Dtypes


@dataclass(frozen=True)
class PartitionContext:
    """What a partitioner is told. ``mesh`` is None in a run of one process.

    shard_units: names of the modules that are gathered and freed as one, usually the decoder layers.
    """

    mesh: DeviceMesh | None
    dtypes: Dtypes
    shard_units: tuple[str, ...]


class Partitioner(Plugin):
    """Lays a model over ranks so that a step gives the same parameters as the unpartitioned step would."""

    kind = "partitioner"

    @abstractmethod
    def partition(self, model: torch.nn.Module, context: PartitionContext) -> torch.nn.Module:
        """Return the model whose parameters are laid out. Called once, before the optimizer is made."""

    @abstractmethod
    def make_optimizer(
        self,
        model: torch.nn.Module,
        factory: Callable[[Iterable[torch.nn.Parameter]], torch.optim.Optimizer],
    ) -> torch.optim.Optimizer:
        """Make the optimizer over this rank's share of the parameters of a partitioned model."""

    @abstractmethod
    def accumulating(self, model: torch.nn.Module, *, is_last: bool) -> AbstractContextManager[None]:
        """The context of one micro-batch: gradients are synchronized over ranks only in the last one."""

    @abstractmethod
    def clip_grad_norm(self, model: torch.nn.Module, max_norm: float) -> torch.Tensor:
        """Scale all gradients so that their global 2-norm is at most ``max_norm``; return the norm before it."""
