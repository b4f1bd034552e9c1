"""The weights that a new quantizer starts from: read from the files again, or kept in the host's memory.

Whichever it is, they are the checkpoint's own: what a quantizer has made of them is never quantized again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch

from drivetrain.contracts.loader import FULL_BITS, Checkpoint, TokenizerData
from drivetrain.contracts.packed import PackedWeight
from drivetrain.errors import ConfigError, MemoryBudgetError
from drivetrain.hardware import read_memory


class WeightsSource(StrEnum):
    """Where the weights of a rebuilt model come from."""

    RELOAD = "reload"
    RESIDENT = "resident"


@dataclass(frozen=True)
class Weights:
    """The weights that a swap builds a model from.

    resident_bytes:        host memory that the copy takes; 0 without one.
    dequantized_from_bits: bits that one weight has in the files, scales included, when they are quantized there; None
                           when they are stored in full.
    """

    source: WeightsSource
    resident_bytes: int = 0
    dequantized_from_bits: float | None = None

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Weights:
        resident = isinstance(checkpoint, MasterCopy)
        return cls(
            WeightsSource.RESIDENT if resident else WeightsSource.RELOAD,
            checkpoint.num_bytes if isinstance(checkpoint, MasterCopy) else 0,
            stored_bits(checkpoint),
        )


def stored_bits(checkpoint: Checkpoint) -> float | None:
    """Bits that one weight takes in the files, on average over those that are quantized there; None without any."""
    counts = [(math.prod(checkpoint.shape(name)), checkpoint.stored_bits(name)) for name in checkpoint.names()]
    quantized = [(count, bits) for count, bits in counts if bits is not None and bits < FULL_BITS]
    return sum(count * bits for count, bits in quantized) / sum(count for count, _ in quantized) if quantized else None


class MasterCopy(Checkpoint):
    """A checkpoint whose tensors stay in host memory in one dtype from the first time they are read.

    What is read in another dtype comes from the files.
    """

    is_resident = True

    def __init__(self, files: Checkpoint, dtype: torch.dtype) -> None:
        self.path, self.config, self.generation_config = files.path, files.config, files.generation_config
        self.packed_by, self.why_not_packed = files.packed_by, files.why_not_packed
        self.is_packed_first, self.packs_exactly = files.is_packed_first, files.packs_exactly
        self._files = files
        self._dtype = dtype
        self._kept: dict[str, torch.Tensor] = {}

    @property
    def num_bytes(self) -> int:
        """Host memory that is taken."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._kept.values())

    def names(self) -> Sequence[str]:
        return self._files.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._files.shape(name)

    def stored_bytes(self) -> int:
        return self._files.stored_bytes()

    def tensor(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        if dtype != self._dtype:
            return self._files.tensor(name, dtype)
        if name not in self._kept:
            # A copy: what the loader hands out may be a view of the mapped file.
            self._kept[name] = self._files.tensor(name, dtype).clone()
        return self._kept[name]

    def packed(self, name: str) -> PackedWeight | None:
        return self._files.packed(name)

    def packed_form(self, name: str) -> PackedWeight | None:
        return self._files.packed_form(name)

    def repacking_bytes(self, name: str) -> int:
        return self._files.repacking_bytes(name)

    def stored_bits(self, name: str) -> float | None:
        return self._files.stored_bits(name)

    def tokenizer(self) -> TokenizerData:
        return self._files.tokenizer()


def check_room(num_parameters: int, dtype: torch.dtype) -> None:
    """Raise MemoryBudgetError when the host has no room for a master copy."""
    needed, free = num_parameters * dtype.itemsize, read_memory().available_bytes
    if needed > free:
        raise MemoryBudgetError(
            f"a master copy of the weights needs {needed / 2**20:.0f} MiB of host memory, and {free / 2**20:.0f} MiB "
            "are free",
            where="engine.master_copy",
            hint="Leave it at none: a quantizer swap then reads the files again.",
        )


def check_kept(master: MasterCopy, architecture: str) -> None:
    """Raise ConfigError when the model was built past the master copy."""
    if not master.num_bytes:
        raise ConfigError(
            f"the model plugin {architecture} reads the files itself, so that no master copy of them can be kept",
            where="engine.master_copy",
            found="resident",
            allowed="none",
        )
