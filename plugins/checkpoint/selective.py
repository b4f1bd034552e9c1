"""What is cheap to compute for the bytes that it keeps is computed again."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from drivetrain.contracts.checkpoint import CheckpointPolicy
from drivetrain.contracts.plugin import PluginConfig
from drivetrain.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from drivetrain.contracts.checkpoint import UnitActivations


class SelectiveCheckpointing(CheckpointPolicy):
    """Computes again what is named: kinds of modules, some layers, or, by default, all but products and attention."""

    class Config(PluginConfig):
        modules: tuple[str, ...] = Field(
            (), description="kinds of modules inside a layer, by class or name: attention, mlp, '*norm'"
        )
        layers: tuple[int, ...] = Field(
            (), description="layers that are computed again as a whole, by number from 0 on"
        )
        every: int | None = Field(
            None, ge=1, description="every n-th layer is computed again as a whole; 1: all of them"
        )

        @model_validator(mode="after")
        def _check_one(self) -> SelectiveCheckpointing.Config:
            if sum(map(bool, (self.modules, self.layers, self.every))) > 1:
                raise ValueError("modules, layers and every each say what is computed again; give one of them")
            return self

    config: Config

    def kept(self, unit: UnitActivations, number: int) -> int:
        if self.config.layers or self.config.every:
            chosen = number in self.config.layers or (self.config.every and number % self.config.every == 0)
            return unit.input if chosen else unit.everything
        return unit.input + unit.products

    def apply(self, model: torch.nn.Module, units: tuple[str, ...]) -> torch.nn.Module:
        from drivetrain.plugins.checkpoint.recomputing import recompute, submodules

        found = submodules(model, units)
        if self.config.modules:
            self._recompute_kinds([unit for _, unit in found])
        elif self.config.layers or self.config.every:
            for number in self._numbers(len(found)):
                recompute(found[number][1])
        else:
            from drivetrain.plugins.checkpoint.costs import keep_costly

            for _, unit in found:
                recompute(unit, context_fn=keep_costly)
        return model

    def _numbers(self, num_layers: int) -> list[int]:
        if self.config.every:
            return list(range(0, num_layers, self.config.every))
        beyond = [number for number in self.config.layers if not 0 <= number < num_layers]
        if beyond and num_layers:
            raise ConfigError(
                "the model has no such layer", where="checkpoint.layers", found=beyond, allowed=f"0..{num_layers - 1}"
            )
        return [number for number in self.config.layers if number < num_layers]

    def _recompute_kinds(self, units: list[torch.nn.Module]) -> None:
        """The outermost modules that fit: a module inside another that is computed again needs nothing more."""
        from drivetrain.plugins.checkpoint.recomputing import recompute

        fitting = dict.fromkeys(self.config.modules, False)
        for unit in units:
            taken: list[str] = []
            for name, module in unit.named_modules():
                pattern = next((p for p in fitting if name and _fits(p, name, module)), None)
                if pattern is not None and not any(name.startswith(f"{outer}.") for outer in taken):
                    recompute(module)
                    taken.append(name)
                    fitting[pattern] = True
        for pattern, has_fitted in fitting.items():
            if units and not has_fitted:
                inside = sorted({type(module).__name__ for unit in units for module in unit.modules()})
                raise ConfigError(
                    "no module in the layers is of this kind", where="checkpoint.modules", found=pattern, allowed=inside
                )


def _fits(pattern: str, name: str, module: torch.nn.Module) -> bool:
    """Whether the pattern is part of the class's name, or fits the module's name in its layer."""
    return pattern.lower() in type(module).__name__.lower() or fnmatchcase(name, pattern)
