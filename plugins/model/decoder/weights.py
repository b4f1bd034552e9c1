"""Loading weights into a module that was made on the meta device, one module at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from drivetrain.contracts.loader import Checkpoint
from drivetrain.contracts.model import BuildContext
from drivetrain.contracts.packed import PackedWeight
from drivetrain.contracts.quantizer import Quantizer, TakesStored
from drivetrain.errors import LoaderError, MissingTensorError

_HARMLESS_SUFFIXES = ("rotary_emb.inv_freq",)
"""Tensors that old releases stored although they follow from the configuration."""

_SHOWN = 8


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


def _check_tied(checkpoint: Checkpoint, tied: Mapping[str, str], dtype: torch.dtype) -> None:
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

    Parameter names are the tensors' names. Never more than one linear layer is held in full and quantized form both.
    Raises MissingTensorError and LoaderError before the first tensor is read.
    """
    tied = tied or {}
    check_files(module, checkpoint, context.dtype, tied)
    total = len(list(module.named_parameters()))
    loaded: dict[int, nn.Parameter] = {}
    for prefix, part in list(module.named_modules()):
        stored = _stored(checkpoint, prefix, part, context)
        for own_name, placeholder in list(part.named_parameters(prefix="", recurse=False)):
            if stored is not None and own_name == "weight":
                continue
            if id(placeholder) not in loaded:
                loaded[id(placeholder)] = _read(checkpoint, f"{prefix}.{own_name}" if prefix else own_name, context)
                context.progress(f"loading {checkpoint.architecture}", len(loaded), total, "tensors")
            setattr(part, own_name, loaded[id(placeholder)])
        if isinstance(part, nn.Linear) and context.quantizer is not None:
            module.set_submodule(prefix, _converted(prefix, part, stored, context.quantizer))


def read_parameters(module: nn.Module, prefix: str, checkpoint: Checkpoint, context: BuildContext) -> None:
    """Give every parameter below ``module`` its data; its names stand behind ``prefix`` in the files."""
    for name, _ in list(module.named_parameters()):
        owner, _, own_name = name.rpartition(".")
        setattr(module.get_submodule(owner), own_name, _read(checkpoint, f"{prefix}.{name}", context))


def check_files(module: nn.Module, checkpoint: Checkpoint, dtype: torch.dtype, tied: Mapping[str, str]) -> None:
    """Raise MissingTensorError or LoaderError where the files are not those of ``module``."""
    check_names(module, checkpoint, tied)
    _check_tied(checkpoint, tied, dtype)


def _stored(checkpoint: Checkpoint, prefix: str, part: nn.Module, context: BuildContext) -> PackedWeight | None:
    """The layer's weight as the files hold it, on the device, where the quantizer uses it so."""
    if not isinstance(part, nn.Linear) or not isinstance(context.quantizer, TakesStored):
        return None
    stored = checkpoint.packed(f"{prefix}.weight")
    if stored is None or not context.quantizer.takes(prefix, stored):
        return None
    return stored.to(context.device)


def _converted(name: str, linear: nn.Linear, stored: PackedWeight | None, quantizer: Quantizer) -> nn.Module:
    if stored is None:
        return quantizer.convert(name, linear)
    assert isinstance(quantizer, TakesStored)
    return quantizer.convert_stored(name, stored, None if linear.bias is None else linear.bias.detach())
