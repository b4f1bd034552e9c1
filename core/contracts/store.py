"""Contract of a store: it keeps training state on disk, so that a run can be ended at any moment and goes on.

A *state* is a flat mapping from logical name to tensor: ``"model.layers.0.mlp.up_proj.weight"``,
``"optimizer.model.norm.weight.exp_avg"``. What is no tensor (position in the data, schedule, the run's plan) is
*metadata*: whatever JSON can hold. Nothing is pickled; a state can be read without the code that wrote it.

Ranks: ``save`` and ``load`` are called by every rank of the default process group, in the same order and with the same
step; a process without a group is alone. A plain tensor is the same on every rank that gives its name, and is kept
once; a name may be given by one rank alone. Of a ``DTensor`` every rank gives its shard, and name, shape and dtype are
those of the whole. So a state says nothing of how many ranks wrote it.

Whatever happens, and whenever a process is killed, the states that were complete before stay complete, and one that is
not complete is never listed.

Optional abilities: ``async`` (``save`` returns before the bytes are on disk), ``reshards`` (a state that some number of
ranks wrote is loaded by any other, into any layout).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import Field, field_validator

from drivetrain.contracts.plugin import Plugin, PluginConfig

if TYPE_CHECKING:
    import torch


class StoreConfig(PluginConfig):
    """Options that every store has."""

    folder: str = Field(
        "saved-state", description="folder of the run's states; ~ is the home folder, others start where the run does"
    )
    every: int = Field(100, ge=1, description="training steps from one save to the next")
    keep: int | None = Field(3, ge=1, description="newest states that stay when another is complete; null: all of them")

    @field_validator("folder")
    @classmethod
    def _check_folder(cls, value: str) -> str:
        if not value.strip() or "\0" in value:
            raise ValueError("must be the path of a folder")
        return value


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a saved state, as a whole. dtype: its torch name, such as ``"bfloat16"``."""

    shape: tuple[int, ...]
    dtype: str


class Saving(Protocol):
    """A state on its way to the disk."""

    @property
    def is_done(self) -> bool:
        """Whether :meth:`wait` would return, or raise, at once."""

    def wait(self) -> None:
        """Return when the state is complete and listed. Raises StoreError when it could not be saved; then nothing of
        it is listed. May be called again, with the same outcome."""


class Store(Plugin):
    """Saves, lists and loads the states of one run, all below :attr:`folder`. Creating it writes nothing."""

    kind = "store"

    Config = StoreConfig
    config: StoreConfig

    @property
    def folder(self) -> Path:
        """The folder of the configuration, as an absolute path."""
        return Path(self.config.folder).expanduser().absolute()

    @abstractmethod
    def save(self, step: int, state: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> Saving:
        """Save a state. Once this returns the caller may write to its tensors: what is saved are the values of now.

        step:     of training, from 0 on; the state's name.
        metadata: JSON-able, the same on every rank; it comes back equal.

        One save after the other: an earlier one that is under way is waited for. Raises StoreError, here or from the
        handle, when there is a state of this step already, when something can't be kept (no tensor, no JSON), or when
        the disk is full or can't be written to.
        """

    @abstractmethod
    def steps(self) -> Sequence[int]:
        """Steps of the complete states, rising; none when the folder is not there. Any process may ask, at any time."""

    @abstractmethod
    def metadata(self, step: int) -> dict[str, Any]:
        """What was saved beside the tensors. Raises StateNotFoundError, or DamagedStateError."""

    @abstractmethod
    def tensors(self, step: int) -> Mapping[str, StoredTensor]:
        """Name -> shape and dtype of every tensor of a state, without reading them. Raises as :meth:`metadata` does."""

    @abstractmethod
    def load(self, step: int, into: Mapping[str, torch.Tensor]) -> None:
        """Write a state's values into these tensors, on whatever device; names that are not asked for are not read.

        Raises StateNotFoundError; StoreError for a name that the state does not have and for another shape or dtype
        than was saved, before anything is written; DamagedStateError, which names the file, when bytes are not those
        that were saved: then ``into`` holds anything.
        """

    @abstractmethod
    def delete(self, step: int) -> None:
        """Remove a state: it is not listed any more, whatever happens next. Called by one process. Raises
        StateNotFoundError, or StoreError when it can't be removed."""

    def prune(self) -> list[int]:
        """Delete all states but the newest ``config.keep``; returns the steps of those. Called by one process, when
        a save is complete."""
        steps = list(self.steps())
        old = [] if self.config.keep is None else steps[: -self.config.keep]
        for step in old:
            self.delete(step)
        return old
