"""A tiny model and a text to quantize it by, and the parts that a test needs of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch

from drivetrain.assembly import Parts, resolve_parts
from drivetrain.binding import KernelBinder, kernel_providers
from drivetrain.calibration import QuantizeOptions, quantize_model
from drivetrain.config import load_settings
from drivetrain.contracts.model import BuildContext, LayeredModel, OpensLayers
from drivetrain.contracts.plugin import Purpose
from drivetrain.contracts.source import silent

TEXT = (
    "There is more than one way to say that the quick brown fox sleeps; x = f(1, 22) is another. "
    "Numbers such as 333 are here too, and dogs, and sentences that go on and on until they end. "
) * 40
"""Some 4000 tokens of the tiny tokenizer."""

QUICK: Mapping[str, Any] = {"num_tokens": 512, "context": 64}


def write_text(folder: Path) -> Path:
    path = folder / "text.txt"
    path.write_text(TEXT)
    return path


def settings_of(folder: Path, quantizer: Any = "none") -> Any:
    platform = {"name": "cpu", "threads": 1}
    return load_settings(None, {"model": str(folder), "platform": platform, "quantizer": quantizer})


def quantize(folder: Path, out: Path, quantizer: Any, text: Path | None = None, **options: Any) -> Path:
    """Quantize the model in ``folder``; ``options`` are those of :class:`QuantizeOptions`."""
    data = text if text is not None else write_text(out.parent)
    return quantize_model(settings_of(folder, quantizer), QuantizeOptions(out, data, **{**QUICK, **options}))


def parts_of(folder: Path) -> Parts:
    left_out = ("frontend", "scheduler", "partitioner", "checkpoint", "store")
    return resolve_parts(settings_of(folder), purpose=Purpose.TRAIN, leave_out=left_out)


def layered(parts: Parts) -> LayeredModel:
    """The model layer by layer, in float32."""
    binder = KernelBinder(kernel_providers(parts.registry, parts.kernels, parts.report["kernels"]))
    context = BuildContext(torch.device("cpu"), torch.float32, binder.bind, None, silent)
    assert parts.checkpoint is not None
    return cast(OpensLayers, parts.model).open_layers(parts.checkpoint, context)
