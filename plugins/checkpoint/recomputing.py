"""How a module's call is changed so that backward computes it again: by torch's own checkpointing.

The module stays where it is and parameters keep their names, because saved state goes by them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from drivetrain.errors import ConfigError


def submodules(model: nn.Module, names: Iterable[str]) -> list[tuple[str, nn.Module]]:
    """Raises ConfigError for a name that the model does not have."""
    found = []
    for name in names:
        try:
            found.append((name, model.get_submodule(name)))
        except AttributeError as error:
            raise ConfigError("the model has no such unit", where="checkpoint", found=name) from error
    return found


def recompute(module: nn.Module, **options: Any) -> None:
    """Have ``module`` keep its inputs alone, and draw the same random numbers when it is computed again.

    options: of ``torch.utils.checkpoint.checkpoint``.
    """
    change_call(
        module,
        lambda forward, *args, **kwargs: checkpoint(
            forward, *args, use_reentrant=False, preserve_rng_state=True, **options, **kwargs
        ),
    )


def change_call(module: nn.Module, around: Callable[..., Any]) -> None:
    """``around(forward, *args, **kwargs)`` in place of ``forward``, wherever gradients are recorded."""
    forward = module.forward

    def changed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return around(forward, *args, **kwargs)

    module.forward = changed
