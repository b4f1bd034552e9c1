"""A training run: the loop, and the verbs that a step is made of."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from drivetrain.collecting import collect_as_usual
from drivetrain.contracts.recipe import Recipe, Samples, TokenBatch
from drivetrain.errors import NonFiniteError
from drivetrain.training.forward import ModelForward
from drivetrain.training.nonfinite import find_offender
from drivetrain.training.order import SampleOrder, StepShape
from drivetrain.training.prepared import Prepared, StepOutcome
from drivetrain.training.ranks import Ranks, known_to_all

if TYPE_CHECKING:
    from drivetrain.contracts.platform import Platform


@dataclass(frozen=True)
class StepResult:
    """A step that was made.

    step:    its number; the first is 1.
    figures: what trackers are told of it.
    """

    step: int
    figures: Mapping[str, float]

    @property
    def loss(self) -> float:
        return self.figures["loss"]


@dataclass
class Progress:
    """How far a run has come: samples and tokens that were trained on, over all ranks."""

    samples: int = 0
    tokens: int = 0

    def to_dict(self) -> dict[str, int]:
        return {"samples": self.samples, "tokens": self.tokens}


class TrainingRun:
    """Everything that the loop works with. All ranks make the same steps.

    steps: of the whole run, those of earlier processes included.
    """

    def __init__(
        self,
        prepared: Prepared,
        recipe: Recipe,
        samples: Samples,
        forward: ModelForward,
        order: SampleOrder,
        shape: StepShape,
        steps: int,
        ranks: Ranks,
        platform: Platform,
    ) -> None:
        self.prepared = prepared
        self.recipe = recipe
        self.samples = samples
        self.forward = forward
        self.order = order
        self.shape = shape
        self.steps = steps
        self.ranks = ranks
        self.platform = platform
        self.progress = Progress()

    @property
    def step_number(self) -> int:
        """Steps that were made."""
        return self.prepared.step_number

    def train(self, after_step: Callable[[StepResult], None]) -> None:
        """Make the steps that are left."""
        collect_as_usual()
        while self.step_number < self.steps:
            after_step(self.make_step())

    def make_step(self) -> StepResult:
        """One step. Raises NonFiniteError, with the parameters as they were."""
        started = time.perf_counter()
        random_state = torch.get_rng_state()
        batches = self._read_batches()
        num_targets, num_tokens = self.ranks.sum(
            sum(batch.num_targets for batch in batches), sum(len(batch.ids_T) for batch in batches)
        )
        mine = self._add_gradients(batches, num_targets)
        try:
            (loss,) = self.ranks.sum(mine / self.shape.world_size)
            self._check_loss(loss)
            outcome = self.prepared.step()
        except NonFiniteError as error:
            raise known_to_all(self._explained(error, batches, num_targets, random_state)) from error
        self.progress.samples += self.shape.batch
        self.progress.tokens += int(num_tokens)
        return self._result(loss, outcome, num_tokens, time.perf_counter() - started)

    def _read_batches(self) -> list[TokenBatch]:
        """This rank's micro-batches of the next step."""
        device = self.platform.device()
        batches = []
        for index in range(self.shape.accumulate):
            positions = self.shape.positions(self.progress.samples, self.ranks.rank, index)
            chosen = [self.samples[self.order.index(position)] for position in positions]
            batches.append(self.recipe.collate(chosen, device))
        return batches

    def _add_gradients(self, batches: list[TokenBatch], num_targets: float) -> torch.Tensor:
        """Forward and backward of every micro-batch; this rank's share of the loss, times the number of ranks."""
        # Gradients become the mean over ranks, and the loss is the mean over the targets of all ranks.
        factor = self.shape.world_size / max(1.0, num_targets)
        total = torch.zeros((), dtype=torch.float32, device=self.platform.device())
        for index, batch in enumerate(batches):
            with self.prepared.accumulating(is_last=index == len(batches) - 1):
                loss = self.recipe.loss(self.forward, batch) * factor
                self.prepared.backward(loss)
            total += loss.detach()
        return total

    def _check_loss(self, loss: float) -> None:
        if self.prepared.loss_scale is None and not torch.isfinite(torch.tensor(loss)):
            self.prepared.optimizer.zero_grad()
            raise NonFiniteError("the loss is not finite, and the step was not made", found=loss)

    def _explained(
        self, error: NonFiniteError, batches: list[TokenBatch], num_targets: float, random_state: torch.Tensor
    ) -> NonFiniteError:
        """The error with the module that it came from, found by making the step's passes again."""
        if self.prepared.loss_scale is not None:
            return error
        self.prepared.optimizer.zero_grad()
        torch.set_rng_state(random_state)
        found = find_offender(self.prepared.model, lambda: self._add_gradients(batches, num_targets))
        self.prepared.optimizer.zero_grad()
        told = self.ranks.gather(found)
        rank = next((rank for rank, offender in enumerate(told) if offender is not None), None)
        offender = None if rank is None else told[rank]
        on_rank = f", rank {rank}" if rank is not None and self.ranks.world_size > 1 else ""
        return NonFiniteError(
            f"{error.what}; first not finite: {offender[1]} of {offender[0]}" if offender else error.what,
            where=f"step {self.step_number + 1}{on_rank}",
            found=error.found,
            hint="Lower the learning rate, or look at the data of this step. The last saved state is untouched.",
        )

    def _result(self, loss: float, outcome: StepOutcome, num_tokens: float, seconds: float) -> StepResult:
        figures = {
            "loss": loss,
            "lr": outcome.lr,
            "grad_norm": outcome.grad_norm,
            "tokens_per_second": num_tokens / seconds,
            "step_seconds": seconds,
            "memory_bytes": float(self.platform.peak_memory_bytes()),
            "samples": float(self.progress.samples),
            "tokens": float(self.progress.tokens),
            "epoch": self.progress.samples / len(self.samples),
        }
        if self.prepared.loss_scale is not None:
            figures |= {"loss_scale": self.prepared.loss_scale.value, "skipped": float(outcome.is_skipped)}
        return StepResult(self.step_number, figures)
