"""Contract of a partitioner: how parameters, gradients and optimizer state lie over ranks.

Whatever the layout, a state is saved under the same logical names, with the same whole shapes and dtypes, so that what
one partitioner saved any other can load:

    ``model.NAME``            a parameter, in the dtype that the optimizer works in (float32 where there are master
                              weights), or a buffer that belongs to the model's state
    ``optimizer.NAME.KEY``    what the optimizer keeps for it under ``KEY``

``NAME`` is the name in the model as it was before it was partitioned. What is split over ranks is a ``DTensor``.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from drivetrain.contracts.plugin import Plugin

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    import torch
    from torch.distributed.device_mesh import DeviceMesh

    from drivetrain.contracts.optimizer import NamedParameters
    from drivetrain.contracts.precision import Dtypes

    OptimizerFactory = Callable[[NamedParameters], torch.optim.Optimizer]
    """Makes the optimizer over (logical name, parameter)."""


@dataclass(frozen=True)
class PartitionContext:
    """What a partitioner is told. ``mesh`` is None in a run of one process.

    dtypes:      formats of parameters, of the sums over ranks, and of what the optimizer works on.
    shard_units: names of the modules that are gathered and freed as one, usually the decoder layers.
    methods:     names of the model's methods, beside ``forward``, that use its parameters.
    """

    mesh: DeviceMesh | None
    dtypes: Dtypes
    shard_units: tuple[str, ...]
    methods: tuple[str, ...] = ()


@dataclass(frozen=True)
class ParameterFacts:
    """A parameter as plans of memory know it. unit: number of the unit it belongs to; None for those of none."""

    name: str
    shape: tuple[int, ...]
    unit: int | None = None
    is_trained: bool = True

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class StateFormats:
    """Bytes that a trained element takes while it is whole.

    param:    in the model.
    gradient: where it is added up.
    master:   of the optimizer's copy; 0 where there is none.
    state:    what the optimizer keeps for a parameter: (name, shape) -> bytes.
    """

    param: int
    gradient: int
    master: int
    state: Callable[[str, tuple[int, ...]], int]


@dataclass(frozen=True)
class Footprint:
    """Bytes on one rank, the one that has most.

    optimizer: what it keeps, master weights with it.
    buffers:   room for what is under way at the peak.
    """

    parameters: int
    gradients: int
    optimizer: int
    buffers: int = 0

    @property
    def state(self) -> int:
        """What stays from step to step, and gradients."""
        return self.parameters + self.gradients + self.optimizer


def whole_footprint(parameters: Sequence[ParameterFacts], formats: StateFormats) -> Footprint:
    """Of a rank that holds everything."""
    trained = [fact for fact in parameters if fact.is_trained]
    count = sum(fact.numel for fact in trained)
    return Footprint(
        formats.param * sum(fact.numel for fact in parameters),
        formats.gradient * count,
        formats.master * count + sum(formats.state(fact.name, fact.shape) for fact in trained),
    )


class Partitioner(Plugin):
    """Lays a model over ranks so that a step gives the same parameters as the unpartitioned step would.

    Ability ``cuts_parameters``: the optimizer is handed pieces of parameters, which only an ``elementwise`` optimizer
    can work on.
    """

    kind = "partitioner"

    @abstractmethod
    def partition(self, model: torch.nn.Module, context: PartitionContext) -> torch.nn.Module:
        """Return the model whose parameters are laid out. Called once, before the optimizer is made.

        Parameters come in any floating dtype and leave in ``context.dtypes.param``; where there are master weights,
        these keep the values as they came. Ranks may come with different values: those of rank 0 are everybody's.
        """

    @abstractmethod
    def make_optimizer(self, model: torch.nn.Module, factory: OptimizerFactory) -> torch.optim.Optimizer:
        """Make the optimizer over this rank's share of the trainable parameters of a partitioned model. Once its
        ``step`` returns, the model computes with the new values. Raises ConfigError where nothing can be trained."""

    @abstractmethod
    def accumulating(self, model: torch.nn.Module, *, is_last: bool) -> AbstractContextManager[None]:
        """The context of one micro-batch, forward and backward. Gradients add up, in ``dtypes.reduce`` or wider; when
        the context of the last one ends, they are the mean over ranks."""

    @abstractmethod
    def clip_grad_norm(self, model: torch.nn.Module, max_norm: float, *, scale: float = 1.0) -> torch.Tensor:
        """Divide all gradients by ``scale``, then shrink them so that their global 2-norm is at most ``max_norm``
        (``inf`` for no bound). Returns the norm between the two as a float32 scalar, the same on every rank; it is not
        finite when any gradient of any rank is not, and gradients may then hold anything."""

    def state(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, torch.Tensor]:
        """Everything to be saved, by logical name; without ``optimizer``, the model's part.

        The tensors are the live ones, or are such that :meth:`load_state` takes over what was written to them. Called
        by every rank. An optimizer that has made no step yet has the state that it would have after one, of any values.
        This one is for layouts in which the optimizer works on the model's own parameters.
        """
        from drivetrain.training.state import model_state, optimizer_state

        state = model_state(model)
        return state if optimizer is None else state | optimizer_state(optimizer, model.named_parameters())

    def load_state(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None, state: dict[str, torch.Tensor]
    ) -> None:
        """Take over what was written to the tensors that :meth:`state` returned: the model computes with it."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences about a partitioned model that its user should see: what was asked for and changes nothing, say."""
        return ()

    def footprint(self, parameters: Sequence[ParameterFacts], formats: StateFormats, ranks: int) -> Footprint:
        """The bytes of a rank among ``ranks``, several micro-batches a step. Pure; this one is for layouts in which
        every rank holds everything."""
        return whole_footprint(parameters, formats)
