"""From a model and a text to a folder with the packed model: ``drivetrain quantize``."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from drivetrain import __version__
from drivetrain.assembly import Parts, apply_rules, resolve_parts
from drivetrain.binding import KernelBinder, kernel_providers
from drivetrain.calibration.layers import LayerByLayer
from drivetrain.calibration.plan import CalibrationPlan, groups_of, make_plan
from drivetrain.calibration.state import ChangedTensors, RunFolder
from drivetrain.collecting import collect_as_usual
from drivetrain.config import Settings
from drivetrain.contracts.loader import Checkpoint
from drivetrain.contracts.model import BuildContext, LayeredModel, OpensLayers
from drivetrain.contracts.packed import PackedWeight
from drivetrain.contracts.plugin import Purpose
from drivetrain.contracts.quantizer import Calibrates, Quantizer, Saves
from drivetrain.contracts.source import Progress, silent
from drivetrain.errors import ConfigError
from drivetrain.evaluation.text import opening_of, read_tokens
from drivetrain.packed.conversion import Conversion
from drivetrain.packed.rules import RuledQuantizer
from drivetrain.registry.selection import AUTO, Selector
from drivetrain.serving.tokenizer import Tokenizer

DEFAULT_TOKENS = 16384
DEFAULT_CONTEXT = 512

_LEAST_TOKENS = 128
"""Fewer say next to nothing about a layer's inputs."""

_LEFT_OUT = ("frontend", "scheduler", "partitioner", "checkpoint", "store", "quantizer")


@dataclass(frozen=True)
class QuantizeOptions:
    """What to do, beside the settings.

    out:          folder to write, which is not there yet or empty.
    data:         text to calibrate on; None where the quantizer needs none.
    num_tokens:   of the text; None takes 16384.
    context:      tokens of a window; None takes 512, or what the model sees.
    seed:         draws the windows.
    memory_bytes: the most that the run may take beside what the process has; None for no bound.
    resume:       go on with a run that did not end.
    """

    out: Path
    data: Path | None = None
    num_tokens: int | None = None
    context: int | None = None
    seed: int = 0
    memory_bytes: int | None = None
    resume: bool = False

    @property
    def run_folder(self) -> Path:
        """Where the run keeps what it has finished."""
        return self.out.parent / f"{self.out.name}.unfinished"


def quantize_model(
    settings: Settings,
    options: QuantizeOptions,
    *,
    progress: Progress = silent,
    planned: Any = lambda plan: None,
) -> Path:
    """Pack a model with the quantizer of ``settings``, write it, and return its folder.

    planned: called with the :class:`CalibrationPlan` before anything large is read.
    Raises ConfigError, CalibrationError, MemoryBudgetError, a PluginError or a LoaderError; what a run has finished
    stays in ``options.run_folder`` then, and ``resume`` goes on from there.
    """
    _check_out(options.out)
    # Attention without a cache, and operations of any shape, are what training needs too.
    parts = resolve_parts(settings, purpose=Purpose.TRAIN, progress=progress, leave_out=_LEFT_OUT)
    if parts.checkpoint is None:
        raise ConfigError("no model is named", hint="Name one, for example smollm2-135m.")
    _choose_quantizer(parts)
    return _Quantizing(parts, parts.checkpoint, options, progress).run(planned)


def _check_out(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(
            "the output folder is not empty" if out.is_dir() else "the output is no folder",
            where="--out",
            found=str(out),
            hint="Remove it, or name another.",
        )


def _choose_quantizer(parts: Parts) -> None:
    """Choose what packs, of those that make packed weights of full ones."""
    request = parts.settings.parts.get("quantizer")
    if request is None or request.name in ("none", AUTO):
        raise ConfigError(
            "no quantizer is named",
            where="--quantizer",
            found=None if request is None else request.name,
            hint="Name one, for example awq; drivetrain plugins list --kind quantizer lists them.",
        )
    selector = Selector(parts.registry, {"quantizer": request})
    context = dataclasses.replace(parts.context, purpose=Purpose.QUANTIZE)
    quantizer = cast(Quantizer, selector.choose("quantizer", context))
    parts.plugins["quantizer"] = apply_rules(quantizer, parts.registry, context, request.origin)
    selections = (*parts.report.selections, selector.report["quantizer"])
    parts.report = dataclasses.replace(parts.report, selections=selections)


class _Quantizing:
    """One run, from chosen parts to the written folder."""

    def __init__(self, parts: Parts, checkpoint: Checkpoint, options: QuantizeOptions, progress: Progress) -> None:
        self._parts, self._checkpoint, self._options, self._progress = parts, checkpoint, options, progress
        self._quantizer = parts.quantizer
        self._saver = _saver(self._quantizer, parts.report["quantizer"].chosen.name)
        self._calibrates = any(isinstance(one, Calibrates) for one in _every(self._quantizer))
        self._dtype = getattr(torch, parts.precision.dtypes().param)

    def run(self, planned: Any) -> Path:
        options = self._options
        collect_as_usual()
        windows = self._windows() if self._calibrates else []
        self._parts.platform.activate()
        model = self._open_model()
        label = self._parts.report["quantizer"].chosen.name
        conversion = Conversion(self._quantizer, label, self._checkpoint)
        plan = self._plan(model, windows, conversion)
        planned(plan)
        folder = RunFolder(options.run_folder)
        folder.begin(self._fingerprint(windows), resume=options.resume)
        layers = LayerByLayer(
            model, conversion, self._parts.attention, self._parts.platform.device(), self._dtype, folder, self._progress
        )
        resumed = folder.num_finished()
        if self._calibrates:
            layers.calibrate(windows, plan)
        else:
            layers.round_all()
        layers.round_outer()
        if not resumed:  # of a resumed run, not every layer has been shown
            conversion.check_rules()
        self._write(folder)
        return options.out

    # --- before ------------------------------------------------------------------------------------------------------

    def _windows(self) -> list[list[int]]:
        """Windows of the text, drawn by the seed: as many as hold the wanted tokens, in an order of their own."""
        options, spec = self._options, self._parts.spec
        assert spec is not None
        if options.data is None:
            name = self._parts.report["quantizer"].chosen.name
            raise ConfigError(f"quantizer {name!r} is calibrated on a text", where="--data", hint="Name a UTF-8 file.")
        context = options.context or min(DEFAULT_CONTEXT, spec.max_position)
        wanted = options.num_tokens or DEFAULT_TOKENS
        if context > spec.max_position:
            raise ConfigError(
                "the model does not see as many tokens",
                where="--context",
                found=context,
                allowed=f"at most {spec.max_position}",
            )
        if wanted < max(_LEAST_TOKENS, context):
            raise ConfigError(
                "too few tokens to calibrate on",
                where="--tokens",
                found=wanted,
                allowed=f"{max(_LEAST_TOKENS, context)} or more: at least one window of {context}",
            )
        tokenizer = Tokenizer(self._checkpoint.tokenizer())
        ids = read_tokens(options.data, tokenizer, wanted, default=wanted, option="--tokens", most=_MOST_READ * wanted)
        opening = list(opening_of(tokenizer))
        size = context - len(opening)
        starts = list(range(0, len(ids) - size + 1, size))
        random.Random(options.seed).shuffle(starts)
        return [opening + ids[start : start + size] for start in starts[: max(1, wanted // context)]]

    def _open_model(self) -> LayeredModel:
        parts = self._parts
        name = parts.report["model"].chosen.name
        if not isinstance(parts.model, OpensLayers):
            raise ConfigError(
                f"the model plugin {name} does not open a model layer by layer",
                where="architecture",
                found=name,
                hint="Models that the plugin decoder builds can be quantized.",
            )
        selection = parts.report["kernels"]
        binder = KernelBinder(
            kernel_providers(parts.registry, parts.kernels, selection),
            is_auto=selection.requested == AUTO,
            record=parts.kernel_record,
            progress=self._progress,
        )
        context = BuildContext(parts.platform.device(), self._dtype, binder.bind, None, self._progress)
        return parts.model.open_layers(self._checkpoint, context)

    def _plan(self, model: LayeredModel, windows: Sequence[Sequence[int]], conversion: Conversion) -> CalibrationPlan:
        quantizers: dict[str, Quantizer] = {}
        for number in range(model.spec.num_layers):
            prefix = model.layer_name(number)
            names = [name for group in groups_of(model, number) for name in group.linears]
            quantizers |= {f"{prefix}.{name}": conversion.quantizer_for(f"{prefix}.{name}") for name in names}
        for name in model.outer_linears():
            chosen = conversion.quantizer_for(name)
            if not isinstance(chosen, Calibrates):
                quantizers[name] = chosen
        context = len(windows[0]) if windows else 0
        return make_plan(model, quantizers, len(windows), context, self._dtype, self._options.memory_bytes)

    def _fingerprint(self, windows: Sequence[Sequence[int]]) -> dict[str, Any]:
        """All that decides the bytes that come out."""
        checkpoint, report = self._checkpoint, self._parts.report
        shapes = [(name, checkpoint.shape(name)) for name in sorted(checkpoint.names())]
        return {
            "drivetrain": __version__,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "model": str(checkpoint.path.resolve()),
            "model files": _stamp(checkpoint.path),
            "model tensors": _digest([*shapes, dict(checkpoint.config)]),
            "quantizer": report["quantizer"].chosen.name,
            "quantizer options": self._quantizer.config.model_dump(mode="json"),
            "precision": str(self._dtype),
            "parts": {kind: report[kind].chosen.name for kind in ("platform", "attention", "kernels", "model")},
            "text": _digest(list(windows)),
            "windows": len(windows),
            "seed": self._options.seed,
        }

    # --- after -------------------------------------------------------------------------------------------------------

    def _write(self, folder: RunFolder) -> None:
        out = self._options.out
        if out.exists():  # and is empty
            out.rmdir()
        names = list(folder.finished())
        written = 0

        def packed() -> Iterator[tuple[str, PackedWeight]]:
            nonlocal written
            for name in names:
                yield from sorted(folder.load(name).packed.items())
                written += 1
                self._progress("writing", written, len(names), "layers")

        self._saver.save(out, self._checkpoint, packed(), ChangedTensors(folder), self._notes(), lambda *_: None)
        folder.remove()

    def _notes(self) -> dict[str, Any]:
        options = self._options
        if not self._calibrates:
            return {}
        text = {"tokens": options.num_tokens or DEFAULT_TOKENS, "seed": options.seed}
        return {"calibration": {"made_by": f"drivetrain {__version__}", **text}}


_MOST_READ = 8
"""How many times as many tokens are read of a text, at most, as are drawn from it."""


def _saver(quantizer: Quantizer, label: str) -> Saves:
    own = quantizer.base if isinstance(quantizer, RuledQuantizer) else quantizer
    if not isinstance(own, Saves):
        raise ConfigError(
            f"quantizer {label!r} writes no files",
            where="--quantizer",
            found=label,
            hint="It packs weights whenever a model is loaded: name it to drivetrain serve.",
        )
    return cast(Saves, own)


def _every(quantizer: Quantizer) -> list[Quantizer]:
    if isinstance(quantizer, RuledQuantizer):
        return [quantizer.base, *(rule.quantizer for rule in quantizer.rules)]
    return [quantizer]


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _stamp(path: Path) -> str:
    """Names, sizes and times of the files: what changes when somebody writes to them."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return _digest([(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()])
