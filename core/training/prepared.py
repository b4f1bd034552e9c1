"""A model and its optimizer, laid out and ready to be trained: what a loop needs, ours or a user's own."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from drivetrain.contracts.partitioner import PartitionContext, Partitioner
from drivetrain.contracts.precision import Dtypes
from drivetrain.errors import NonFiniteError, TrainingError
from drivetrain.training.loss_scale import LossScale
from drivetrain.training.nonfinite import last_parameter_not_finite
from drivetrain.training.schedule import Schedule
from drivetrain.training.units import shard_units

if TYPE_CHECKING:
    import torch

    from drivetrain.contracts.checkpoint import CheckpointPolicy
    from drivetrain.contracts.partitioner import OptimizerFactory
    from drivetrain.training.ranks import Ranks

METHODS = ("logits", "token_losses")
"""What training calls of a model beside forward, where it has it."""


@dataclass(frozen=True)
class StepOutcome:
    """What became of a step.

    grad_norm:  of all gradients, before clipping.
    lr:         of the first group, in this step.
    is_skipped: gradients overflowed, and nothing was changed but the loss scale.
    """

    grad_norm: float
    lr: float
    is_skipped: bool


class Prepared:
    """A model in training.

    model:       call this one.
    optimizer:   a torch optimizer over what this rank trains.
    step_number: steps made so far.

    ``schedule`` None leaves the learning rate as the optimizer has it.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        factory: OptimizerFactory,
        *,
        partitioner: Partitioner,
        checkpoint: CheckpointPolicy,
        dtypes: Dtypes,
        ranks: Ranks,
        clip_norm: float | None = None,
        schedule: Schedule | None = None,
    ) -> None:
        self.partitioner = partitioner
        self.dtypes = dtypes
        self.loss_scale = LossScale(dtypes.loss_scale) if dtypes.loss_scale is not None else None
        self.step_number = 0
        self._clip_norm = math.inf if clip_norm is None else clip_norm
        self._schedule = schedule
        self._is_accumulating = self._is_complete = False
        units = shard_units(model)
        methods = tuple(name for name in METHODS if callable(getattr(model, name, None)))
        model = checkpoint.apply(model, units)
        self.model = partitioner.partition(model, PartitionContext(ranks.mesh, dtypes, units, methods))
        self.optimizer = partitioner.make_optimizer(self.model, factory)
        self._rates = [float(group["lr"]) for group in self.optimizer.param_groups]

    @contextmanager
    def accumulating(self, *, is_last: bool = True) -> Iterator[None]:
        """The context of one micro-batch, forward and backward; ranks come together in the last one of a step."""
        with self.partitioner.accumulating(self.model, is_last=is_last):
            self._is_accumulating = True
            try:
                yield
            finally:
                self._is_accumulating = False
        self._is_complete = is_last

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of ``loss``, scaled where the precision asks for it.

        Raises TrainingError outside of :meth:`accumulating`: ranks would go apart, or learn nothing.
        """
        if not self._is_accumulating:
            raise TrainingError(
                "a backward pass outside of a micro-batch, whose gradients would reach no other rank",
                where="backward",
                hint="Put forward and backward into: with run.accumulating().",
            )
        (loss if self.loss_scale is None else loss * self.loss_scale.value).backward()

    def step(self) -> StepOutcome:
        """Clip, check, and change the parameters; gradients are gone afterwards.

        Raises NonFiniteError, on every rank alike and with nothing changed, for gradients that are not finite; where
        the loss is scaled, the step is skipped instead. Raises TrainingError where no micro-batch was the last one.
        """
        if not self._is_complete:
            raise TrainingError(
                "a step without its last micro-batch, in which the gradients of ranks come together",
                where="step",
                hint="Go through run.accumulating() before each step, with is_last=False for all but the last.",
            )
        self._is_complete = False
        scale = 1.0 if self.loss_scale is None else self.loss_scale.value
        norm = float(self.partitioner.clip_grad_norm(self.model, self._clip_norm, scale=scale))
        lr = self._set_rates()
        is_finite = math.isfinite(norm)
        if not is_finite and self.loss_scale is None:
            raise NonFiniteError(
                "the gradients are not finite, and the step was not made",
                where=last_parameter_not_finite(self.model),
                found=norm,
            )
        if is_finite:
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.model.zero_grad()  # an optimizer of the user's may hold some of the parameters only
        if self.loss_scale is not None:
            (self.loss_scale.held if is_finite else self.loss_scale.overflowed)()
        self.step_number += 1
        return StepOutcome(norm, lr, not is_finite)

    def _set_rates(self) -> float:
        if self._schedule is None:
            return float(self.optimizer.param_groups[0]["lr"])
        factor = self._schedule.factor(self.step_number)
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        return self._rates[0] * factor

    def state(self) -> dict[str, torch.Tensor]:
        """Everything of the model and its optimizer that a saved state holds, by logical name."""
        return self.partitioner.state(self.model, self.optimizer)

    def numbers(self) -> dict[str, Any]:
        """What is no tensor, as JSON holds it."""
        scale = None if self.loss_scale is None else self.loss_scale.to_dict()
        return {"step": self.step_number, "loss_scale": scale}
