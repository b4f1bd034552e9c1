"""Saving a run, and going on from what was saved.

A state holds what the partitioner gives (``model.*``, ``optimizer.*``), the random states of each rank (``rng.*``), and
as metadata the position in the data, the loss scale, and what the run is.
"""

from __future__ import annotations

import os
from collections.abc import Container, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from drivetrain.contracts.store import Saving, Store, StoredTensor
from drivetrain.errors import ConfigError, DamagedStateError, StoreError
from drivetrain.training.prepared import Prepared
from drivetrain.training.ranks import Ranks

if TYPE_CHECKING:
    from drivetrain.observers import Observers

FORMAT = 1
_MAY_LACK = "partitioner."
"""Prefix of what one layout keeps for itself and another does not have."""


class RunState:
    """The saved states of one run.

    identity:  what must be equal for a state to belong to this run, as JSON holds it: setting -> value.
    described: what is saved beside, for whoever goes on: plan, schedule, samples of a step.
    """

    def __init__(
        self,
        store: Store,
        prepared: Prepared,
        ranks: Ranks,
        identity: dict[str, Any],
        observers: Observers | None = None,
        described: dict[str, Any] | None = None,
    ) -> None:
        self._store, self._prepared, self._ranks = store, prepared, ranks
        self._identity, self._described = identity, described or {}
        self._observers = observers
        self._saving: tuple[int, Saving] | None = None
        self._kept: tuple[int | None, dict[str, Any]] = (None, {})

    def save(self, numbers: dict[str, Any]) -> None:
        """Save the state of now, in the background where the store can. A step that is saved already, or that the run
        goes on from, is not saved again with the same numbers. Raises StoreError, for the save before too."""
        self.wait()
        step = self._prepared.step_number
        kept_step, kept = self._kept
        if step == kept_step and all(name in kept and kept[name] == value for name, value in numbers.items()):
            return
        state = {**self._prepared.state(), **_random_states(self._ranks.rank)}
        metadata = {
            "format": FORMAT,
            "identity": self._identity,
            **self._described,
            **self._prepared.numbers(),
            **numbers,
        }
        self._saving = (step, self._store.save(step, state, metadata))
        self._kept = (step, metadata)

    def wait(self) -> None:
        """Until the save that is under way is complete, and old states are removed. Raises StoreError."""
        if self._saving is None:
            return
        step, saving = self._saving
        kept, self._saving, self._kept = self._kept, None, (None, {})
        saving.wait()
        self._kept = kept
        if self._ranks.is_first:
            self._store.prune()
            if self._observers is not None:
                self._observers.notify("state_saved", path=str(self._store.folder), step=step)

    def abandon(self) -> None:
        """The run ends early: until the save that is under way has ended, with whatever outcome, so that who goes on
        finds it."""
        if self._saving is not None:
            with suppress(StoreError):  # the store has told it, and another error is on its way to the caller
                self._saving[1].wait()

    def newest(self) -> int | None:
        """The step of the newest complete state, as rank 0 sees it."""
        return newest_step(self._store, self._ranks)

    def load(self, step: int) -> dict[str, Any]:
        """Take over a state; returns its metadata. Raises StoreError, DamagedStateError, or ConfigError for the state
        of another run."""
        try:
            return self._load(step)
        except DamagedStateError as error:
            if not isinstance(error.__cause__, PermissionError):
                older = [other for other in self._store.steps() if other < step]
                then = f"go on from step {older[-1]}" if older else "begin anew"
                error.hint = error.hint or f"Where it can't be mended, remove the state of step {step} to {then}."
            raise

    def _load(self, step: int) -> dict[str, Any]:
        metadata, held = self._ranks.together("reading the saved state", lambda: self._read(step))
        state = self._prepared.state()
        random = _random_states(self._ranks.rank)
        known = {name: tensor for name, tensor in random.items() if name in held}
        lacking = [name for name in state if name.startswith(_MAY_LACK) and name not in held]
        for name in lacking:
            del state[name]
        begun = _begun(state, held)
        self._store.load(step, {**begun, **known})
        self._prepared.partitioner.load_state(self._prepared.model, self._prepared.optimizer, state)
        self._restore(step, metadata)
        if len(known) == len(random):
            _set_random_states(self._ranks.rank, known)
        self._kept = (step, metadata)
        return metadata

    def _read(self, step: int) -> tuple[dict[str, Any], Mapping[str, StoredTensor]]:
        """Metadata and names of a state. A machine that does not share the folder fails here, alone."""
        metadata = self._store.metadata(step)
        self._check(step, metadata)
        return metadata, self._store.tensors(step)

    def _check(self, step: int, metadata: dict[str, Any]) -> None:
        where = f"{self._store.folder}, step {step}"
        if metadata.get("format") != FORMAT or not isinstance(metadata.get("identity"), dict):
            raise StoreError("this is not the state of a training run that this version knows", where=where)
        for name, mine in self._identity.items():
            theirs = metadata["identity"].get(name)
            if theirs != mine:
                how = f"its {name} is {theirs!r}, and this run's is {mine!r}"
                if name == "data":
                    how = "it was trained on other samples: recipe.data, recipe.length or another option was changed"
                raise ConfigError(
                    f"the saved state belongs to another run: {how}",
                    where=where,
                    hint="Name another store.folder, or set trainer.resume to never and remove the old states.",
                )

    def _restore(self, step: int, metadata: dict[str, Any]) -> None:
        try:
            self._prepared.step_number = int(metadata["step"])
            if self._prepared.loss_scale is not None:
                self._prepared.loss_scale.restore(metadata["loss_scale"])
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedStateError(
                f"the state lacks something: {error!r}", where=f"{self._store.folder}, step {step}"
            ) from error


def _begun(state: dict[str, torch.Tensor], held: Container[str]) -> dict[str, torch.Tensor]:
    """The part of ``state`` that can be loaded. A parameter that no loss had reached when the state was saved has
    nothing there from the optimizer: what it has here is what it is before a first step."""
    missing: dict[str, list[str]] = {}
    for name in state:
        if name.startswith("optimizer."):
            missing.setdefault(name.rpartition(".")[0], []).append(name)
    for place, names in list(missing.items()):
        parameter = place.removeprefix("optimizer.")
        if any(name in held for name in names) or f"model.{parameter}" not in held:
            del missing[place]
    fresh = {name for names in missing.values() for name in names}
    return {name: tensor for name, tensor in state.items() if name not in fresh}


def check_place(folder: Path) -> None:
    """Raise StoreError where no state could be saved, as long as nothing is lost by it. Writes nothing."""
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if there.is_dir() and os.access(there, os.W_OK | os.X_OK):
        return
    raise StoreError(
        "no state can be saved here",
        where=str(folder),
        found=f"{there} can't be written to" if there.is_dir() else f"{there} is no folder",
        hint="Name another store.folder.",
    )


def newest_step(store: Store, ranks: Ranks) -> int | None:
    """The step of the newest complete state, as rank 0 sees it."""
    steps = store.steps() if ranks.is_first else ()
    return ranks.of_first(steps[-1] if steps else None)


def saved_batch(metadata: dict[str, Any], sizes: dict[str, Any]) -> int | None:
    """Samples of a step in the run that saved this, if its settings of a step's size were ``sizes``."""
    batch = metadata.get("batch")
    return batch if isinstance(batch, int) and metadata.get("sizes") == sizes else None


def _random_states(rank: int) -> dict[str, torch.Tensor]:
    states = {f"rng.{rank}.cpu": torch.get_rng_state()}
    for kind in ("cuda", "xpu"):
        device = getattr(torch, kind)
        if device.is_available() and device.is_initialized():
            states[f"rng.{rank}.{kind}"] = device.get_rng_state()
    return states


def _set_random_states(rank: int, states: dict[str, torch.Tensor]) -> None:
    for name, state in states.items():
        kind = name.removeprefix(f"rng.{rank}.")
        (torch.set_rng_state if kind == "cpu" else getattr(torch, kind).set_rng_state)(state)
