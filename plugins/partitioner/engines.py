"""Which engine runs a stage: the collectives themselves, or torch's FSDP2."""

from __future__ import annotations

from collections.abc import Callable
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

    @property
    def notes(self) -> tuple[str, ...]: ...

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
        offload=Offload(
            config.offload,
            getattr(config, "offload_what", ("optimizer",)),
            Path(config.offload_folder).expanduser().absolute(),
        ),
    )
    return _engine_class(context, stage, getattr(config, "engine", "direct"))(model, context, options)


def _engine_class(context: PartitionContext, stage: int, wanted: str) -> Callable[..., Engine]:
    """On CUDA FSDP2 overlaps best; over Gloo most of its time goes into what collectives of CPU tensors cost. One rank
    has nothing to cut, which FSDP2 does not do."""
    if context.mesh is None or context.mesh.size() == 1 or stage < 3:
        return ShardedModel
    if wanted == "fsdp2" or (wanted == "auto" and context.mesh.device_type == "cuda"):
        from drivetrain.plugins.partitioner.fsdp import FsdpModel

        return FsdpModel
    return ShardedModel
