"""The units of a model: the modules that are gathered, recomputed or offloaded as one."""

from __future__ import annotations

from torch import nn


def shard_units(model: nn.Module) -> tuple[str, ...]:
    """Names of the repeated layers: the members of the list of modules that holds most parameters; none without one."""
    best: tuple[int, tuple[str, ...]] = (0, ())
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 1:
            size = sum(parameter.numel() for parameter in module.parameters())
            if size > best[0]:
                prefix = f"{name}." if name else ""
                best = (size, tuple(f"{prefix}{child}" for child, _ in module.named_children()))
    return best[1]
