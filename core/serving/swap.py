"""The swap: parts of a running engine are exchanged between two steps, with requests in flight.

A transaction in four phases:

    prepare    choose, load, probe, create, allocate, warm: beside the live engine, which is not touched
    vote       every rank says yes, or nothing has changed (``drivetrain.serving.vote``)
    commit     between two steps, in the engine's thread: pointers flip, the epoch goes up by one
    probation  the next steps are watched for errors, numbers that are none, and stalls: finalize, or roll back

What becomes of keys and values follows from the contracts: an equal KV contract keeps them; full ones are scaled where
they are to be kept as int8 or fp8; otherwise token ids and sampler state are kept and the rest is computed anew, so
that what was rounded once never passes for full. A rolled back step is run again by the old parts, so that no
request ever sees it. A swap that is not finished when its time is up is given up: whatever it has changed until then
is rolled back.
"""

from __future__ import annotations

import dataclasses
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, cast

from drivetrain.assembly import (
    ServingStack,
    apply_rules,
    build_model,
    kv_format,
    rank_kernels,
    weigh_model,
    with_fallbacks,
    with_kv,
)
from drivetrain.binding import bind_sample
from drivetrain.config import EngineSettings, load_settings
from drivetrain.config.settings import PART_KEYS, TOP_LEVEL_KEYS
from drivetrain.contracts.attention import (
    FULL_KV,
    PAGED_BNGD,
    PAGED_SCALED,
    AttentionBackend,
    AttentionSpec,
    ConvertsCache,
    KVCache,
)
from drivetrain.contracts.kernels import KernelProvider
from drivetrain.contracts.model import CausalLM
from drivetrain.contracts.plugin import Plugin
from drivetrain.contracts.quantizer import Quantizer, QuantizerConfig
from drivetrain.contracts.scheduler import Scheduler
from drivetrain.errors import DrivetrainError, SwapError
from drivetrain.quantizer_choice import prefer_quantizer
from drivetrain.registry import PartRequest, Plan, Selection, SelectionReport, Selector
from drivetrain.serving.blocks import KVManager
from drivetrain.serving.cache_size import make_kv
from drivetrain.serving.engine import Engine, Probation
from drivetrain.serving.master_copy import Weights
from drivetrain.serving.text import NoText
from drivetrain.serving.types import FinishReason, GenerationRequest, SamplingParams
from drivetrain.serving.vote import Ballot, Voter, ask_all

if TYPE_CHECKING:
    from drivetrain.binding import KernelBinder

SWAPPABLE = ("attention", "kernels", "quantizer", "scheduler")
"""Kinds that a running engine can exchange."""

DEFAULT_PROBATION_STEPS = 8

_ALLOCATION_SECONDS = 0.1
"""What giving a cache back and making another takes of a pause: some tens of GB at the pace of a GPU's memory."""


class CacheFate(StrEnum):
    """What a swap does with the keys and values of requests in flight."""

    KEEP = "keep"
    CONVERT = "convert"
    RECOMPUTE = "recompute"


class SwapOutcome(StrEnum):
    """How a swap ended."""

    FINALIZED = "finalized"
    ROLLED_BACK = "rolled back"
    DRY_RUN = "dry run"


@dataclass(frozen=True)
class SwapReport:
    """What a swap did, or what it would do.

    changes:              kind -> (old plugin, new plugin).
    epoch:                the engine's epoch afterwards.
    extra_memory_bytes:   device memory of the new weights and caches, held beside the old ones between prepare and the
                          end of probation: to the byte what is made, known before it is. Of a cache that takes the old
                          one's place, what it has more than that.
    peak_memory_bytes:    the most memory beside the old parts that making them takes: a layer in full and packed form,
                          and what reading and packing need on the side.
    pause_seconds:        how long the step loop stood still at commit; for a dry run, what is expected.
    requests_kept:        requests in flight that went on with their keys and values.
    requests_recomputed:  requests in flight whose keys and values are computed anew.
    weights:              what the new model was built from; None where the model stays.
    reason:               why it was rolled back.
    """

    outcome: SwapOutcome
    changes: Mapping[str, tuple[str, str]]
    cache: CacheFate
    epoch: int
    extra_memory_bytes: int
    peak_memory_bytes: int
    pause_seconds: float
    requests_kept: int = 0
    requests_recomputed: int = 0
    prepare_seconds: float = 0.0
    weights: Weights | None = None
    reason: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass
class LiveParts:
    """Everything a swap may exchange, as the engine has it at one moment."""

    scheduler: Scheduler
    attention: AttentionBackend
    cache: KVCache | None
    spec: AttentionSpec
    kv: KVManager
    model: CausalLM
    binder: KernelBinder
    draw: Callable[..., Any] | None
    plugins: dict[str, Plugin]
    report: SelectionReport

    @classmethod
    def of(cls, stack: ServingStack) -> LiveParts:
        engine = stack.engine
        return cls(
            engine.scheduler,
            engine.runner.attention,
            engine.runner.cache,
            engine.runner.spec,
            engine.kv,
            engine.runner.model,
            stack.binder,
            engine.draw,
            dict(stack.parts.plugins),
            stack.parts.report,
        )

    def clear_cache_away(self, stack: ServingStack) -> int:
        """Let go of the live cache, so that another can take its place; returns how many running requests lost their
        keys and values. These are the parts that are live."""
        engine = stack.engine
        engine.drop_prefixes()
        lost = engine.preempt_all()
        engine.kv.take_copies()
        engine.runner.drop_cache()
        self.cache = None
        return lost

    def restore(self, stack: ServingStack) -> None:
        """Make these the engine's parts again. A cache that was cleared away is made anew, once nothing holds another
        any more."""
        if self.cache is None:
            stack.engine.runner.drop_cache()
            self.cache = stack.engine.runner.allocate(self.attention, self.spec, self.kv)
        self.install(stack, drops_prefixes=False)

    def install(self, stack: ServingStack, *, drops_prefixes: bool) -> int:
        """Make these the engine's parts; returns how many running requests lost their keys and values.

        Runs in the engine's thread, between two steps.
        """
        engine = stack.engine
        lost = 0
        if self.kv is not engine.kv:
            lost = engine.preempt_all()
        elif drops_prefixes:
            engine.drop_prefixes()
        assert self.cache is not None
        engine.runner.exchange(self.model, self.attention, self.cache, self.kv, self.spec)
        engine.exchange(self.scheduler, self.kv)
        engine.draw = self.draw
        stack.binder = self.binder
        stack.parts.plugins = dict(self.plugins)
        stack.parts.report = self.report
        stack.parts.context = with_kv(stack.parts.context, self.spec.kv)
        stack.parts.spec = stack.parts.context.model or stack.parts.spec
        return lost


class Phase(StrEnum):
    """How far a prepared swap has come."""

    PREPARED = "prepared"
    COMMITTED = "committed"
    SETTLED = "settled"
    WITHDRAWN = "withdrawn"


_Converter = Callable[[ServingStack, LiveParts], KVCache]
"""Makes the new parts' cache from the live one. Runs in the engine's thread, between two steps."""


@dataclass
class PreparedSwap:
    """Parts that are ready to be installed.

    epoch:       the engine's when they were prepared; they fit no other.
    converter:   makes the cache at commit, when the old one stands still.
    takes_place: whether the old cache goes before the new one is made: there is no room for both.
    """

    parts: LiveParts
    epoch: int
    changes: dict[str, tuple[str, str]]
    cache: CacheFate
    drops_prefixes: bool
    extra_memory_bytes: int
    peak_memory_bytes: int
    expected_pause_seconds: float
    converter: _Converter | None = None
    takes_place: bool = False
    weights: Weights | None = None
    prepare_seconds: float = 0.0
    done: threading.Event = field(default_factory=threading.Event)
    outcome: SwapReport | None = None
    failure: BaseException | None = None
    phase: Phase = Phase.PREPARED
    _moves: threading.Lock = field(default_factory=threading.Lock)

    def move(self, phase: Phase, *allowed: Phase) -> Phase | None:
        """Go on to ``phase`` from one of ``allowed``; returns where it came from, None when it is elsewhere.

        The engine's thread and whoever waits decide at the same time; the first one's move stands.
        """
        with self._moves:
            before = self.phase
            if before not in allowed:
                return None
            self.phase = phase
            return before

    @property
    def is_withdrawn(self) -> bool:
        return self.phase is Phase.WITHDRAWN


def read_parts(table: Mapping[str, Any], report: SelectionReport, *, origin: str) -> Mapping[str, PartRequest]:
    """Kind -> what is asked for, from a table as in a configuration file. Raises SwapError and ConfigError.

    A table without a name is about the part in use, which keeps its name and its other options.

    report: what is in use.
    origin: what to call the place that the table comes from.
    """
    settings = [key for key in table if key in TOP_LEVEL_KEYS and key not in PART_KEYS]
    if settings:
        raise SwapError("a running engine's settings stay as they are", found=settings[0], allowed=SWAPPABLE)
    named = {
        key: {"name": report[key].chosen.qualified, **report[key].options, **value}
        if key in SWAPPABLE and isinstance(value, Mapping) and "name" not in value
        else value
        for key, value in table.items()
    }
    return load_settings(None, named, origin=origin).parts


def check_kinds(requests: Iterable[str]) -> None:
    """Raise SwapError unless every kind can be exchanged while serving."""
    for kind in requests:
        if kind not in SWAPPABLE:
            raise SwapError(f"a running engine can't exchange its {kind}", found=kind, allowed=SWAPPABLE)
    if not requests:
        raise SwapError("nothing to exchange is named", allowed=SWAPPABLE)


# --- prepare -------------------------------------------------------------------------------------------------------


def prepare(stack: ServingStack, requests: Mapping[str, PartRequest], *, dry_run: bool = False) -> PreparedSwap:
    """Choose and make the new parts beside the live ones. Raises PluginError, ConfigError, SwapError, ...

    dry_run: stop before anything large is made; the result says what it would take.
    """
    started = time.perf_counter()
    check_kinds(requests)
    epoch = stack.engine.epoch
    chosen, selections = _choose(stack, requests)
    live = LiveParts.of(stack)
    new = dataclasses.replace(live, plugins={**live.plugins, **chosen}, report=_merged(live.report, selections))
    if "scheduler" in chosen:
        new.scheduler = cast(Scheduler, chosen["scheduler"])
    if "attention" in chosen:
        new.attention = cast(AttentionBackend, chosen["attention"])
    new.spec = dataclasses.replace(live.spec, kv=kv_format(cast(Quantizer, new.plugins["quantizer"])))
    _check_kv(new)
    fate, extra, takes_place = _settle_cache(stack, live, new, dry_run)
    weights, peak = None, extra
    has_new_weights = "quantizer" in chosen and not _quantizes_alike(live.plugins["quantizer"], chosen["quantizer"])
    if "kernels" in chosen or has_new_weights:
        assert stack.parts.checkpoint is not None
        weights = Weights.of(stack.parts.checkpoint)
        kept, most = _settle_model(stack, live, new, dry_run)
        extra, peak = extra + kept, peak + most
    _check_limits(stack, new)
    prepared = PreparedSwap(
        new,
        epoch,
        {s.kind: (live.report[s.kind].chosen.name, s.chosen.name) for s in selections},
        fate,
        drops_prefixes="quantizer" in chosen,  # other weights, or other keys, give other ones
        extra_memory_bytes=extra,
        peak_memory_bytes=peak,
        expected_pause_seconds=_expected_pause(stack.engine, fate) + takes_place * _ALLOCATION_SECONDS,
        weights=weights,
        takes_place=takes_place,
    )
    if takes_place:
        prepared.converter = _allocate
    elif fate is CacheFate.CONVERT:
        prepared.converter = _converter(live, new)
    if not dry_run:
        _warm(stack, new)
    prepared.prepare_seconds = time.perf_counter() - started
    return prepared


def _choose(stack: ServingStack, requests: Mapping[str, PartRequest]) -> tuple[dict[str, Plugin], list[Selection]]:
    """Select and create the named parts, in the order of the kinds, as a start would."""
    parts = stack.parts
    live = parts.report["kernels"]
    kept = PartRequest("kernels", live.requested, live.options, live.origin)
    selector = Selector(parts.registry, {"kernels": kept, **requests})
    selector.prefer(parts.platform.preferences)
    rank_kernels(selector, parts.kernel_record, parts.context)
    prefer_quantizer(selector, parts.registry, parts.kernel_record, parts.context)
    names = parts.report.chosen_names
    context = dataclasses.replace(parts.context, chosen={k: v for k, v in names.items() if k not in requests})
    chosen: dict[str, Plugin] = {}
    for kind in names:
        if kind in requests:
            chosen[kind] = selector.choose(kind, context)
            if kind == "quantizer":
                quantizer, origin = cast(Quantizer, chosen[kind]), requests[kind].origin
                chosen[kind] = apply_rules(quantizer, parts.registry, context, origin)
                context = with_kv(context, kv_format(quantizer))
    return chosen, list(selector.report.selections)


def _merged(report: SelectionReport, selections: list[Selection]) -> SelectionReport:
    new = {selection.kind: selection for selection in selections}
    return dataclasses.replace(report, selections=tuple(new.get(s.kind, s) for s in report.selections))


def _check_kv(new: LiveParts) -> None:
    """Raise SwapError when the attention backend can't keep keys and values as the quantizer wants them."""
    known = sorted(name.removeprefix("kv_") for name in new.attention.abilities() if name.startswith("kv_"))
    if new.spec.kv != FULL_KV and new.spec.kv not in known:
        raise SwapError(
            f"the attention backend {new.report['attention'].chosen.name} does not keep keys and values that way",
            where="quantizer.kv",
            found=new.spec.kv,
            allowed=(FULL_KV, *known),
            hint="Name another attention in the same swap.",
        )


def _quantizes_alike(old: Plugin, new: Plugin) -> bool:
    """Whether both make the same weights: they are of one class and differ in the format of keys and values at most."""
    from drivetrain.packed.rules import RuledQuantizer

    classes = {type(part.base if isinstance(part, RuledQuantizer) else part) for part in (old, new)}
    if len(classes) > 1 or not isinstance(new.config, QuantizerConfig):
        return False
    return bool(old.config.model_copy(update={"kv": new.config.kv}) == new.config and old.config != new.config)


def _settle_cache(stack: ServingStack, live: LiveParts, new: LiveParts, dry_run: bool) -> tuple[CacheFate, int, bool]:
    """Keep the cache where the contracts are equal; otherwise make an empty one for as many tokens, beside the old one
    or, where memory has no room for both, at commit in its place.

    Returns what becomes of keys and values, the bytes that are held beside the old ones, and whether the new cache
    takes the old one's place.
    """
    ours, theirs = new.attention.kv_contract(new.spec), live.attention.kv_contract(live.spec)
    if (new.attention is live.attention and new.spec == live.spec) or ours == theirs:
        return CacheFate.KEEP, 0, False
    counts = [-(-pool.total * theirs.block_size // ours.block_size) for pool in live.kv.pools]
    extra = sum(
        count * new.attention.bytes_per_block(new.spec, group)
        for count, group in zip(counts, new.spec.groups, strict=True)
    )
    old = sum(
        pool.total * live.attention.bytes_per_block(live.spec, group)
        for pool, group in zip(live.kv.pools, live.spec.groups, strict=True)
    )
    takes_place = not _has_room(stack, extra)
    if takes_place:
        _check_room(stack, extra - old)
        new.kv = make_kv(stack.parts, new.attention, counts, new.scheduler.limits(), stack.max_model_len, new.spec)
        new.cache = None
        return CacheFate.RECOMPUTE, max(0, extra - old), True
    if ours.block_size == theirs.block_size and _converter(live, new) is not None:
        return CacheFate.CONVERT, extra, False
    if not dry_run:
        new.kv = make_kv(stack.parts, new.attention, counts, new.scheduler.limits(), stack.max_model_len, new.spec)
        new.cache = stack.engine.runner.allocate(new.attention, new.spec, new.kv)
    return CacheFate.RECOMPUTE, extra, False


def _converter(live: LiveParts, new: LiveParts) -> _Converter | None:
    """What makes the new cache from the live one: the new backend itself, or the core from full keys to scaled ones.

    The other way, numbers that were rounded would go on as if they were full, in cached prefixes too.
    """
    ours, theirs = new.attention.kv_contract(new.spec), live.attention.kv_contract(live.spec)
    if ours.layout == PAGED_SCALED:
        return _scale if theirs.layout == PAGED_BNGD else None
    is_able = isinstance(new.attention, ConvertsCache) and new.attention.converts_from(theirs)
    return _convert if is_able else None


def _allocate(stack: ServingStack, new: LiveParts) -> KVCache:
    """An empty cache, where the old one was."""
    return stack.engine.runner.allocate(new.attention, new.spec, new.kv)


def _convert(stack: ServingStack, new: LiveParts) -> KVCache:
    """The live cache in the new backend's layout."""
    engine = stack.engine
    runner, pools = engine.runner, engine.kv.pools
    engine.runner.copy_blocks(engine.kv)
    return cast(ConvertsCache, new.attention).convert(
        new.spec,
        runner.attention.kv_contract(runner.spec),
        runner.cache,
        runner.blocks_to_allocate([pool.total for pool in pools]),
        [pool.live_blocks() for pool in pools],
        runner.device,
    )


def _scale(stack: ServingStack, new: LiveParts) -> KVCache:
    """The live cache's numbers in small, with scales."""
    from drivetrain.pages import scaled_cache

    engine = stack.engine
    runner, pools = engine.runner, engine.kv.pools
    engine.runner.copy_blocks(engine.kv)
    num_blocks = runner.blocks_to_allocate([pool.total for pool in pools])
    made = new.attention.allocate(new.spec, num_blocks, runner.device)
    scaled_cache(made, runner.cache, new.spec, [pool.live_blocks() for pool in pools])
    return made


def _settle_model(stack: ServingStack, live: LiveParts, new: LiveParts, dry_run: bool) -> tuple[int, int]:
    """A second model beside the first, from the checkpoint: what a quantizer has made is never quantized again.

    Returns the bytes that it keeps of its own, and the most that making it takes.
    """
    quantizer = cast(Quantizer, new.plugins["quantizer"])
    spec = stack.parts.spec
    assert spec is not None
    # Counted before anything is made: what does not fit its rules or its groups is an error here.
    ledger = weigh_model(stack.parts, quantizer, new.report)
    kept = ledger.total_bytes
    _check_room(stack, ledger.peak_bytes)
    if not dry_run:
        kernels = cast(KernelProvider, new.plugins["kernels"])
        new.model, new.binder = build_model(stack.parts, kernels, quantizer, report=new.report)
        new.draw = bind_sample(new.binder, stack.engine.runner.device.type, spec.vocab_size)
        new.report = with_fallbacks(new.report, new.binder)
        if quantizer is live.plugins["quantizer"]:
            kept = share_parameters(live.model, new.model)
        elif new.binder.ledger is not None:
            kept = new.binder.ledger.total_bytes
    return kept, ledger.peak_bytes


def _stored(model: CausalLM) -> dict[str, Any]:
    """Parameters and buffers themselves. A state dict would list the views that a fusion hands out in their place."""
    module = cast(Any, model)
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def share_parameters(old: CausalLM, new: CausalLM) -> int:
    """Let a model with the same weights use the old one's memory; returns the bytes that it still has of its own."""
    theirs = _stored(old)
    own = 0
    for name, tensor in _stored(new).items():
        other = theirs.get(name)
        if other is not None and other.shape == tensor.shape and other.dtype == tensor.dtype:
            tensor.data = other.data
        else:
            own += tensor.numel() * tensor.element_size()
    return own


def _check_limits(stack: ServingStack, new: LiveParts) -> None:
    limits = new.scheduler.limits()
    if not new.kv.fits(stack.max_model_len, limits.max_batched_tokens):
        raise SwapError(
            f"{stack.max_model_len} tokens, {limits.max_batched_tokens} at a time, would not fit the cache",
            hint="Give a smaller max_batched_tokens.",
        )
    needs = stack.needs
    if needs is not None and (step_bytes := needs.step_bytes_within(limits)) > needs.step_bytes:
        free = stack.parts.platform.memory().free_bytes
        if step_bytes > free:
            raise SwapError(
                f"a step of {limits.max_batched_tokens} tokens of up to {limits.max_running} requests would take "
                f"{step_bytes / 2**20:.1f} MiB beside the weights and the cache, and {free / 2**20:.1f} MiB are free",
                hint="Give a smaller max_batched_tokens or max_running, or start with a smaller engine.kv_memory.",
            )


def _check_room(stack: ServingStack, num_bytes: int) -> None:
    """Raise SwapError where steps would find too little memory while new parts of this size are made beside the old.

    Only where it is known what steps take: there the cache was given what they leave."""
    if stack.needs is not None and not _has_room(stack, num_bytes):
        free = stack.parts.platform.memory().free_bytes
        raise SwapError(
            f"the new parts take {num_bytes / 2**20:.1f} MiB beside the old ones and a step "
            f"{stack.needs.step_bytes / 2**20:.1f}, and {free / 2**20:.1f} MiB are free",
            hint="Start with an engine.kv_memory that leaves room for swaps.",
        )


def _has_room(stack: ServingStack, num_bytes: int) -> bool:
    """Whether so much can be made beside what there is, and a step be computed."""
    step_bytes = 0 if stack.needs is None else stack.needs.step_bytes
    return num_bytes <= stack.parts.platform.memory().free_bytes - step_bytes


def _expected_pause(engine: Engine, fate: CacheFate) -> float:
    """Seconds. Flipping pointers takes well under a millisecond; taking back blocks grows with what is running, and
    converting with the bytes that are in use, at a memory's pace of some 2 GB/s for read and write together."""
    if fate is CacheFate.CONVERT:
        runner = engine.runner
        groups = zip(runner.spec.groups, engine.kv.pools, strict=True)
        live = sum(
            len(pool.live_blocks()) * runner.attention.bytes_per_block(runner.spec, group) for group, pool in groups
        )
        return 0.001 + live / 2e9
    return 0.001 if fate is CacheFate.KEEP else 0.001 + 0.0005 * engine.num_running


def _warm(stack: ServingStack, new: LiveParts) -> None:
    """Run a small request through the new parts on a cache of its own: kernels compile, and a fault shows here."""
    from drivetrain.serving.runner import ModelRunner

    engine = stack.engine
    contract = new.attention.kv_contract(new.spec)
    limits = new.scheduler.limits()
    length = min(8, stack.max_model_len)
    blocks = [-(-length // contract.block_size) + 1 for _ in new.spec.groups]
    runner = ModelRunner(new.model, new.attention, blocks, engine.runner.device, spec=new.spec)
    kv = make_kv(stack.parts, new.attention, blocks, limits, length, new.spec)
    settings = EngineSettings(prefix_cache=False)
    limits_of_scratch = dataclasses.replace(engine.limits, max_model_len=length)
    scratch = Engine(runner, kv, new.scheduler, limits_of_scratch, settings, lambda prompt, skip: NoText())
    params = SamplingParams(max_tokens=max(1, length - 3), temperature=0, ignore_eos=True)
    scratch.add("warm", GenerationRequest((), params), [0] * max(1, min(3, length - 1)))
    while scratch.has_work:
        for chunk in scratch.step():
            if chunk.finish_reason is FinishReason.ERROR:
                raise SwapError(f"the new parts failed when they were warmed up: {chunk.error}")


# --- commit and probation ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OwnVote:
    """This process's rank."""

    stack: ServingStack
    prepared: PreparedSwap

    def vote(self, ballot: Ballot) -> str | None:
        if self.stack.engine.epoch != ballot.epoch:
            return f"the engine is at epoch {self.stack.engine.epoch}, and the parts were prepared for {ballot.epoch}"
        return None


def put_to_the_vote(
    stack: ServingStack, prepared: PreparedSwap, peers: Mapping[str, Voter], deadline_seconds: float
) -> None:
    """Ask this rank and ``peers``. Raises SwapError unless all say yes."""
    settings = stack.parts.settings
    plan = Plan.of(prepared.parts.report, model=settings.model, purpose=stack.parts.purpose)
    ballot = Ballot(prepared.changes, prepared.epoch, plan.digest)
    refusals = ask_all({"rank 0": OwnVote(stack, prepared), **peers}, ballot, deadline_seconds)
    if refusals:
        reasons = "; ".join(f"{name}: {why}" for name, why in refusals.items())
        raise SwapError(f"not every rank agrees, and nothing has changed ({reasons})")


def commit(
    stack: ServingStack, prepared: PreparedSwap, probation_steps: int, tell: Callable[[SwapReport], None]
) -> None:
    """Install the prepared parts and put them on probation. Runs in the engine's thread, with the engine settled.

    ``prepared.done`` is set once it is finalized or rolled back. Whatever is raised in between is undone first.

    tell: told the report of a swap that was withdrawn after the commit, for which nobody waits any more.
    """
    engine = stack.engine
    if prepared.move(Phase.COMMITTED, Phase.PREPARED) is None:
        return
    if engine.epoch != prepared.epoch:
        _fail(prepared, SwapError("the parts have been exchanged since these were prepared", hint="Try again."))
        return
    assert engine.is_settled, "a step is under way"
    before = LiveParts.of(stack)
    started = time.perf_counter()
    running = engine.num_running
    lost = 0
    try:
        if prepared.takes_place:
            lost = before.clear_cache_away(stack)
        if prepared.converter is not None:
            prepared.parts.cache = prepared.converter(stack, prepared.parts)
        lost += prepared.parts.install(stack, drops_prefixes=prepared.drops_prefixes)
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # what was made before it failed
        prepared.parts.cache = None
        before.restore(stack)
        _fail(prepared, error)
        if not isinstance(error, Exception):
            raise
        return
    engine.epoch += 1
    pause = time.perf_counter() - started

    def roll_back() -> None:
        engine.recompute_all()
        prepared.parts.cache = None
        before.restore(stack)
        engine.epoch += 1

    def finish(reason: str | None) -> None:
        prepared.outcome = SwapReport(
            SwapOutcome.FINALIZED if reason is None else SwapOutcome.ROLLED_BACK,
            prepared.changes,
            prepared.cache,
            engine.epoch,
            prepared.extra_memory_bytes,
            prepared.peak_memory_bytes,
            pause,
            running - lost,
            lost,
            prepared.prepare_seconds,
            prepared.weights,
            reason,
        )
        if prepared.move(Phase.SETTLED, Phase.COMMITTED) is None and prepared.is_withdrawn:
            tell(prepared.outcome)
        prepared.done.set()

    def keep() -> bool:
        return prepared.move(Phase.SETTLED, Phase.COMMITTED) is not None

    engine.probation = Probation(probation_steps, roll_back, finish, lambda: prepared.is_withdrawn, keep)
    if probation_steps == 0:
        engine.end_probation()


def _fail(prepared: PreparedSwap, error: BaseException) -> None:
    prepared.failure = error
    prepared.move(Phase.SETTLED, Phase.COMMITTED)
    prepared.done.set()


def wait_for(prepared: PreparedSwap, is_alive: Callable[[], bool], deadline_seconds: float) -> SwapReport:
    """Wait for the end of a committed swap, until ``deadline_seconds`` of ``time.monotonic``.

    Raises SwapError when it was undone, when the engine is gone, or when the time is up: then the commit does not take
    place any more, or the old parts come back as soon as the engine's step returns.
    """
    while not prepared.done.wait(min(0.1, max(0.001, deadline_seconds - time.monotonic()))):
        if not is_alive():
            raise SwapError("the engine stopped before the swap was finished")
        if time.monotonic() >= deadline_seconds:
            _withdraw(prepared)
    if prepared.failure is not None:
        error = prepared.failure
        what = str(error) if isinstance(error, DrivetrainError) else f"{type(error).__name__}: {error}"
        raise SwapError(f"the commit failed and was undone: {what}") from error
    assert prepared.outcome is not None
    return prepared.outcome


def _withdraw(prepared: PreparedSwap) -> None:
    """Give the swap up and raise SwapError, unless it has settled in this very moment."""
    hint = "Look at the server's health: a step may be stalled. engine.swap_timeout_seconds sets the limit."
    before = prepared.move(Phase.WITHDRAWN, Phase.PREPARED, Phase.COMMITTED)
    if before is Phase.PREPARED:
        raise SwapError("the engine came to no step boundary in time; nothing has changed", hint=hint)
    if before is Phase.COMMITTED:
        raise SwapError(
            "the new parts did not pass their probation in time; the old ones come back at the end of the step",
            hint=hint,
        )
