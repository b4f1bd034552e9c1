"""What quantizers share that use a checkpoint's packed layers as they are stored, and make none themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from drivetrain.contracts.plugin import Probe, ProbeContext, Purpose
from drivetrain.contracts.quantizer import Declaration, Quantizer
from drivetrain.packed import PackedLinear

if TYPE_CHECKING:
    import torch
    from torch import nn

    from drivetrain.contracts.packed import PackedWeight


class StoredQuantizer(Quantizer):
    """Uses layers as the files pack them; a layer that they hold in full stays full.

    method:         the plugin's own name, which checkpoints of its format give as ``packed_by``.
    format_name:    what the format is called in sentences.
    uses:           operations of the packed weights that it takes.
    how_to_get_one: the next move of somebody whose files are of another format.
    """

    method: ClassVar[str]
    format_name: ClassVar[str]
    uses: ClassVar[tuple[str, ...]]
    how_to_get_one: ClassVar[str]

    @classmethod
    def probe(cls, context: ProbeContext) -> Probe:
        if context.purpose is Purpose.QUANTIZE:
            return cls.probe_making()
        files = context.checkpoint
        if files is None:
            return Probe.yes("no weights opened yet")
        if files.packed_by != cls.method:
            return Probe.no(
                "not_stored_so",
                f"{files.path} holds no layers packed as {cls.format_name}; {cls.how_to_get_one}",
                wanted=f"layers packed as {cls.format_name}",
                offered=files.packed_by or "full weights",
            )
        if files.why_not_packed is not None:
            return Probe.no(
                "not_usable_packed",
                f"{files.path}: {files.why_not_packed}; quantizer none dequantizes them",
                wanted=", ".join(cls.uses),
                offered=files.why_not_packed,
            )
        if context.purpose is Purpose.TRAIN:
            return Probe.no("no_gradient", "packed weights have no gradient; train the weights that they were made of")
        return Probe.yes(f"{files.path} holds layers packed as {cls.format_name}")

    @classmethod
    def probe_making(cls) -> Probe:
        """The answer where packed weights are to be made of full ones."""
        return Probe.no("makes_none", f"uses weights that are packed as {cls.format_name}, and packs none")

    def bits_per_weight(self) -> float | None:
        """None: the files decide, and what they hold in full stays full."""
        return None

    def declares(self) -> Declaration:
        return Declaration(
            f"as the files pack them ({self.format_name})", starts_from=frozenset(self.uses), operations=self.uses
        )

    def convert(self, name: str, linear: nn.Linear) -> nn.Module:
        return linear

    def takes(self, name: str, stored: PackedWeight) -> bool:
        return stored.operation in self.uses

    def convert_stored(self, name: str, stored: PackedWeight, bias: torch.Tensor | None) -> nn.Module:
        return PackedLinear(stored, None if bias is None else bias.clone())
