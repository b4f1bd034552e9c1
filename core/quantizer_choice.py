"""Which quantizer comes first where none is named: full weights stay full, packed ones packed where nothing is lost."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, cast

from drivetrain.binding import KernelBinder, kernel_providers
from drivetrain.contracts.kernels import KernelProvider, KernelSpec
from drivetrain.contracts.plugin import ProbeContext, Purpose
from drivetrain.errors import ConfigError, PluginError
from drivetrain.kernel_record import REFERENCE, KernelRecord
from drivetrain.registry import Outcome, Registry, Selector
from drivetrain.registry.selection import AUTO

if TYPE_CHECKING:
    from drivetrain.contracts.loader import Checkpoint

NOT_QUANTIZED = "none"
"""The quantizer that quantizes nothing."""


def prefer_quantizer(selector: Selector, registry: Registry, record: KernelRecord, context: ProbeContext) -> None:
    """Have weights left as they are where no quantizer is named: full ones in full, and packed ones packed, where the
    files were made for that or kernels are there that multiply by them. Training needs the full ones.

    selector: knows what ``kernels`` are asked for, which are chosen after the quantizer.
    """
    files = context.checkpoint
    if files is None or files.packed_by is None or context.purpose is not Purpose.SERVE:
        selector.prefer({"quantizer": (NOT_QUANTIZED,)}, "the core's")
    elif files.is_packed_first:
        selector.prefer({"quantizer": (files.packed_by, NOT_QUANTIZED)}, "the files'")
    elif files.packs_exactly and _multiplies(files, selector, registry, record, context):
        selector.prefer({"quantizer": (files.packed_by, NOT_QUANTIZED)}, "the kernels'")
    else:
        selector.prefer({"quantizer": (NOT_QUANTIZED,)}, "the core's")


def note_of_packed_weights(selector: Selector, context: ProbeContext) -> str | None:
    """What to tell where nobody has said that the files' packed weights are to be dequantized, and they are."""
    files, selection = context.checkpoint, selector.report["quantizer"]
    if selector.request("quantizer").name != AUTO or context.purpose is not Purpose.SERVE or files is None:
        return None
    if not any(one.name == files.packed_by and one.outcome == Outcome.ELIGIBLE for one in selection.candidates):
        return None
    stored = f"quantizer: {files.packed_by} uses them as they are stored, in {files.stored_bytes() / 2**20:.1f} MiB"
    if not files.packs_exactly:
        return f"the weights are dequantized while they are loaded; {stored}"
    return (
        "the weights are dequantized while they are loaded: of the kernels here only 'reference', in plain torch, "
        f"multiplies by all of them as they are stored; {stored}, but many times as slowly"
    )


def _multiplies(
    files: Checkpoint, selector: Selector, registry: Registry, record: KernelRecord, context: ProbeContext
) -> bool:
    """Whether kernels beside the reference multiply by every form in which the files hold a layer."""
    if context.platform is None or context.dtype is None:  # left out by the caller: there is nothing to ask for
        return False
    try:
        kernels, selection = selector.would_choose("kernels", context)
    except (PluginError, ConfigError):
        return False  # told of when their own turn comes
    providers = kernel_providers(registry, cast(KernelProvider, kernels), selection)
    binder = KernelBinder(providers, is_auto=selection.requested == AUTO, record=record)
    specs = _products(files, context.platform.device_type, context.dtype)
    return all(binder.provider_of(spec) not in (None, REFERENCE) for spec in specs)


def _products(files: Checkpoint, device_type: str, dtype: str) -> Iterable[KernelSpec]:
    """One use for each form of packed layers that differs in more than its sizes."""
    specs: dict[tuple[str, frozenset[tuple[str, float]]], KernelSpec] = {}
    for name in files.names():
        form = files.packed_form(name)
        if form is not None:
            key = form.operation, frozenset(form.params.items())
            sizes = {"I": form.in_features, "O": form.out_features}
            specs.setdefault(key, KernelSpec(form.operation, device_type, dtype, sizes, form.params))
    return specs.values()
