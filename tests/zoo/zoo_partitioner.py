"""Partitioners with one fault each, and the test of the kit that must catch it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, contextmanager

import torch

from drivetrain.contracts.optimizer import NamedParameters
from drivetrain.contracts.partitioner import PartitionContext
from drivetrain.contracts.plugin import Plugin
from drivetrain.plugins.partitioner.none import NoPartitioner


class ClipsEachParameter(NoPartitioner):
    """Bounds the norm of each parameter's gradient instead of that of all of them."""

    def clip_grad_norm(self, model: torch.nn.Module, max_norm: float, *, scale: float = 1.0) -> torch.Tensor:
        norms = [torch.nn.utils.clip_grad_norm_([p], max_norm) for p in model.parameters() if p.grad is not None]
        return torch.stack(norms).norm()


class ScalesGradientsUp(NoPartitioner):
    """Scales to the bound even where the norm is below it."""

    def clip_grad_norm(self, model: torch.nn.Module, max_norm: float, *, scale: float = 1.0) -> torch.Tensor:
        total = super().clip_grad_norm(model, float("inf"))
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(max_norm / total)
        return total


class ForgetsTheBiases(NoPartitioner):
    """Makes the optimizer without the parameters of one dim."""

    def make_optimizer(
        self, model: torch.nn.Module, factory: Callable[[NamedParameters], torch.optim.Optimizer]
    ) -> torch.optim.Optimizer:
        return factory([(name, parameter) for name, parameter in model.named_parameters() if parameter.dim() > 1])


class DropsEarlierMicroBatches(NoPartitioner):
    """Starts the last micro-batch from empty gradients."""

    def accumulating(self, model: torch.nn.Module, *, is_last: bool) -> AbstractContextManager[None]:
        @contextmanager
        def fresh() -> Iterable[None]:  # type: ignore[misc]
            if is_last:
                model.zero_grad()
            yield

        return fresh()


class LeavesRanksAlone(NoPartitioner):
    """Takes a mesh of several ranks, and lets each of them train for itself."""

    def partition(self, model: torch.nn.Module, context: PartitionContext) -> torch.nn.Module:
        return super().partition(model, dataclasses.replace(context, mesh=None))


class PartsWhatIsShared(NoPartitioner):
    """Gives each module that shares a parameter one of its own."""

    def partition(self, model: torch.nn.Module, context: PartitionContext) -> torch.nn.Module:
        seen: set[torch.nn.Parameter] = set()
        for module in model.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None and parameter in seen:
                    setattr(module, name, torch.nn.Parameter(parameter.detach().clone()))
                elif parameter is not None:
                    seen.add(parameter)
        return super().partition(model, context)


ZOO: dict[type[Plugin], str] = {
    ClipsEachParameter: "test_clipping_equals_the_plain_one",
    ScalesGradientsUp: "test_small_gradients_are_not_scaled_up",
    ForgetsTheBiases: "test_every_trainable_parameter_is_trained",
    DropsEarlierMicroBatches: "test_accumulating_equals_one_large_batch",
    PartsWhatIsShared: "test_awkward_parameters_train_as_plain_ones",
    LeavesRanksAlone: "test_ranks_together_equal_the_plain_steps",
}
"""Faulty partitioner -> the test that must fail for it."""
