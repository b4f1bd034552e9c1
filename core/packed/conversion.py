"""What a model is given as its quantizer: it asks the one that the rules name, checks what goes in, and keeps books."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from drivetrain.contracts.loader import Checkpoint
from drivetrain.contracts.quantizer import FULL, Declaration, Quantizer, TakesStored
from drivetrain.errors import ConfigError, nearest
from drivetrain.packed.gguf import block_type
from drivetrain.packed.layers import PackedLinear
from drivetrain.packed.rules import RuledQuantizer

if TYPE_CHECKING:
    from torch import nn

    from drivetrain.contracts.packed import PackedWeight


@dataclass(frozen=True)
class Converted:
    """One layer that was shown to the quantizer.

    label:       the quantizer's name.
    rule:        the pattern that decided; None where none matched.
    num_weights: O * I.
    full_bytes:  of the weight before.
    num_bytes:   of what the layer keeps of its weight, scales included.
    is_packed:   whether it is another layer now.
    is_stored:   whether the files hold it packed, so that it never was there in full.
    repacking_bytes: what handing it over took beside it, at most, where it is stored so.
    """

    name: str
    label: str
    rule: str | None
    num_weights: int
    full_bytes: int
    num_bytes: int
    is_packed: bool
    is_stored: bool = False
    repacking_bytes: int = 0


class Conversion(Quantizer):
    """One model's way through a quantizer.

    label:     the quantizer's name, for reports and errors.
    converted: the layers so far, in order.
    tables:    tables of embeddings that are kept beside a packed output layer since a rule says ``none``.
    """

    def __init__(self, quantizer: Quantizer, label: str, checkpoint: Checkpoint) -> None:
        super().__init__(quantizer.config)
        self._quantizer, self._label, self._checkpoint = quantizer, label, checkpoint
        self.converted: list[Converted] = []
        self._kept_tables: set[str] = set()
        self._dequantized: list[str] = []

    # --- what a model asks -------------------------------------------------------------------------------------------

    def bits_per_weight(self) -> float | None:
        return self._quantizer.bits_per_weight()

    def declares(self) -> Declaration:
        return self._quantizer.declares()

    def convert(self, name: str, linear: nn.Linear) -> nn.Module:
        chosen = self.admit(name, linear)
        module = chosen.convert(name, linear)
        self.enter(name, linear, module)
        if isinstance(chosen, TakesStored) and module is linear and self._stored_bits(name, tuple(linear.weight.shape)):
            self._dequantized.append(name)
        return module

    def takes(self, name: str, stored: PackedWeight) -> bool:
        chosen = self.quantizer_for(name)
        return isinstance(chosen, TakesStored) and chosen.takes(name, stored)

    def convert_stored(self, name: str, stored: PackedWeight, bias: torch.Tensor | None) -> nn.Module:
        chosen = self.quantizer_for(name)
        assert isinstance(chosen, TakesStored)
        check_stored(name, stored)
        module = chosen.convert_stored(name, stored, bias)
        num_weights = stored.out_features * stored.in_features
        tensors = self._tensors_of(name, (stored.out_features, stored.in_features))
        repacking = max(map(self._checkpoint.repacking_bytes, tensors), default=0)
        entry = self._entry(name, module, num_weights, stored.num_bytes, True)
        self.converted.append(replace(entry, is_stored=True, repacking_bytes=repacking))
        return module

    def packs_table(self, name: str) -> bool:
        rule = self._rule(name)
        if rule is None or _packs(self.quantizer_for(name)):
            return True
        self._kept_tables.add(name)
        return False

    # --- what a calibration asks -------------------------------------------------------------------------------------

    def admit(self, name: str, linear: nn.Linear, *, calibrates: bool = False) -> Quantizer:
        """The quantizer that has this layer, once its weights have been checked. Raises ConfigError.

        calibrates: full weights are packed by quantizers too that otherwise take packed ones.
        """
        chosen = self.quantizer_for(name)
        if _rounds(chosen) or (calibrates and _packs(chosen)):
            self._refuse_lossy(name, tuple(linear.weight.shape), chosen)
            check_finite(name, linear)
        return chosen

    def enter(self, name: str, linear: nn.Linear, module: nn.Module) -> None:
        """Note that ``module`` has taken the place of ``linear``, or is it."""
        weight = linear.weight
        full_bytes = weight.numel() * weight.element_size()
        self.converted.append(self._entry(name, module, weight.numel(), full_bytes, module is not linear))

    def quantizer_for(self, name: str) -> Quantizer:
        """The quantizer of a layer: that of the first rule that matches its name, or the base."""
        return self._quantizer.quantizer_for(name) if isinstance(self._quantizer, RuledQuantizer) else self._quantizer

    # --- what a user should know -------------------------------------------------------------------------------------

    def note(self) -> str | None:
        """Which layers were dequantized although packed ones were asked for; None when all were used as stored."""
        if not self._dequantized:
            return None
        listed = _some(self._dequantized, 3)
        return (
            f"{len(self._dequantized)} of {len(self.converted)} layers are stored in a form that no operation "
            f"multiplies by, and were dequantized: {listed}"
        )

    # --- what is checked ---------------------------------------------------------------------------------------------

    def check_rules(self) -> None:
        """Raise ConfigError for a rule that decided about no layer, now that every layer has been shown."""
        if not isinstance(self._quantizer, RuledQuantizer):
            return
        names = [*(one.name for one in self.converted), *self._kept_tables]
        used = {rule.pattern for name in names if (rule := self._quantizer.rule_for(name)) is not None}
        for rule in self._quantizer.rules:
            if rule.pattern not in used:
                raise ConfigError(
                    _why_unused(rule.pattern, [name for name in names if rule.matches(name)]),
                    where=f"quantizer.rules[{rule.pattern}]",
                    allowed=_some(one.name for one in self.converted),
                    hint=_did_you_mean(rule.pattern, [one.name for one in self.converted]),
                )

    def _refuse_lossy(self, name: str, shape: tuple[int, ...], chosen: Quantizer) -> None:
        if any(getattr(config, "allow_lossy", False) for config in (self.config, chosen.config)):
            return
        for tensor in self._tensors_of(name, shape):
            bits = self._checkpoint.stored_bits(tensor)
            if bits is not None:
                raise ConfigError(
                    f"{tensor} is quantized in the files already, and quantizer {self._label_of(name)!r} would round "
                    "it a second time",
                    where=str(self._checkpoint.path),
                    found=f"{bits:.2f} bits a weight",
                    allowed="weights of 16 bits or more",
                    hint="Set quantizer.allow_lossy: true to do so all the same, take the model's full weights, or "
                    "quantizer none, which reads them dequantized.",
                )

    def _stored_bits(self, name: str, shape: tuple[int, ...]) -> float | None:
        """Bits that one weight of the layer takes in the files, where it is quantized there."""
        found = (self._checkpoint.stored_bits(tensor) for tensor in self._tensors_of(name, shape))
        return next((bits for bits in found if bits is not None), None)

    def _tensors_of(self, name: str, shape: tuple[int, ...]) -> list[str]:
        """The tensors of the files that the layer's weight comes from."""
        own = f"{name}.weight"
        if own in self._checkpoint:
            return [own]
        # A tied output layer has no tensor of its own: it is the table of embeddings, the only one of its shape.
        return [other for other in self._checkpoint.names() if tuple(self._checkpoint.shape(other)) == shape]

    # --- books -------------------------------------------------------------------------------------------------------

    def _rule(self, name: str) -> str | None:
        rule = self._quantizer.rule_for(name) if isinstance(self._quantizer, RuledQuantizer) else None
        return None if rule is None else rule.pattern

    def _label_of(self, name: str) -> str:
        rule = self._quantizer.rule_for(name) if isinstance(self._quantizer, RuledQuantizer) else None
        return self._label if rule is None else rule.label

    def _entry(self, name: str, module: nn.Module, num_weights: int, full_bytes: int, is_packed: bool) -> Converted:
        if isinstance(module, PackedLinear):
            num_bytes = module.packed.num_bytes
        elif is_packed:
            held = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
            num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in held.values())
        else:
            num_bytes = full_bytes
        label = self._label_of(name)
        return Converted(name, label, self._rule(name), num_weights, full_bytes, num_bytes, is_packed)


def _packs(quantizer: Quantizer) -> bool:
    return quantizer.declares().weights is not None


def _rounds(quantizer: Quantizer) -> bool:
    """Whether it packs full weights, and does not only use those that are packed in the files."""
    return _packs(quantizer) and FULL in quantizer.declares().starts_from


def check_finite(name: str, linear: nn.Linear) -> None:
    """Raise ConfigError when a layer's weights hold a NaN or an infinity: no scale fits those."""
    weight = linear.weight.detach()
    if weight.device.type == "meta":
        return
    wrong = sum(int((~torch.isfinite(rows)).sum()) for rows in weight.split(4096))
    if wrong:
        raise ConfigError(
            f"{wrong} of the {weight.numel()} weights are NaN or infinite, and can't be quantized",
            where=name,
            hint=f"Fetch the model again; or keep the layer as it is with a rule: quantizer.rules: {{{name}: none}}.",
        )


def check_stored(name: str, stored: PackedWeight) -> None:
    """Raise ConfigError when the numbers that a packed weight is scaled by hold a NaN or an infinity."""
    wrong = total = 0
    for numbers in _scales_of(stored):
        if numbers.device.type == "meta":
            return
        wrong += sum(int((~torch.isfinite(rows)).sum()) for rows in numbers.split(4096))
        total += numbers.numel()
    if wrong:
        raise ConfigError(
            f"{wrong} of the {total} scales and minima that the files hold for its weights are NaN or infinite",
            where=name,
            hint="Fetch the model again.",
        )


def _scales_of(stored: PackedWeight) -> Iterator[torch.Tensor]:
    """Scales, minima and the like, with outputs first; of GGUF blocks the float16 in them. Float8 weights too."""
    blocks = stored.tensors.get("blocks")
    if blocks is not None:
        kind = block_type(stored.params)
        for at in kind.halves:
            in_blocks = blocks.unflatten(1, (-1, kind.num_bytes))
            yield in_blocks[:, :, at : at + 2].contiguous().view(torch.float16)
    for tensor in stored.tensors.values():
        if tensor.is_floating_point() and tensor.dim():
            yield tensor.half() if tensor.element_size() == 1 else tensor


def _some(names: Iterable[str], most: int = 6) -> str:
    listed = list(names)
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")


def _why_unused(pattern: str, matched: list[str]) -> str:
    if matched:
        return f"the rule decides about no layer: an earlier one has {_some(matched, 3)} already"
    return "the pattern matches no layer of this model"


def _did_you_mean(pattern: str, names: list[str]) -> str | None:
    """The stretch of a layer's name that is spelt most like the pattern."""
    length = len(pattern.split("."))
    parts = [name.split(".") for name in names]
    stretches = {".".join(p[place : place + length]) for p in parts for place in range(len(p) - length + 1)}
    close = nearest(pattern, sorted(stretches))
    return f"Did you mean {close!r}?" if close else None
