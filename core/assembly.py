"""From settings to parts, and from parts to an engine: the one place where everything is put together.

``resolve_parts`` chooses, kind by kind, each probe seeing what is already chosen. ``build_engine`` then loads weights,
sizes the cache by the memory that is left, and returns an engine that is ready to step.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from drivetrain.config import Settings
from drivetrain.contracts.attention import FULL_KV, AttentionBackend
from drivetrain.contracts.frontend import Frontend
from drivetrain.contracts.kernels import BuildsAhead, KernelProvider
from drivetrain.contracts.kinds import KINDS
from drivetrain.contracts.loader import Checkpoint, Loader
from drivetrain.contracts.model import BuildContext, CausalLM, FindsMostLikely, Model, ModelSpec
from drivetrain.contracts.platform import CapturesPieces, PlacesWeights, Platform, SupportsGraphs
from drivetrain.contracts.plugin import Plugin, ProbeContext, Purpose
from drivetrain.contracts.precision import Precision
from drivetrain.contracts.quantizer import Quantizer, QuantizerConfig
from drivetrain.contracts.scheduler import Scheduler
from drivetrain.contracts.source import ListsNames, Progress, Source, silent
from drivetrain.errors import (
    ConfigError,
    FusionError,
    InvalidRequestError,
    KernelBuildError,
    LoaderError,
    ModelNotFoundError,
    NoCandidateError,
    PluginError,
    UnknownArchitectureError,
    nearest,
)
from drivetrain.kernel_record import KernelRecord, read_record
from drivetrain.observers import Observers
from drivetrain.quantizer_choice import note_of_packed_weights, prefer_quantizer
from drivetrain.registry import PartRequest, Plan, Registry, SelectionReport, Selector, load
from drivetrain.registry.lock import check_lock
from drivetrain.registry.selection import AUTO

if TYPE_CHECKING:
    from drivetrain.binding import KernelBinder
    from drivetrain.fusion import FusionReport
    from drivetrain.packed.ledger import Ledger
    from drivetrain.serving.cache_size import StepNeeds
    from drivetrain.serving.engine import Engine
    from drivetrain.serving.graphs import Capture
    from drivetrain.serving.master_copy import MasterCopy
    from drivetrain.serving.pieces import CapturePieces
    from drivetrain.serving.tokenizer import Tokenizer

_log = logging.getLogger("drivetrain")

_SAMPLING_DEFAULTS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@dataclass
class Parts:
    """The chosen plugin of each kind, and what they were told of the model.

    path, checkpoint, spec: None while the model is not named or not on this machine.
    notes:                  decisions of the core itself that a user should see.
    context, registry:      what the last probe saw, and what could be chosen from; a later exchange asks them again.
    kernel_record:          what was measured of kernels on this machine.
    """

    settings: Settings
    purpose: Purpose
    plugins: dict[str, Plugin]
    report: SelectionReport
    path: Path | None = None
    checkpoint: Checkpoint | None = None
    spec: ModelSpec | None = None
    notes: list[str] = field(default_factory=list)
    context: ProbeContext = field(default_factory=ProbeContext)
    registry: Registry = field(default_factory=lambda: Registry(()))
    kernel_record: KernelRecord = field(default_factory=KernelRecord)

    @property
    def plan(self) -> Plan:
        return Plan.of(self.report, model=self.settings.model, purpose=self.purpose)

    @property
    def platform(self) -> Platform:
        return cast(Platform, self.plugins["platform"])

    @property
    def precision(self) -> Precision:
        return cast(Precision, self.plugins["precision"])

    @property
    def model(self) -> Model:
        return cast(Model, self.plugins["model"])

    @property
    def quantizer(self) -> Quantizer:
        return cast(Quantizer, self.plugins["quantizer"])

    @property
    def attention(self) -> AttentionBackend:
        return cast(AttentionBackend, self.plugins["attention"])

    @property
    def kernels(self) -> KernelProvider:
        return cast(KernelProvider, self.plugins["kernels"])

    @property
    def scheduler(self) -> Scheduler:
        return cast(Scheduler, self.plugins["scheduler"])

    @property
    def frontend(self) -> Frontend:
        return cast(Frontend, self.plugins["frontend"])


def resolve_parts(
    settings: Settings,
    *,
    purpose: Purpose = Purpose.SERVE,
    registry: Registry | None = None,
    observers: Observers | None = None,
    progress: Progress = silent,
    fetch: bool = True,
    leave_out: Sequence[str] = (),
) -> Parts:
    """Choose one plugin for each kind that ``purpose`` needs.

    fetch:     download a model that is not here; otherwise the kinds that need its files stay open.
    leave_out: kinds that the caller does without (``frontend`` for the Python API).
    """
    registry = registry or Registry()
    if settings.lock is not None:
        check_lock(settings.lock)
    if settings.allow is not None:
        registry = registry.allowing(settings.allow)
    resolution = _Resolution(settings, purpose, registry, observers or Observers(installed=False), progress, fetch)
    for kind in KINDS.values():
        if purpose in kind.purposes and kind.name not in leave_out:
            resolution.resolve(kind.name)
        elif kind.name in settings.parts:
            resolution.selector.leave_open(kind.name, "nothing here needs it")
    parts = resolution.parts
    parts.report = resolution.selector.report
    parts.context = resolution.context
    parts.registry = registry
    return parts


class _Resolution:
    """One pass over the kinds; holds what later probes may see."""

    def __init__(
        self,
        settings: Settings,
        purpose: Purpose,
        registry: Registry,
        observers: Observers,
        progress: Progress,
        fetch: bool,
    ) -> None:
        self.selector = Selector(registry, settings.parts)
        self.parts = Parts(settings, purpose, {}, self.selector.report)
        self._registry = registry
        self._observers = observers
        self._progress = progress
        self._fetch = fetch
        self.context = ProbeContext(purpose=purpose, model_name=settings.model)

    def resolve(self, kind: str) -> None:
        settle = getattr(self, f"_settle_{kind}", None)
        reason = self._why_open(kind)
        if reason:
            self.selector.leave_open(kind, reason)
            return
        if kind == "quantizer":
            prefer_quantizer(self.selector, self._registry, self.parts.kernel_record, self.context)
        plugin = self._choose(kind)
        self.parts.plugins[kind] = plugin
        self._observers.notify("part_selected", selection=self.selector.report[kind])
        if settle:
            settle(plugin)

    def _why_open(self, kind: str) -> str | None:
        if kind == "source" and self.context.model_name is None:
            return "no model is named"
        if kind in ("loader", "model") and self.parts.path is None:
            return self.selector.open_kinds.get("source") or "the model's files are not on this machine"
        return None

    def _choose(self, kind: str) -> Plugin:
        try:
            return self.selector.choose(kind, self.context)
        except NoCandidateError as error:
            raise self._explained(kind, error) from error

    def _explained(self, kind: str, error: NoCandidateError) -> Exception:
        """Say what a missing candidate means for the kinds where users cause it."""
        name = self.context.model_name
        if kind == "source" and name is not None:
            known = [
                known
                for plugin in self._loaded("source")
                if isinstance(plugin, ListsNames)
                for known in plugin.known_names()
            ]
            close = nearest(name, known)
            return ModelNotFoundError(
                f"no model is named {name!r}",
                allowed="a folder, a .gguf file, org/name of the hub, pypi:DIST==VERSION/FILE, or a short name",
                hint=f"Did you mean {close!r}?" if close else f"Short names: {', '.join(known)}",
            )
        if kind == "loader":
            return LoaderError(
                "no loader recognizes these files",
                where=str(self.parts.path),
                allowed="a folder with config.json and *.safetensors, or a .gguf file",
            )
        if kind == "model" and self.parts.checkpoint is not None:
            return UnknownArchitectureError(
                f"no installed model plugin builds {self.parts.checkpoint.architecture}",
                where=str(self.parts.path),
                hint='Run: pip install "drivetrain[transformers]", which builds every other causal architecture.'
                if any("not installed" in text for text in [str(error)])
                else f"What each said: {error.what}",
            )
        return error

    def _loaded(self, kind: str) -> list[object]:
        plugins: list[object] = []
        for ref in self._registry.candidates(kind):
            try:
                plugins.append(load(ref))
            except PluginError:
                continue  # reported where candidates are probed; here only names are collected
        return plugins

    # --- what each choice tells the later ones ---------------------------------------------------------------------

    def _settle_platform(self, platform: Platform) -> None:
        facts = platform.facts()
        self.selector.prefer(platform.preferences)
        self.context = dataclasses.replace(self.context, platform=facts)
        self.parts.kernel_record = read_record(facts).current(self._registry.candidates("kernels"))

    def _settle_precision(self, precision: Precision) -> None:
        self.context = dataclasses.replace(self.context, dtype=precision.dtypes().param)
        rank_kernels(self.selector, self.parts.kernel_record, self.context)

    def _settle_source(self, source: Source) -> None:
        name = self.context.model_name
        assert name is not None
        path = source.locate(name)
        if path is None and self._fetch:
            path = source.fetch(name, self._progress)
        self.parts.path = path
        if path is not None:
            self.context = dataclasses.replace(self.context, path=str(path))

    def _settle_loader(self, loader: Loader) -> None:
        assert self.parts.path is not None
        self.parts.checkpoint = loader.open(self.parts.path)
        self.context = dataclasses.replace(self.context, checkpoint=self.parts.checkpoint)

    def _settle_model(self, model: Model) -> None:
        assert self.parts.checkpoint is not None
        self.parts.spec = model.describe(self.parts.checkpoint.config, self.context.dtype or "float32")
        self.context = dataclasses.replace(self.context, model=self.parts.spec)

    def _settle_quantizer(self, quantizer: Quantizer) -> None:
        self.context = with_kv(self.context, kv_format(quantizer))
        self.parts.spec = self.context.model
        origin = self.selector.request("quantizer").origin
        self.parts.plugins["quantizer"] = apply_rules(quantizer, self._registry, self.context, origin)
        note = note_of_packed_weights(self.selector, self.context)
        if note is not None:
            self.parts.notes.append(note)


def apply_rules(quantizer: Quantizer, registry: Registry, context: ProbeContext, origin: str) -> Quantizer:
    """``quantizer`` with the quantizers that its rules name, chosen and created like any part; itself without rules.

    origin: who asked for it. Raises PluginError and ConfigError that name the rule.
    """
    if not getattr(quantizer.config, "rules", None):
        return quantizer
    from drivetrain.packed.rules import with_rules

    def make(name: str, options: Mapping[str, Any], pattern: str) -> Quantizer:
        selector = Selector(registry, {"quantizer": PartRequest("quantizer", name, options, origin)})
        try:
            return cast(Quantizer, selector.choose("quantizer", context))
        except (PluginError, ConfigError) as error:
            below = (error.where or "").removeprefix(f"{origin}: quantizer")
            error.where = f"{origin}: quantizer.rules[{pattern}]{below}"
            raise

    return with_rules(quantizer, make, origin)


def kv_format(quantizer: Quantizer) -> str:
    """The format of keys and values that a quantizer was told to ask for."""
    return quantizer.config.kv if isinstance(quantizer.config, QuantizerConfig) else FULL_KV


def with_kv(context: ProbeContext, kv: str) -> ProbeContext:
    """The context with keys and values kept in this format, in the model's shape too."""
    model = context.model
    if model is not None:
        model = dataclasses.replace(model, attention=dataclasses.replace(model.attention, kv=kv))
    return dataclasses.replace(context, model=model, kv=kv)


def rank_kernels(selector: Selector, record: KernelRecord, context: ProbeContext) -> None:
    """Have kernel providers ranked by what was measured of them here, in the run's dtype."""
    if context.platform is None:  # left out by the caller, and nothing was measured of no platform
        return
    device_type, dtype = context.platform.device_type, context.dtype
    selector.rank_by("kernels", lambda ref: record.standing(ref.name, device_type, dtype), record.summary)


# --- the engine ----------------------------------------------------------------------------------------------------


@dataclass
class ServingStack:
    """A built engine and what stands around it.

    defaults: sampling defaults that the model's authors recommend, by SamplingParams field.
    needs:    what steps were found to take of the device's memory; None where that was not measured.
    """

    engine: Engine
    parts: Parts
    tokenizer: Tokenizer
    binder: KernelBinder
    max_model_len: int
    defaults: Mapping[str, Any]
    needs: StepNeeds | None = None

    def selection_dict(self) -> dict[str, Any]:
        """What was chosen, what was refused and why, with the plan's digest and the bound operations."""
        parts = self.parts
        return {
            **parts.report.to_dict(),
            "model": parts.settings.model,
            "plan_digest": parts.plan.digest,
            "weights": None if self.binder.ledger is None else self.binder.ledger.to_dict(),
            "bindings": self.binder.by_operation(),
            "fusion": None if self.binder.fusion is None else self.binder.fusion.to_dict(),
            "not_fused": self.binder.not_fused,
            "bound": self.binder.explained(),
            "epoch": self.engine.epoch,
            "notes": list(parts.notes),
            "sampling_defaults": dict(self.defaults),
        }


def build_engine(parts: Parts, *, observers: Observers | None = None, progress: Progress = silent) -> ServingStack:
    """Load the weights and make everything a step needs. Raises LoaderError, MemoryBudgetError, ..."""
    from drivetrain.binding import bind_sample
    from drivetrain.serving.cache_size import check_room, make_kv, size_cache
    from drivetrain.serving.engine import Engine, EngineLimits
    from drivetrain.serving.master_copy import check_kept
    from drivetrain.serving.metrics import EngineMetrics
    from drivetrain.serving.rehearsal import Performers, rehearse
    from drivetrain.serving.runner import ModelRunner
    from drivetrain.serving.tokenizer import Detokenizer, Tokenizer

    if parts.checkpoint is None or parts.spec is None:
        raise ConfigError("no model is named", hint="Give one with --model NAME, for example smollm2-135m.")
    defaults, end_tokens = sampling_defaults(parts.checkpoint), frozenset(parts.checkpoint.eos_token_ids)
    parts.platform.activate()
    build_attention(parts, progress)
    device = parts.platform.device()
    tokenizer = Tokenizer(parts.checkpoint.tokenizer())
    master = _keep_master_copy(parts)
    model, binder = build_model(parts, parts.kernels, parts.quantizer, progress)
    if master is not None:
        check_kept(master, parts.report["model"].chosen.name)
        parts.notes.append(f"a master copy of the weights takes {master.num_bytes / 2**20:.1f} MiB of host memory")
    parts.report = with_fallbacks(parts.report, binder)
    limits = parts.scheduler.limits()
    draw = bind_sample(binder, device.type, parts.spec.vocab_size)
    capture, capture_pieces = _capture(parts), _capture_pieces(parts)
    weight_bytes = None if binder.ledger is None else binder.ledger.total_bytes
    needs = rehearse(parts, Performers(model, draw, capture, capture_pieces, weight_bytes), limits, progress)
    max_model_len, num_blocks = size_cache(parts, limits, needs)
    kv = make_kv(parts, parts.attention, num_blocks, limits, max_model_len)
    metrics = EngineMetrics()
    metrics.fell_back(len(parts.report.fallbacks))
    engine = Engine(
        ModelRunner(
            model,
            parts.attention,
            num_blocks,
            device,
            capture,
            capture_pieces=capture_pieces,
            must_capture=parts.settings.engine.graphs == "on",
            spec=parts.spec.attention,
        ),
        kv,
        parts.scheduler,
        EngineLimits(max_model_len, parts.spec.vocab_size, end_tokens),
        parts.settings.engine,
        lambda prompt, skip_special: Detokenizer(tokenizer, prompt, skip_special),
        observers,
        metrics,
        draw=draw,
    )
    engine.runner.capture_ahead(progress)
    if needs is not None:
        check_room(parts, needs)
    return ServingStack(engine, parts, tokenizer, binder, max_model_len, defaults, needs)


def sampling_defaults(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the model's authors recommend, by SamplingParams field. Raises LoaderError for what no request could use."""
    from drivetrain.serving.types import SamplingParams

    found = {name: checkpoint.generation_config.get(name) for name in _SAMPLING_DEFAULTS}
    defaults = {name: value for name, value in found.items() if value is not None}
    try:
        SamplingParams(**defaults)
    except InvalidRequestError as error:
        raise LoaderError(
            f"the model's recommended sampling can't be used: {error.what}",
            where=str(checkpoint.path),
            found=error.found,
            hint=f"Mend {error.param} in generation_config.json, or remove it.",
        ) from error
    return defaults


def build_attention(parts: Parts, progress: Progress) -> None:
    """Have the attention backend compile what it needs. Under ``auto``, one that can't gives way to the next, which is
    a fallback; one that was named is an error (KernelBuildError)."""
    refs = list(parts.registry.refs)
    while isinstance(parts.attention, BuildsAhead):
        try:
            parts.attention.build_ahead(progress)
            return
        except KernelBuildError as error:
            failed = parts.report["attention"]
            if failed.requested != AUTO:
                raise
            refs.remove(failed.chosen)
            selector = Selector(Registry(refs, parts.registry.barred), parts.settings.parts)
            selector.prefer(parts.platform.preferences)
            parts.plugins["attention"] = selector.choose("attention", parts.report.contexts["attention"])
            parts.report = parts.report.with_selection(selector.report["attention"].in_place_of(failed, str(error)))
            _log.warning("fallback: %s", parts.report["attention"].fallback)


def _keep_master_copy(parts: Parts) -> MasterCopy | None:
    """Have every tensor stay in memory that is read from here on, where the settings ask for it."""
    if parts.settings.engine.master_copy == "none":
        return None
    import torch

    from drivetrain.serving.master_copy import MasterCopy, check_room

    assert parts.checkpoint is not None
    assert parts.spec is not None
    dtype = getattr(torch, parts.precision.dtypes().param)
    check_room(parts.spec.num_parameters, dtype)
    parts.checkpoint = master = MasterCopy(parts.checkpoint, dtype)
    return master


def build_model(
    parts: Parts,
    kernels: KernelProvider,
    quantizer: Quantizer | None,
    progress: Progress = silent,
    report: SelectionReport | None = None,
) -> tuple[CausalLM, KernelBinder]:
    """Build the model from its files with these kernels and this quantizer; also returns what was bound.

    quantizer: None for a model that is trained.
    report:    says who asked for ``kernels``; by default the parts' own.
    """
    import torch

    from drivetrain.binding import KernelBinder, kernel_providers
    from drivetrain.packed import bind_packed
    from drivetrain.packed.conversion import Conversion
    from drivetrain.packed.ledger import ledger_of

    assert parts.checkpoint is not None
    selection = (report or parts.report)["kernels"]
    binder = KernelBinder(
        kernel_providers(parts.registry, kernels, selection),
        is_auto=selection.requested == AUTO,
        record=parts.kernel_record,
        progress=progress,
    )
    dtype = getattr(torch, parts.precision.dtypes().param)
    device = parts.platform.device()
    if quantizer is None:
        model = parts.model.build(parts.checkpoint, BuildContext(device, dtype, binder.bind, None, progress))
        return model, binder
    conversion = Conversion(quantizer, (report or parts.report)["quantizer"].chosen.name, parts.checkpoint)
    model = parts.model.build(parts.checkpoint, BuildContext(device, dtype, binder.bind, conversion, progress))
    conversion.check_rules()
    note = conversion.note()
    if note is not None and note not in parts.notes:
        parts.notes.append(note)
    if isinstance(model, torch.nn.Module):
        binder.ledger = ledger_of(parts.model, model, conversion, parts.checkpoint)
    bind_packed(model, binder.bind, dtype)
    _place_weights(parts, model)
    binder.fusion = _fuse(parts, model, binder)
    if parts.settings.engine.screen_output and isinstance(model, FindsMostLikely):
        model.prepare_most_likely()
    return model, binder


def _place_weights(parts: Parts, model: CausalLM) -> None:
    """Have the platform keep the weights where it reads them fastest."""
    import torch

    if isinstance(parts.platform, PlacesWeights) and isinstance(model, torch.nn.Module):
        _log.debug("weights: %s", parts.platform.place_weights((*model.parameters(), *model.buffers())))


def weigh_model(parts: Parts, quantizer: Quantizer, report: SelectionReport | None = None) -> Ledger:
    """What the weights of the model will take with this quantizer. Reads and makes nothing large.

    report: says what ``quantizer`` is called; by default the parts' own.
    """
    import torch

    from drivetrain.packed.ledger import weigh

    assert parts.checkpoint is not None
    assert parts.spec is not None
    dtype = getattr(torch, parts.precision.dtypes().param)
    label = (report or parts.report)["quantizer"].chosen.name
    return weigh(parts.model, parts.checkpoint, parts.spec, dtype, quantizer, label)


def _fuse(parts: Parts, model: CausalLM, binder: KernelBinder) -> FusionReport | None:
    """Fuse as ``engine.fuse`` says. Under ``auto``, a model that can't be fused is used as it is, with a note.

    Only for serving: partitioners, optimizers and saved states know parameters by the names of the checkpoint.
    """
    from drivetrain.fusion import fuse_model

    wanted = parts.settings.engine.fuse
    if wanted is False or parts.purpose is not Purpose.SERVE:
        return None
    coarse = _runs_whole_layers(parts, binder)
    if coarse is not None and wanted is not True:
        binder.not_fused = f"the kernels of {coarse} run whole layers in one call"
        return None
    try:
        report = fuse_model(model, binder)
    except FusionError as error:
        if wanted is True:
            raise
        parts.notes.append(f"not fused: {error}")
        return None
    if report is None and wanted is True:
        raise FusionError(
            "the model is no torch module with an attention spec, so it can't be fused",
            where="engine.fuse",
            hint="Set engine.fuse to auto or false.",
        )
    # Under auto the selection report tells; a line at every start would be in the way.
    if wanted is True and report is not None and report.fused and report.summary() not in parts.notes:
        parts.notes.append(report.summary())
    return report


def _runs_whole_layers(parts: Parts, binder: KernelBinder) -> str | None:
    """The provider whose coarse kernel leaves nothing to fuse in a step; None where layers are called one by one."""
    if "opens_pages" not in type(parts.attention).abilities():
        return None
    providers = (b.provider for b in binder.bindings if b.spec.operation == "decoder_layers")
    return next((provider for provider in providers if provider != "reference"), None)


def with_fallbacks(report: SelectionReport, binder: KernelBinder) -> SelectionReport:
    """The report with what kernel providers failed to make as a fallback of the choice of kernels."""
    if not binder.fallbacks:
        return report
    kernels = report["kernels"]
    fallback = "; ".join(filter(None, (kernels.fallback, *binder.fallbacks)))
    return report.with_selection(dataclasses.replace(kernels, fallback=fallback))


def _capture(parts: Parts) -> Capture | None:
    """What records decode steps, if they are to be captured. Raises ConfigError when they must be and can't."""
    from drivetrain.serving.graphs import why_no_graphs

    setting = parts.settings.engine.graphs
    capture = parts.platform.capture if isinstance(parts.platform, SupportsGraphs) and setting != "off" else None
    reason = why_no_graphs(capture, parts.attention)
    if setting == "on" and reason is not None:
        raise ConfigError("decode steps can't be captured", where="engine.graphs", found=reason, allowed="auto or off")
    return capture


def _capture_pieces(parts: Parts) -> CapturePieces | None:
    """What records other steps in pieces, if there is anything."""
    if parts.settings.engine.graphs == "off" or not isinstance(parts.platform, CapturesPieces):
        return None
    return parts.platform.capture_pieces
