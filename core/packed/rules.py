"""Rules: which quantizer has which layer, by patterns over the layers' names.

A pattern is parts of a dotted name side by side, with ``*`` for anything within a part: ``lm_head``, ``layers.0``,
``layers.*.mlp``. The first pattern that matches decides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from drivetrain.contracts.quantizer import Declaration, Quantizer, TakesStored
from drivetrain.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from drivetrain.contracts.packed import PackedWeight

NOT_IN_A_RULE = ("rules", "kv")
"""Options of a quantizer that hold for a whole model."""


@dataclass(frozen=True)
class Rule:
    """One pattern and the quantizer of its layers.

    label: the name under which the quantizer was asked for.
    """

    pattern: str
    label: str
    quantizer: Quantizer

    def matches(self, name: str) -> bool:
        """Whether the layer ``name`` is one of its layers."""
        return matches(self.pattern, name)


def matches(pattern: str, name: str) -> bool:
    """Whether the parts of ``pattern`` stand side by side, anywhere, in the dotted ``name``."""
    wanted, found = pattern.split("."), name.split(".")
    places = range(len(found) - len(wanted) + 1)
    return any(all(map(fnmatchcase, found[place:], wanted)) for place in places)


class RuledQuantizer(Quantizer):
    """Several quantizers as one: the first rule whose pattern matches a layer's name decides, or the base."""

    def __init__(self, base: Quantizer, rules: Sequence[Rule]) -> None:
        super().__init__(base.config)
        self.base, self.rules = base, tuple(rules)

    def rule_for(self, name: str) -> Rule | None:
        """The rule that decides about the layer; None where the base does."""
        return next((rule for rule in self.rules if rule.matches(name)), None)

    def quantizer_for(self, name: str) -> Quantizer:
        """The quantizer of the layer."""
        rule = self.rule_for(name)
        return self.base if rule is None else rule.quantizer

    def bits_per_weight(self) -> float | None:
        """The base's; the ledger of a model counts what each layer takes."""
        return self.base.bits_per_weight()

    def declares(self) -> Declaration:
        return self.base.declares()

    def convert(self, name: str, linear: torch.nn.Linear) -> torch.nn.Module:
        return self.quantizer_for(name).convert(name, linear)

    def takes(self, name: str, stored: PackedWeight) -> bool:
        chosen = self.quantizer_for(name)
        return isinstance(chosen, TakesStored) and chosen.takes(name, stored)

    def convert_stored(self, name: str, stored: PackedWeight, bias: torch.Tensor | None) -> torch.nn.Module:
        chosen = self.quantizer_for(name)
        assert isinstance(chosen, TakesStored)
        return chosen.convert_stored(name, stored, bias)


Make = Callable[[str, Mapping[str, Any], str], Quantizer]
"""``make(name, options, pattern)``: the quantizer that a rule asks for. Raises PluginError and ConfigError."""


def with_rules(quantizer: Quantizer, make: Make, where: str) -> Quantizer:
    """``quantizer`` itself where its options have no rules; otherwise with the quantizers that its rules name.

    where: who asked, for errors: ``run.yaml:4``.
    Raises ConfigError for a rule that makes no sense, and what ``make`` raises.
    """
    asked: Mapping[str, str | Mapping[str, Any]] = getattr(quantizer.config, "rules", {})
    if not asked:
        return quantizer
    rules = []
    for pattern, value in asked.items():
        place = f"{where}: quantizer.rules[{pattern}]"
        name, options = _read(pattern, value, place)
        rules.append(Rule(pattern, name, make(name, options, pattern)))
    return RuledQuantizer(quantizer, rules)


def _read(pattern: str, value: str | Mapping[str, Any], place: str) -> tuple[str, dict[str, Any]]:
    if not all(pattern.split(".")):
        raise ConfigError("a pattern is parts of a layer's name with dots between them", where=place, found=pattern)
    options = {"name": value} if isinstance(value, str) else dict(value)
    name = options.pop("name", None)
    if not isinstance(name, str) or name in ("", "auto"):
        raise ConfigError(
            "a rule names a quantizer",
            where=place,
            found=value if name is None else name,
            allowed="the name of a quantizer, or a table with its name and options",
        )
    for option in NOT_IN_A_RULE:
        if option in options:
            raise ConfigError(
                f"{option} holds for the whole model, and not for some layers",
                where=place,
                found=option,
                hint=f"Set quantizer.{option}.",
            )
    return name, options
