"""Which engine runs a stage: the collectives themselves, or torch's FSDP2."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

from drivetrain.contracts.partitioner import PartitionContext
from drivetrain.plugins.partitioner.offload import Offload
from drivetrain.plugins.partitioner.sharded import Options, ShardedModel

if TYPE_CHECKING:
    from drivetrain.contracts.partitioner import OptimizerFactory
    from drivetrain.plugins.partitioner.zero import ZeroConfig


class Engine(Protocol):
    """A model that is laid out; the partitioner's verbs without the model."""

    def make_optimizer(self, factory: OptimizerFactory) -> torch.optim.Optimizer: ...

    def accumulating(self, *, is_last: bool) -> AbstractContextManager[None]: ...

    def clip_grad_norm(self, max_norm: float, scale: float) -> torch.Tensor: ...

    def state(self, optimizer: torch.optim.Optimizer | None) -> dict[str, torch.Tensor]: ...

    def loaded(self) -> None:
        """Values were written to what ``state`` has returned."""


def make_engine(model: nn.Module, context: PartitionContext, stage: int, config: ZeroConfig) -> Engine:
    options = Options(
        stage=stage,
        shard=config.shard,
        transport=config.transport,
        bucket_bytes=config.bucket_bytes,
        every_time=getattr(config, "accumulate", "whole") == "sharded",
        offload=Offload(config.offload, config.offload_what, Path(config.offload_folder).expanduser().absolute()),
    )
    return ShardedModel(model, context, options)
