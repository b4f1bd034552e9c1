"""Loading weights into a module that was made on the meta device, one module at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, cast, runtime_checkable

import torch
from torch import nn

from drivetrain.contracts.loader import Checkpoint
from drivetrain.contracts.model import BuildContext
from drivetrain.contracts.packed import PackedWeight
from drivetrain.contracts.quantizer import DecidesTables, Quantizer, TakesStored
from drivetrain.errors import LoaderError, MissingTensorError
from drivetrain.packed import PackedEmbedding, PackedLinear

_HARMLESS_SUFFIXES = ("rotary_emb.inv_freq",)
"""Tensors that old releases stored although they follow from the configuration."""

_SHOWN = 8


@runtime_checkable
class PacksRows(Protocol):
    """A table of embeddings that can be looked up in a packed weight: that of the layer that is tied to it, or its own,
    as the files hold it."""

    def packed_with(self, packed: PackedWeight, dtype: torch.dtype) -> PackedEmbedding:
        """What takes its place."""


def _listed(names: Iterable[str]) -> str:
    ordered = sorted(names)
    shown = ", ".join(ordered[:_SHOWN])
    return shown if len(ordered) <= _SHOWN else f"{shown} and {len(ordered) - _SHOWN} more"


def check_names(module: nn.Module, checkpoint: Checkpoint, tied: Mapping[str, str]) -> None:
    """Compare what the module needs with what the files hold, before anything is read.

    tied: name of a tied parameter -> the parameter whose data it shares; the files may hold both.
    Raises MissingTensorError with every absent name, or LoaderError for names that the model has no use for and for
    shapes that differ.
    """
    held = set(checkpoint.names())
    wanted = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    where = str(checkpoint.path)
    missing = wanted.keys() - held
    if missing:
        raise MissingTensorError(
            f"the files lack {len(missing)} of the {len(wanted)} tensors that {checkpoint.architecture} needs: "
            + ", ".join(sorted(missing)),
            where=where,
            hint="Fetch the model again, or check that config.json belongs to these weights.",
        )
    extra = {name for name in held - wanted.keys() - tied.keys() if not name.endswith(_HARMLESS_SUFFIXES)}
    if extra:
        raise LoaderError(
            f"the files hold {len(extra)} tensors that {checkpoint.architecture} has no place for: {_listed(extra)}",
            where=where,
            hint="The configuration describes another model than the weights.",
        )
    wrong = {
        name: (shape, found) for name, shape in wanted.items() if (found := tuple(checkpoint.shape(name))) != shape
    }
    if wrong:
        details = _listed(f"{name} (expected {expected}, found {found})" for name, (expected, found) in wrong.items())
        raise LoaderError(f"{len(wrong)} tensors have another shape than the model: {details}", where=where)


def check_tied(checkpoint: Checkpoint, tied: Mapping[str, str], dtype: torch.dtype) -> None:
    held = set(checkpoint.names())
    for name, source in tied.items():
        if name in held and not torch.equal(checkpoint.tensor(name, dtype), checkpoint.tensor(source, dtype)):
            raise LoaderError(
                f"the configuration ties {name} to {source}, but the files hold different values for them",
                where=str(checkpoint.path),
                hint="Set tie_word_embeddings to false in config.json.",
            )


def _read(checkpoint: Checkpoint, name: str, context: BuildContext) -> nn.Parameter:
    tensor = checkpoint.tensor(name, context.dtype)
    # A copy, because the tensor may be a view of a file mapped read-only, and parameters are written by training.
    own = torch.empty(tensor.shape, dtype=context.dtype, device=context.device)
    return nn.Parameter(own.copy_(tensor))


def load_weights(
    module: nn.Module, checkpoint: Checkpoint, context: BuildContext, tied: Mapping[str, str] | None = None
) -> None:
    """Give every parameter its data, and every linear layer to the quantizer as soon as its own are there.

    Parameter names are the tensors' names. Never more than one linear layer is held in full and quantized form both: a
    layer that is tied to a table is converted right after the table is read, which is then looked up in packed form.
    Raises MissingTensorError and LoaderError before the first tensor is read.
    """
    tied = tied or {}
    check_names(module, checkpoint, tied)
    if context.device.type != "meta":
        check_tied(checkpoint, tied, context.dtype)
    _Loading(module, checkpoint, context, tied).run()


class _Loading:
    """One pass over a module's parts."""

    def __init__(
        self, module: nn.Module, checkpoint: Checkpoint, context: BuildContext, tied: Mapping[str, str]
    ) -> None:
        self._module, self._checkpoint, self._context = module, checkpoint, context
        self._users = {source.removesuffix(".weight"): name.removesuffix(".weight") for name, source in tied.items()}
        self._total = len(list(module.named_parameters()))
        self._num_loaded = 0

    def run(self) -> None:
        done: set[str] = set()
        for prefix, part in list(self._module.named_modules()):
            if prefix in done:
                continue
            user = self._users.get(prefix)
            if user is not None:
                self._load_tied(prefix, part, user)
                done.add(user)
            else:
                self._load_part(prefix, part)

    def _load_part(self, prefix: str, part: nn.Module) -> None:
        stored = _stored(self._checkpoint, prefix, f"{prefix}.weight", part, self._context)
        if stored is not None and isinstance(part, PacksRows) and not self._shares(prefix):
            stored = None
        self._load_parameters(prefix, part, leave_out=("weight",) if stored is not None else ())
        if isinstance(part, nn.Linear):
            self._convert(prefix, part, stored)
        elif stored is not None:
            table = cast(PacksRows, part)
            self._module.set_submodule(prefix, table.packed_with(stored, self._context.dtype))

    def _load_tied(self, name: str, table: nn.Module, user_name: str) -> None:
        """A table and the output layer that is tied to it."""
        user = self._module.get_submodule(user_name)
        stored = _stored(self._checkpoint, user_name, f"{name}.weight", user, self._context)
        if stored is None or not self._shares(name):
            self._load_parameters(name, table)
            user.weight = table.weight
        converted = self._convert(user_name, user, stored)
        if isinstance(converted, PackedLinear) and self._shares(name):
            packs = cast(PacksRows, table)
            self._module.set_submodule(name, packs.packed_with(converted.packed, self._context.dtype))

    def _load_parameters(self, prefix: str, part: nn.Module, leave_out: Sequence[str] = ()) -> None:
        for own_name, _ in list(part.named_parameters(prefix="", recurse=False)):
            if own_name not in leave_out:
                name = f"{prefix}.{own_name}" if prefix else own_name
                setattr(part, own_name, _read(self._checkpoint, name, self._context))
            self._num_loaded += 1
            self._context.progress(f"loading {self._checkpoint.architecture}", self._num_loaded, self._total, "tensors")

    def _convert(self, name: str, layer: nn.Module, stored: PackedWeight | None) -> nn.Module:
        quantizer = self._context.quantizer
        if quantizer is None:
            return layer
        assert isinstance(layer, nn.Linear)
        converted = _converted(name, layer, stored, quantizer)
        self._module.set_submodule(name, converted)
        return converted

    def _shares(self, name: str) -> bool:
        quantizer = self._context.quantizer
        return not isinstance(quantizer, DecidesTables) or quantizer.packs_table(name)


def read_parameters(module: nn.Module, prefix: str, checkpoint: Checkpoint, context: BuildContext) -> None:
    """Give every parameter below ``module`` its data; its names stand behind ``prefix`` in the files."""
    for name, _ in list(module.named_parameters()):
        owner, _, own_name = name.rpartition(".")
        setattr(module.get_submodule(owner), own_name, _read(checkpoint, f"{prefix}.{name}", context))


def _stored(
    checkpoint: Checkpoint, name: str, tensor: str, part: nn.Module, context: BuildContext
) -> PackedWeight | None:
    """The weight of a layer or a table as the files hold it, on the device, where the quantizer uses it so."""
    if not isinstance(part, nn.Linear | PacksRows) or not isinstance(context.quantizer, TakesStored):
        return None
    stored = checkpoint.packed(tensor)
    if stored is None or not context.quantizer.takes(name, stored):
        return None
    return stored.to(context.device)


def _converted(name: str, linear: nn.Linear, stored: PackedWeight | None, quantizer: Quantizer) -> nn.Module:
    if stored is None:
        return quantizer.convert(name, linear)
    assert isinstance(quantizer, TakesStored)
    return quantizer.convert_stored(name, stored, None if linear.bias is None else linear.bias.detach())
