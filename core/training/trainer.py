"""From settings to a trained model: what is put together for a run, and what happens around its steps."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from drivetrain.assembly import Parts, build_attention, build_model, resolve_parts, with_fallbacks
from drivetrain.config import Settings, load_settings
from drivetrain.contracts.checkpoint import CheckpointPolicy
from drivetrain.contracts.kinds import KINDS
from drivetrain.contracts.optimizer import NamedParameters, Optimizer
from drivetrain.contracts.partitioner import Partitioner
from drivetrain.contracts.plugin import Purpose
from drivetrain.contracts.recipe import Recipe, RecipeContext, Samples
from drivetrain.contracts.source import Progress, silent
from drivetrain.contracts.store import Store
from drivetrain.errors import ConfigError, StateNotFoundError
from drivetrain.observers import Observers
from drivetrain.registry import Registry
from drivetrain.registry.plan import check_handshake
from drivetrain.training.claim import claimed
from drivetrain.training.export import export_model
from drivetrain.training.forward import ModelForward
from drivetrain.training.order import SampleOrder, StepShape
from drivetrain.training.prepared import Prepared
from drivetrain.training.ranks import Ranks, joined_ranks, known_to_all_ranks, num_machines, open_platform
from drivetrain.training.run import StepResult, TrainingRun
from drivetrain.training.saving import RunState, check_place, newest_step, saved_batch
from drivetrain.training.schedule import Schedule
from drivetrain.training.tracking import Trackers
from drivetrain.training.units import shard_units

if TYPE_CHECKING:
    from drivetrain.binding import KernelBinder
    from drivetrain.training.pulse import Pulse

_BEFORE_RANKS = ("platform",)
"""Kinds that are resolved before the ranks meet: they tell how to meet."""


@dataclass(frozen=True)
class TrainingResult:
    """What a run came to.

    folder: of the trained model; None where it was not exported.
    steps:  made by this process and those before it.
    losses: of the steps that this process made.
    """

    folder: Path | None
    steps: int
    losses: tuple[float, ...]


class Trainer:
    """Trains a model as a configuration says.

    Usage: ``Trainer(model="smollm2-135m", recipe={"name": "sft", "data": "chats.jsonl"}).run()``. Keyword arguments are
    the configuration's top-level keys.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        config: Path | str | None = None,
        assignments: Sequence[str] = (),
        progress: Progress = silent,
        observers: Iterable[object] = (),
        **options: Any,
    ) -> None:
        settings = load_settings(config, {"model": model, **options}, assignments, origin="argument")
        self._set(settings, progress=progress, observers=observers)

    @classmethod
    def from_settings(
        cls,
        settings: Settings,
        *,
        progress: Progress = silent,
        observers: Iterable[object] = (),
        note: Callable[[str], None] | None = None,
        registry: Registry | None = None,
        pulse: Pulse | None = None,
    ) -> Trainer:
        """A trainer for settings that are checked already. ``note`` is called with sentences that users should see;
        ``pulse`` beats with each step."""
        trainer = cls.__new__(cls)
        trainer._set(settings, progress=progress, observers=observers, note=note, registry=registry, pulse=pulse)
        return trainer

    def _set(
        self,
        settings: Settings,
        *,
        progress: Progress,
        observers: Iterable[object],
        note: Callable[[str], None] | None = None,
        registry: Registry | None = None,
        pulse: Pulse | None = None,
    ) -> None:
        self.settings = settings
        self._pulse = pulse
        self._progress = progress
        self._observers = Observers()
        for observer in observers:
            self._observers.register(observer)
        self._note = note or (lambda text: None)
        self._registry = registry

    def run(self, on_step: Callable[[StepResult, int], None] | None = None) -> TrainingResult:
        """Train to the end. Every rank of a run calls it.

        on_step: told of each step, on rank 0, with the number of steps of the whole run.

        Raises ConfigError, DataError, StoreError, NonFiniteError, ...: on every rank, before anything that was saved is
        touched.
        """
        with self.assembled() as work:
            return work.train(on_step, self._pulse)

    @contextmanager
    def assembled(self) -> Iterator[Assembled]:
        """The run, ready for its first step, with the ranks joined."""
        settings = self.settings
        if settings.model is None:
            raise ConfigError("no model is named", hint="Give one with model: NAME, for example smollm2-135m.")
        self._observers.notify("config_settled", settings=settings)
        others = [kind for kind in KINDS if kind not in _BEFORE_RANKS]
        first = resolve_parts(settings, purpose=Purpose.TRAIN, registry=self._registry, leave_out=others)
        platform = open_platform(first.platform)
        with joined_ranks(platform.device(), platform.facts().collective, settings.trainer.timeout_seconds) as ranks:
            parts = ranks.together("choosing parts", self._resolve)
            parts.plugins["platform"] = platform
            plans = ranks.gather(parts.plan.to_json())
            ranks.together("comparing plans", lambda: check_handshake(parts.plan, plans[0], who="rank 0"))
            is_restart = any(ranks.gather(self._pulse is not None and self._pulse.is_restart))
            assembly = Assembly(parts, ranks, self._observers, self._note, self._progress, is_restart=is_restart)
            yield assembly.assembled()

    def _resolve(self) -> Parts:
        return resolve_parts(
            self.settings,
            purpose=Purpose.TRAIN,
            registry=self._registry,
            observers=self._observers,
            progress=self._progress,
        )


class Assembly:
    """Puts a run together, one part after the other. What only one rank may fail at is done by all of them together;
    where ranks exchange tensors, all of them fail alike or not at all.

    is_restart: the agent has started the processes anew, so that the newest state is of this very run.
    """

    is_restart = False

    def __init__(
        self,
        parts: Parts,
        ranks: Ranks,
        observers: Observers,
        note: Callable[[str], None],
        progress: Progress,
        *,
        is_restart: bool = False,
    ) -> None:
        self.parts, self.ranks, self.is_restart = parts, ranks, is_restart
        self.observers = observers
        self.note = note if ranks.is_first else (lambda text: None)
        self.progress = progress if ranks.is_first else silent
        self.settings = parts.settings.trainer
        self.optimizer = cast(Optimizer, parts.plugins["optimizer"])
        self.partitioner = cast(Partitioner, parts.plugins["partitioner"])
        self.recipe = cast(Recipe, parts.plugins["recipe"])
        self.store = cast(Store, parts.plugins["store"])

    def assembled(self) -> Assembled:
        ranks = self.ranks
        ranks.together("checking the parts", self._check_parts)
        samples = ranks.together("reading the data", self._open_data)
        digests = ranks.gather(samples.digest)
        ranks.together("comparing the data", lambda: _check_same_data(digests, ranks.rank))
        model, binder = ranks.together("loading the model", self._load_model)
        with known_to_all_ranks():
            return self._prepared(samples, model, binder)

    def _prepared(self, samples: Samples, model: torch.nn.Module, binder: KernelBinder) -> Assembled:
        """The run over a model that is loaded; what fails here fails on every rank."""
        ranks, parts = self.ranks, self.parts
        shape = self._step_shape()
        steps = self._num_steps(len(samples), shape)
        if shape.batch > len(samples):
            self.note(f"a step of {shape.batch} samples takes some of the {len(samples)} that there are several times")
        schedule = Schedule(self.optimizer.config.schedule, steps)
        self._measure_policy(model, samples, shape)
        torch.manual_seed(self.settings.seed + ranks.rank)
        prepared = Prepared(
            model,
            self._make_optimizer,
            partitioner=self.partitioner,
            checkpoint=cast(CheckpointPolicy, parts.plugins["checkpoint"]),
            dtypes=parts.precision.dtypes(),
            ranks=ranks,
            clip_norm=self.settings.clip_norm,
            schedule=schedule,
        )
        for text in self.partitioner.notes:
            self.note(text)
        assert parts.spec is not None
        forward = ModelForward(prepared.model, parts.attention, parts.spec.attention)
        order = SampleOrder(len(samples), self.settings.seed, self.settings.shuffle)
        run = TrainingRun(prepared, self.recipe, samples, forward, order, shape, steps, ranks, parts.platform)
        described = {
            "batch": shape.batch,
            "sizes": self._asked_sizes(),
            "world_size": ranks.world_size,
            "schedule": {**schedule.config.model_dump(mode="json"), "steps": steps},
            "plan": json.loads(parts.plan.to_json()),
        }
        state = RunState(self.store, prepared, ranks, self._identity(samples), self.observers, described)
        trackers = ranks.together("making the trackers", lambda: Trackers(parts, Path(self.settings.folder), ranks))
        work = Assembled(parts, binder, run, state, trackers, self.note)
        self._resume(work)
        return work

    # --- what is checked, read and loaded ----------------------------------------------------------------------------

    def _check_parts(self) -> None:
        check_place(self.store.folder)
        quantizer = self.parts.report["quantizer"].chosen.name
        if quantizer != "none":
            raise ConfigError("quantized weights can't be trained", where="quantizer", found=quantizer, allowed="none")
        if "cuts_parameters" in self.partitioner.abilities() and "elementwise" not in self.optimizer.abilities():
            chosen = self.parts.report.chosen_names
            raise ConfigError(
                f"the optimizer {chosen['optimizer']!r} works on whole matrices, which the partitioner "
                f"{chosen['partitioner']!r} would cut",
                where="optimizer",
                hint="Use an optimizer that works element by element (adamw, lion), or another partitioner.",
            )

    def _open_data(self) -> Samples:
        parts = self.parts
        assert parts.checkpoint is not None
        assert parts.spec is not None
        ends = parts.checkpoint.eos_token_ids
        context = RecipeContext(
            tokenizer=parts.checkpoint.tokenizer(),
            vocab_size=parts.spec.vocab_size,
            max_position=parts.spec.max_position,
            eos_token_id=ends[0] if ends else None,
            note=self.note,
        )
        return self.recipe.open(context)

    def _load_model(self) -> tuple[Any, KernelBinder]:
        build_attention(self.parts, self.progress)
        model, binder = build_model(self.parts, self.parts.kernels, None, self.progress)
        self.parts.report = with_fallbacks(self.parts.report, binder)
        return cast(Any, model).train(), binder

    def _measure_policy(self, model: torch.nn.Module, samples: Samples, shape: StepShape) -> None:
        """Say what the checkpoint policy saves and costs, on the first micro-batch. One process alone measures: where
        there are several, the model may be too large for one."""
        from drivetrain.training.activations import compared, measure_policy

        parts = self.parts
        chosen = parts.report["checkpoint"].chosen.name
        if chosen == "none" or self.ranks.world_size > 1 or not self.settings.measure_checkpoint:
            return
        assert parts.spec is not None
        forward = ModelForward(model, parts.attention, parts.spec.attention)
        order = SampleOrder(len(samples), self.settings.seed, self.settings.shuffle)
        rows = [samples[order.index(position)] for position in shape.positions(0, 0, 0)]
        batch = self.recipe.collate(rows, parts.platform.device())
        policy = cast(CheckpointPolicy, parts.plugins["checkpoint"])
        costs = measure_policy(
            policy, model, lambda: self.recipe.loss(forward, batch), parts.platform.synchronize, shard_units(model)
        )
        self.note(compared(chosen, *costs))

    def _make_optimizer(self, parameters: NamedParameters) -> torch.optim.Optimizer:
        return self.optimizer.make(self.optimizer.groups(parameters))

    # --- how long and how large --------------------------------------------------------------------------------------

    def _step_shape(self) -> StepShape:
        """That of the settings; where they are those of the saved state, with as many samples a step as there."""
        settings, world_size = self.settings, self.ranks.world_size
        batch = settings.batch or self._kept_batch()
        if batch is None:
            return StepShape(settings.micro_batch, settings.accumulate or 1, world_size)
        at_once = settings.micro_batch * world_size
        if batch % at_once:
            raise ConfigError(
                f"a step of {batch} samples can't be shared out equally among {world_size} ranks "
                f"with micro-batches of {settings.micro_batch}",
                where="trainer.batch",
                found=batch,
                allowed=f"a multiple of {at_once}",
                hint=None
                if settings.batch
                else "The run was begun with this number: start as many processes as divide it, or set trainer.batch.",
            )
        return StepShape(settings.micro_batch, batch // at_once, world_size)

    def _kept_batch(self) -> int | None:
        """Samples of a step in the newest saved state; None where there is none, or other sizes were asked for."""
        if self._begins_anew:
            return None
        step = newest_step(self.store, self.ranks)
        if step is None:
            return None
        metadata = self.ranks.together("reading the saved state", lambda: self.store.metadata(step))
        return saved_batch(metadata, self._asked_sizes())

    def _asked_sizes(self) -> dict[str, Any]:
        """What the settings say of a step's size. While they stay, the number of samples stays, however many ranks."""
        settings = self.settings
        return {"micro_batch": settings.micro_batch, "accumulate": settings.accumulate, "batch": settings.batch}

    def _num_steps(self, num_samples: int, shape: StepShape) -> int:
        if self.settings.steps is not None:
            return self.settings.steps
        return max(1, math.ceil((self.settings.epochs or 1.0) * num_samples / shape.batch))

    # --- going on ----------------------------------------------------------------------------------------------------

    def _identity(self, samples: Samples) -> dict[str, Any]:
        chosen, settings = self.parts.report.chosen_names, self.settings
        return {
            "model": self.parts.settings.model,
            "recipe": chosen["recipe"],
            "data": samples.digest,
            "optimizer": chosen["optimizer"],
            "precision": chosen["precision"],
            "seed": settings.seed,
            "shuffle": settings.shuffle,
        }

    @property
    def _begins_anew(self) -> bool:
        return self.settings.resume == "never" and not self.is_restart

    def _resume(self, work: Assembled) -> None:
        """Go on from the newest state, as ``trainer.resume`` says."""
        step = work.state.newest()
        if self._begins_anew:
            if step is not None:
                raise ConfigError(
                    f"there are saved states, up to step {step}, among which those of a new run would be lost",
                    where=str(self.store.folder),
                    hint="Remove them, or name another store.folder; trainer.resume: auto goes on from the newest.",
                )
            return
        if step is None:
            if self.settings.resume == "must":
                raise StateNotFoundError(
                    "there is no saved state to go on from",
                    where=str(self.store.folder),
                    hint="Set trainer.resume to auto, or name the store.folder of the run.",
                )
            return
        work.resume(step)
        self.note(f"going on after step {step}, from {self.store.folder}")
        if step >= work.run.steps:
            self.note(f"no step is left to make: the run is of {work.run.steps} steps")


def _check_same_data(digests: Sequence[str], rank: int) -> None:
    if digests[rank] != digests[0]:
        raise ConfigError(
            "this rank reads other samples than rank 0", where="recipe", hint="Give every machine the same data files."
        )


class Assembled:
    """A run that is ready to go, with everything around its steps."""

    def __init__(
        self,
        parts: Parts,
        binder: KernelBinder,
        run: TrainingRun,
        state: RunState,
        trackers: Trackers,
        note: Callable[[str], None],
    ) -> None:
        self.parts, self.binder = parts, binder
        self.run, self.state, self.trackers = run, state, trackers
        self.note = note

    @property
    def folder(self) -> Path:
        """Of the run."""
        return Path(self.parts.settings.trainer.folder).expanduser().absolute()

    @property
    def model_folder(self) -> Path:
        """Where the trained model goes."""
        return self.folder / "model"

    def resume(self, step: int) -> None:
        """Go on after ``step``, from its saved state."""
        metadata = self.state.load(step)
        self.run.progress.samples = int(metadata["samples"])
        self.run.progress.tokens = int(metadata["tokens"])

    def train(
        self, on_step: Callable[[StepResult, int], None] | None = None, pulse: Pulse | None = None
    ) -> TrainingResult:
        """Make the steps that are left, save on the way, and write the model."""
        run = self.run
        losses: list[float] = []

        def after_step(result: StepResult) -> None:
            if pulse is not None:
                pulse.beat()
            losses.append(result.loss)
            self.trackers.record(result, is_last=result.step == run.steps)
            if on_step is not None and run.ranks.is_first:
                on_step(result, run.steps)
            if result.step % self.store.config.every == 0 or result.step == run.steps:
                with known_to_all_ranks():
                    self.state.save(run.progress.to_dict())

        with ExitStack() as held:
            self.run.ranks.together("starting the trackers", lambda: self._start(held))
            outcome = "failed"
            try:
                run.train(after_step)
                with known_to_all_ranks():
                    self.state.wait()
                outcome = "done"
            except BaseException as error:
                outcome = str(error) or type(error).__name__
                raise
            finally:
                if pulse is not None:
                    pulse.rest()
                self.state.abandon()
                self.trackers.finish(outcome)
            return TrainingResult(self._export(), run.step_number, tuple(losses))

    @property
    def store(self) -> Store:
        return cast(Store, self.parts.plugins["store"])

    def _start(self, held: ExitStack) -> None:
        # On several machines, one that is cut off would keep the folder from those that go on without it.
        if self.run.ranks.is_first and num_machines() == 1:
            held.enter_context(claimed(self.folder, self.note))
        self.trackers.start(self.run.steps, self.run.step_number)

    def _export(self) -> Path | None:
        if not self.parts.settings.trainer.export:
            return None
        assert self.parts.checkpoint is not None
        export_model(self.model_folder, self.run.prepared.model, self.parts.checkpoint, self.run.ranks)
        self.note(f"the trained model is in {self.model_folder}")
        return self.model_folder
