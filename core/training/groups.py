"""Parameters by learning rate and weight decay, as an optimizer's configuration asks for."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from drivetrain.contracts.optimizer import GroupConfig, NamedParameters, OptimizerConfig
from drivetrain.errors import ConfigError, nearest

if TYPE_CHECKING:
    import torch


def parameter_groups(config: OptimizerConfig, parameters: NamedParameters) -> list[dict[str, Any]]:
    """Groups as torch's optimizers take them; parameters keep their order, and no group is empty.

    Raises ConfigError for a pattern that fits no parameter.
    """
    named = list(parameters)
    _check_patterns(config.groups, [name for name, _ in named])
    groups: dict[tuple[float, float], list[tuple[str, torch.nn.Parameter]]] = {}
    for name, parameter in named:
        own = next((group for group in config.groups if fnmatchcase(name, group.match)), None)
        lr = config.lr if own is None or own.lr is None else own.lr
        groups.setdefault((lr, _decay(config, own, parameter)), []).append((name, parameter))
    return [{"params": members, "lr": lr, "weight_decay": decay} for (lr, decay), members in groups.items()]


def _decay(config: OptimizerConfig, own: GroupConfig | None, parameter: torch.nn.Parameter) -> float:
    if own is not None and own.weight_decay is not None:
        return own.weight_decay
    return config.weight_decay if config.decay_vectors or parameter.dim() >= 2 else 0.0


def _check_patterns(groups: tuple[GroupConfig, ...], names: list[str]) -> None:
    for index, group in enumerate(groups):
        if not any(fnmatchcase(name, group.match) for name in names):
            close = nearest(group.match, names)
            raise ConfigError(
                "no trainable parameter has a name that fits this pattern",
                where=f"optimizer.groups[{index}].match",
                found=group.match,
                hint=f"The nearest name is {close!r}."
                if close
                else f"Names are such as {names[0]!r}."
                if names
                else None,
            )
