"""``drivetrain.prepare``: a model of the user's, in a loop of the user's."""

from __future__ import annotations

import atexit
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import torch

from drivetrain.assembly import Parts, resolve_parts
from drivetrain.config import load_settings
from drivetrain.contracts.checkpoint import CheckpointPolicy
from drivetrain.contracts.kinds import KINDS
from drivetrain.contracts.optimizer import NamedParameters, Optimizer
from drivetrain.contracts.partitioner import Partitioner
from drivetrain.contracts.plugin import Purpose
from drivetrain.contracts.store import Store
from drivetrain.errors import ConfigError
from drivetrain.registry import Registry
from drivetrain.training.prepared import Prepared
from drivetrain.training.ranks import Ranks, joined_ranks, open_platform
from drivetrain.training.saving import RunState
from drivetrain.training.schedule import Schedule

NEEDED = ("platform", "precision", "partitioner", "checkpoint", "optimizer", "store")
"""Kinds that a loop of the user's needs; the others are what ``Trainer`` is for."""

_WITHOUT_END = 2**31
"""Steps of a run that nobody has told the length of."""

OwnOptimizer = torch.optim.Optimizer | Callable[[NamedParameters], torch.optim.Optimizer]


class OwnLoop(Prepared):
    """What :func:`prepare` returns: the model to call, the optimizer, and the verbs of a step.

    ::

        run = drivetrain.prepare(model, optimizer, {"partitioner": "none", "precision": "bf16"})
        for inputs, targets in batches:
            with run.accumulating():
                run.backward(loss(run.model(inputs), targets))
            run.step()
    """

    ranks: Ranks
    device: torch.device
    _state: RunState
    _open: ExitStack

    @property
    def rank(self) -> int:
        return self.ranks.rank

    @property
    def world_size(self) -> int:
        return self.ranks.world_size

    def save(self, **numbers: Any) -> None:
        """Save the state of now, with ``numbers`` (whatever JSON can hold) beside it. Every rank calls it."""
        self._state.save({"numbers": numbers})
        # A loop of the user's may end at any line.
        atexit.unregister(self._state.wait)
        atexit.register(self._state.wait)

    def resume(self) -> dict[str, Any] | None:
        """Go on from the newest saved state: what was given to :meth:`save` with it; None where there is none."""
        step = self._state.newest()
        if step is None:
            return None
        numbers: dict[str, Any] = self._state.load(step)["numbers"]
        return numbers

    def close(self) -> None:
        """Wait for what is being saved, and leave the other ranks. The end of the process does so too."""
        atexit.unregister(self._state.wait)
        atexit.unregister(self._open.close)
        self._state.wait()
        self._open.close()


def prepare(
    model: torch.nn.Module,
    optimizer: OwnOptimizer | None = None,
    config: Mapping[str, Any] | Path | str | None = None,
    *,
    registry: Registry | None = None,
) -> OwnLoop:
    """Lay a model out for training in a loop of one's own.

    optimizer: a torch optimizer over the model's parameters, made anew over what this rank trains; or what makes one
               from (name, parameter); None takes the configuration's.
    config:    a file or a table with the configuration's keys: platform, precision, partitioner, checkpoint, optimizer,
               store, trainer.

    Under torchrun the processes are joined. Raises ConfigError.
    """
    if isinstance(config, str | Path):
        settings = load_settings(config, origin="argument")
    else:
        settings = load_settings(None, config, origin="argument")
    left_out = [kind for kind in KINDS if kind not in NEEDED]
    parts = resolve_parts(settings, purpose=Purpose.TRAIN, registry=registry, leave_out=left_out)
    device = open_platform(parts.platform).device()
    with ExitStack() as resources:
        timeout = settings.trainer.timeout_seconds
        ranks = resources.enter_context(joined_ranks(device, parts.platform.facts().collective, timeout))
        run = _laid_out(model, optimizer, parts, device, ranks)
        run._open = resources.pop_all()
    atexit.register(run._open.close)
    return run


def _laid_out(
    model: torch.nn.Module, optimizer: OwnOptimizer | None, parts: Parts, device: torch.device, ranks: Ranks
) -> OwnLoop:
    plugin, settings = cast(Optimizer, parts.plugins["optimizer"]), parts.settings.trainer
    factory, schedule = _factory(model, optimizer, plugin, settings.steps)
    dtypes = parts.precision.dtypes()
    _meet_dtype(model, getattr(torch, dtypes.param))
    run = OwnLoop(
        model.to(device),
        factory,
        partitioner=cast(Partitioner, parts.plugins["partitioner"]),
        checkpoint=cast(CheckpointPolicy, parts.plugins["checkpoint"]),
        dtypes=dtypes,
        ranks=ranks,
        clip_norm=settings.clip_norm,
        schedule=schedule,
    )
    run.ranks, run.device = ranks, device
    identity = {"model": type(model).__name__, "optimizer": type(run.optimizer).__name__, "precision": dtypes.param}
    run._state = RunState(cast(Store, parts.plugins["store"]), run, ranks, identity)
    return run


def _factory(
    model: torch.nn.Module, optimizer: OwnOptimizer | None, plugin: Optimizer, steps: int | None
) -> tuple[Callable[[NamedParameters], torch.optim.Optimizer], Schedule | None]:
    """What makes the optimizer, and the schedule that goes with it."""
    if isinstance(optimizer, torch.optim.Optimizer):
        return _made_anew(model, optimizer), None
    if optimizer is not None:
        return optimizer, None
    schedule = plugin.config.schedule
    if steps is None and (schedule.name != "constant" or isinstance(schedule.warmup, float)):
        raise ConfigError(
            "this schedule needs to know how long the run is",
            where="optimizer.schedule",
            found=schedule.name,
            hint="Give trainer.steps.",
        )
    return lambda named: plugin.make(plugin.groups(named)), Schedule(schedule, steps or _WITHOUT_END)


def _made_anew(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> Callable[[NamedParameters], torch.optim.Optimizer]:
    """An optimizer of the same class and options over other tensors of the same names."""
    if optimizer.state:
        raise ConfigError(
            "the optimizer has made steps already; its state belongs to parameters that are laid out anew",
            where="prepare",
            found=type(optimizer).__name__,
            hint="Prepare before the first step, and go on from a state that was saved.",
        )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = []
    for group in optimizer.param_groups:
        foreign = [parameter for parameter in group["params"] if id(parameter) not in names]
        if foreign:
            raise ConfigError(
                f"the optimizer holds {len(foreign)} parameters that the model does not have", where="prepare"
            )
        options = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        groups.append((options, [names[id(parameter)] for parameter in group["params"]]))

    def make(named: NamedParameters) -> torch.optim.Optimizer:
        by_name = dict(named)
        anew = [
            {**options, "params": [(name, by_name[name]) for name in members if name in by_name]}
            for options, members in groups
        ]
        kind: Callable[..., torch.optim.Optimizer] = type(optimizer)
        return kind(anew)

    return make


def _meet_dtype(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Have buffers and inputs come in the dtype that parameters will have, as ``model.to(dtype)`` would."""
    if dtype == torch.float32:
        return
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.to(dtype)

    def cast_inputs(module: torch.nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return _cast(args, dtype), _cast(kwargs, dtype)

    model.register_forward_pre_hook(cast_inputs, with_kwargs=True)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _cast(item, dtype) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_cast(item, dtype) for item in value)
    return value
