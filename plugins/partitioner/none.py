"""No partitioning: every rank holds everything, and ranks share out the data."""

from __future__ import annotations

from typing import TYPE_CHECKING

from drivetrain.contracts.partitioner import PartitionContext, Partitioner
from drivetrain.contracts.plugin import PluginConfig
from drivetrain.errors import ConfigError

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    import torch

    from drivetrain.contracts.partitioner import OptimizerFactory
    from drivetrain.plugins.partitioner.gradients import Gradients
    from drivetrain.plugins.partitioner.masters import Masters


class NoPartitioner(Partitioner):
    """Every rank holds all parameters, gradients and optimizer state; gradients are averaged while backward runs."""

    def __init__(self, config: PluginConfig) -> None:
        super().__init__(config)
        self._masters: Masters | None = None
        self._gradients: Gradients | None = None

    def partition(self, model: torch.nn.Module, context: PartitionContext) -> torch.nn.Module:
        from drivetrain.plugins.partitioner.gradients import Gradients
        from drivetrain.plugins.partitioner.masters import Masters

        group = None
        if context.mesh is not None and context.mesh.size() > 1:
            group = context.mesh.get_group()
            _copy_from_first(model, group)
        self._masters = Masters.of_model(model, context.dtypes)
        self._gradients = Gradients(self._masters, group)
        return model

    def make_optimizer(self, model: torch.nn.Module, factory: OptimizerFactory) -> torch.optim.Optimizer:
        """The optimizer over all trainable parameters. Raises ConfigError when there is none."""
        masters, gradients = self._partitioned
        if not masters.named:
            raise ConfigError(
                "the model has no trainable parameter",
                where="partitioner: none",
                hint="Unfreeze what is to be trained.",
            )
        optimizer = factory(masters.for_optimizer)
        masters.follow(optimizer)
        gradients.follow(optimizer)
        return optimizer

    def accumulating(self, model: torch.nn.Module, *, is_last: bool) -> AbstractContextManager[None]:
        return self._partitioned[1].accumulating(is_last=is_last)

    def clip_grad_norm(self, model: torch.nn.Module, max_norm: float, *, scale: float = 1.0) -> torch.Tensor:
        """As in the contract; without any gradient the norm is 0."""
        import torch

        owners = [target for _, _, target in self._partitioned[0].named if target.grad is not None]
        if not owners:
            return torch.zeros((), dtype=torch.float32)
        gradients = [owner.grad for owner in owners if owner.grad is not None]
        # torch's own total norm is computed in the gradients' dtype, which is too coarse for bfloat16.
        norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
        norm = torch.linalg.vector_norm(torch.stack(norms)) / scale
        if scale != 1.0:
            torch._foreach_div_(gradients, scale)
        torch.nn.utils.clip_grads_with_norm_(owners, max_norm, norm)
        return norm

    def state(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, torch.Tensor]:
        from drivetrain.training.state import model_state, optimizer_state

        masters = self._partitioned[0]
        targets = {name: target for name, _, target in masters.named if masters.keeps_copies}
        state = {**model_state(model), **{f"model.{name}": target.detach() for name, target in targets.items()}}
        rounds = masters.rounds.clone()
        if optimizer is not None:
            state |= optimizer_state(optimizer, masters.for_optimizer)
        masters.rounds.copy_(rounds)  # a step of no length is none
        if not masters.keeps_copies:
            state["partitioner.rounds"] = masters.rounds
        return state

    def load_state(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None, state: dict[str, torch.Tensor]
    ) -> None:
        """The tensors were the live ones, so that only the model's own copies are left to write."""
        if self._partitioned[0].keeps_copies:
            self._partitioned[0].publish()

    @property
    def _partitioned(self) -> tuple[Masters, Gradients]:
        assert self._masters is not None, "partition comes first"
        assert self._gradients is not None
        return self._masters, self._gradients


def _copy_from_first(model: torch.nn.Module, group: torch.distributed.ProcessGroup) -> None:
    """Give every rank the values of rank 0."""
    import torch.distributed as dist

    for tensor in (*model.parameters(), *model.buffers()):
        dist.broadcast(tensor.detach(), group=group, group_src=0)
