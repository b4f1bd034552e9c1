"""No partitioning: one process holds everything."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

from drivetrain.contracts.partitioner import PartitionContext, Partitioner
from drivetrain.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from contextlib import AbstractContextManager

    import torch


class NoPartitioner(Partitioner):
    """One process holds all parameters, gradients and optimizer state."""

    def partition(self, model: torch.nn.Module, context: PartitionContext) -> torch.nn.Module:
        """Return ``model`` as it is. Raises ConfigError for a mesh of more than one rank."""
        if context.mesh is not None and context.mesh.size() > 1:
            raise ConfigError(
                "this partitioner keeps the whole model in one process and would leave the ranks unsynchronized",
                where="partitioner: none",
                found=f"a mesh of {context.mesh.size()} ranks",
                allowed="one rank",
                hint="Start one process, or name another one of: drivetrain plugins list --kind partitioner",
            )
        return model

    def make_optimizer(
        self,
        model: torch.nn.Module,
        factory: Callable[[Iterable[torch.nn.Parameter]], torch.optim.Optimizer],
    ) -> torch.optim.Optimizer:
        """The optimizer over all trainable parameters. Raises ConfigError when there is none."""
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not trainable:
            raise ConfigError(
                "the model has no trainable parameter",
                where="partitioner: none",
                hint="Unfreeze what is to be trained.",
            )
        return factory(trainable)

    def accumulating(self, model: torch.nn.Module, *, is_last: bool) -> AbstractContextManager[None]:
        return nullcontext()

    def clip_grad_norm(self, model: torch.nn.Module, max_norm: float) -> torch.Tensor:
        """As in the contract; without any gradient the norm is 0."""
        import torch

        owners = [parameter for parameter in model.parameters() if parameter.grad is not None]
        if not owners:
            return torch.zeros((), dtype=torch.float32)
        # torch's own total norm is computed in the gradients' dtype, which is too coarse for bfloat16.
        norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float32) for p in owners if p.grad is not None]
        total = torch.linalg.vector_norm(torch.stack(norms))
        torch.nn.utils.clip_grads_with_norm_(owners, max_norm, total)
        return total
