"""The ledger: what every byte of a model's weights is for, known before the model is made."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from drivetrain.contracts.kernels import KernelSpec
from drivetrain.contracts.loader import Checkpoint, TokenizerData
from drivetrain.contracts.model import BuildContext, Model, ModelSpec
from drivetrain.contracts.packed import PackedWeight
from drivetrain.contracts.quantizer import Quantizer
from drivetrain.contracts.source import silent
from drivetrain.packed.conversion import Conversion, Converted
from drivetrain.packed.layers import PackedModule
from drivetrain.packed.packing import SCRATCH_BYTES

_WIDE_BYTES = 4
"""A weight on its way from the files, in float32."""


@dataclass(frozen=True)
class LedgerRow:
    """The layers that one quantizer has by one rule.

    rule:      the pattern; None for the layers that no rule names.
    num_bytes: of their weights, scales included; biases are counted with the rest of the model.
    """

    quantizer: str
    rule: str | None
    num_layers: int
    num_weights: int
    num_bytes: int

    @property
    def bits_per_weight(self) -> float:
        """On average."""
        return 8 * self.num_bytes / max(1, self.num_weights)


@dataclass(frozen=True)
class Ledger:
    """Bytes of a model's weights.

    rows:        linear layers, by quantizer and rule.
    other_bytes: everything else: embeddings (none where they are looked up in a packed output layer), norms, biases.
    peak_bytes:  the most that is taken while it is made, one layer at a time.
    is_exact:    False where the model plugin can't build on the meta device, so that it was estimated from the number
                 of parameters and the quantizer's bits; there are no rows then.
    """

    rows: tuple[LedgerRow, ...]
    other_bytes: int
    peak_bytes: int
    is_exact: bool = True

    @property
    def total_bytes(self) -> int:
        """Of the whole model, once it is made."""
        return sum(row.num_bytes for row in self.rows) + self.other_bytes

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        rows = [{**dataclasses.asdict(row), "bits_per_weight": row.bits_per_weight} for row in self.rows]
        return {**dataclasses.asdict(self), "rows": rows, "total_bytes": self.total_bytes}

    @classmethod
    def of(cls, model: nn.Module, conversion: Conversion, *, reads_copies: bool, is_layerwise: bool) -> Ledger:
        """What ``model``, on whatever device, holds after this conversion.

        reads_copies: whether reading a tensor takes memory of its own, as from files it does.
        is_layerwise: whether layers are read one by one; otherwise all of them are there in full first.
        """
        rows = _rows(conversion.converted)
        total = model_bytes(model)
        # A tied layer that stays as it is lies in the table of embeddings; it is counted as a layer.
        other = total - sum(row.num_bytes for row in rows)
        packed = [one for one in conversion.converted if one.is_packed and not one.is_stored]
        full = [one.num_weights for one in conversion.converted if not one.is_stored]
        sizes = [tensor.numel() for tensor in _held(model, packed=False)]
        largest = max([*full, *sizes], default=0)
        beside = (2 if reads_copies else 1) * _WIDE_BYTES * largest + (SCRATCH_BYTES if packed else 0)
        beside = max(beside, *(one.repacking_bytes for one in conversion.converted), 0)
        if not is_layerwise:
            beside += sum(one.full_bytes for one in packed)
        return cls(rows, other, total + beside)


def weigh(
    model: Model, checkpoint: Checkpoint, spec: ModelSpec, dtype: torch.dtype, quantizer: Quantizer, label: str
) -> Ledger:
    """The ledger of a model that is not made: it is built on the meta device, and its tensors are counted.

    label: the quantizer's name. Raises what building would raise: ConfigError for a rule or a group that does not fit.
    """
    abilities = type(model).abilities()
    if "meta" not in abilities:
        bits = quantizer.bits_per_weight()
        total = int(spec.num_parameters * (8 * dtype.itemsize if bits is None else bits) / 8)
        return Ledger((), total, total + spec.num_parameters * dtype.itemsize, is_exact=False)
    conversion = Conversion(quantizer, label, checkpoint)
    context = BuildContext(torch.device("meta"), dtype, _unbound, conversion, silent)
    module = model.build(MetaCheckpoint(checkpoint), context)
    conversion.check_rules()
    return ledger_of(model, module, conversion, checkpoint)


def ledger_of(model: Model, module: Any, conversion: Conversion, checkpoint: Checkpoint) -> Ledger:
    """The ledger of a module that ``model`` has built, with values or without."""
    return Ledger.of(
        module,
        conversion,
        reads_copies=not checkpoint.is_resident,
        is_layerwise="layerwise" in type(model).abilities(),
    )


def _unbound(spec: KernelSpec) -> Callable[..., Any]:
    """A module that is made only to be counted needs no kernels."""

    def refuse(*tensors: torch.Tensor) -> None:
        raise AssertionError(f"{spec.operation} called on a module that was made only to be counted")

    return refuse


def _rows(converted: Sequence[Converted]) -> tuple[LedgerRow, ...]:
    groups: dict[tuple[str, str | None], list[Converted]] = {}
    for one in converted:
        groups.setdefault((one.label if one.is_packed else "none", one.rule), []).append(one)
    return tuple(
        LedgerRow(label, rule, len(ones), sum(one.num_weights for one in ones), sum(one.num_bytes for one in ones))
        for (label, rule), ones in groups.items()
    )


def _held(model: nn.Module, *, packed: bool = True) -> Iterable[torch.Tensor]:
    """Parameters and buffers, what several modules share once; with ``packed``, packed weights among them."""
    modules = [module for module in model.modules() if packed or not isinstance(module, PackedModule)]
    tensors = [t for m in modules for t in (*m.parameters(recurse=False), *m.buffers(recurse=False))]
    # Storages on the meta device have no address, but each is an object of its own.
    return {(t.untyped_storage()._cdata, t.storage_offset(), t.numel(), t.dtype): t for t in tensors}.values()


def model_bytes(model: nn.Module) -> int:
    """Bytes of a module's parameters and buffers, what several share counted once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in _held(model))


class MetaCheckpoint(Checkpoint):
    """A checkpoint whose tensors have shapes and no values: a model that is built from it can be counted."""

    def __init__(self, files: Checkpoint) -> None:
        self.path, self.config, self.generation_config = files.path, files.config, files.generation_config
        self.packed_by, self.why_not_packed = files.packed_by, files.why_not_packed
        self._files = files
        self._names = frozenset(files.names())

    def names(self) -> Sequence[str]:
        return self._files.names()

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def shape(self, name: str) -> tuple[int, ...]:
        return self._files.shape(name)

    def stored_bytes(self) -> int:
        return self._files.stored_bytes()

    def stored_bits(self, name: str) -> float | None:
        return self._files.stored_bits(name)

    def tensor(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(self._files.shape(name), dtype=dtype, device="meta")

    def packed(self, name: str) -> PackedWeight | None:
        return self._files.packed_form(name)

    def repacking_bytes(self, name: str) -> int:
        return self._files.repacking_bytes(name)

    def tokenizer(self) -> TokenizerData:
        return self._files.tokenizer()
