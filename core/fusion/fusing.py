"""The pass itself: observe, apply the patterns, and compare what the module gives with what it gave."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn

from drivetrain.errors import FusionError
from drivetrain.fusion.example import example_of
from drivetrain.fusion.fuser import REFERENCE, Binder, Fuser
from drivetrain.fusion.observing import Example, Run, layers_of, observe, tensors_of
from drivetrain.fusion.patterns import PATTERNS, Pattern
from drivetrain.fusion.report import FusionReport

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""How far the outputs of a fused module may be from the unfused one's, as a share of their norm. Each operation also
keeps within its own published tolerance; this bounds what all layers together make of it."""


def fuse(
    module: nn.Module,
    binder: Binder | None = None,
    *,
    example: Example | None = None,
    patterns: Sequence[Pattern] = PATTERNS,
    reference_too: bool = False,
) -> FusionReport:
    """Replace operations of ``module`` by fewer bound ones, in place, and say what was done.

    binder:        who binds operations; None binds those of the kernel provider ``reference``.
    example:       arguments of one call, positional and named, to run the module on; models of this project need none.
    reference_too: use fused operations also where only the reference has them, in as many steps as before.

    The module is run twice on the example, without gradients. Its parameters may be others afterwards (make optimizers
    later), but its state dict has the names that it had. A module that is fused already is left as it is.
    Raises FusionError, with the module as it was before, when its outputs are no longer the same within ``TOLERANCE``.
    """
    example = example or example_of(module)
    if example is None:
        raise FusionError(
            "the module is no language model of this project, so it needs an example to run on",
            where=type(module).__name__,
            hint="Give example=(arguments, named_arguments).",
        )
    before = observe(module, example)
    fuser = Fuser(module, before, binder or _reference(), reference_too)
    try:
        for pattern in patterns:
            pattern.apply(fuser)
        fuser.finish()
        after = observe(module, example)
        _check_outputs(module, before, after)
    except BaseException:
        fuser.take_back()
        raise
    return _report(fuser, module, before, after)


def _reference() -> Binder:
    from drivetrain.binding import KernelBinder
    from drivetrain.contracts.kernels import KernelProvider
    from drivetrain.registry import Registry, load

    plugin = load(Registry().find("kernels", REFERENCE))
    return KernelBinder([(REFERENCE, cast(KernelProvider, plugin(plugin.Config())))])


def _check_outputs(module: nn.Module, before: Run, after: Run) -> None:
    for wanted, found in zip(tensors_of(before.output), tensors_of(after.output), strict=True):
        if not wanted.is_floating_point():
            continue
        bound = TOLERANCE.get(wanted.dtype, 5e-2)
        size = float(wanted.double().norm())
        error = float((found.double() - wanted.double()).norm()) / size if size else float(found.double().norm())
        if not error <= bound:  # a NaN fails too
            raise FusionError(
                f"the fused module's outputs differ from its own by {error:.2g} of their norm; nothing was changed",
                where=type(module).__name__,
                found=error,
                allowed=f"up to {bound}",
            )


def _report(fuser: Fuser, module: nn.Module, before: Run, after: Run) -> FusionReport:
    layers = [layer for layer in layers_of(module) if layer in before.operations_of and layer in after.operations_of]

    def per_layer(run: Run) -> float:
        return round(sum(run.operations_of[layer] for layer in layers) / len(layers), 1) if layers else 0.0

    return FusionReport(
        tuple(fuser.fused),
        fuser.left,
        len(layers),
        per_layer(before),
        per_layer(after),
        before.num_operations,
        after.num_operations,
    )


def fuse_model(model: Any, binder: Binder) -> FusionReport | None:
    """:func:`fuse` for what a model plugin has built; None when there is nothing to run it on."""
    example = example_of(model)
    return None if example is None else fuse(cast(nn.Module, model), binder, example=example)
