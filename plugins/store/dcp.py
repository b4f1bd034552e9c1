"""State that is saved through ``torch.distributed.checkpoint``: by shards, in the background, whole or not at all."""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from pydantic import Field

from drivetrain.contracts.plugin import Probe, ProbeContext, Tier
from drivetrain.contracts.store import Saving, Store, StoreConfig, StoredTensor
from drivetrain.errors import StoreError
from drivetrain.plugins.store.state_folder import Index, StateFolders, check_metadata

if TYPE_CHECKING:
    import torch


_log = logging.getLogger("drivetrain")


class _Saved:
    """A save that is over."""

    is_done = True

    def wait(self) -> None:
        pass

    def settle(self) -> None:
        pass


class _InBackground:
    """A save in a thread of its own. A process that ends in order ends after it."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(work,), name="drivetrain-store")
        self._thread.start()

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # handed to whoever waits
            _log.error("a state could not be saved: %s", error)
            self._failure = error

    @property
    def is_done(self) -> bool:
        return not self._thread.is_alive()

    def settle(self) -> None:
        """Wait for the end, however it comes: the outcome is for whoever asked for the save."""
        self._thread.join()

    def wait(self) -> None:
        self.settle()
        if self._failure is not None:
            raise self._failure


@dataclass(frozen=True)
class _Job:
    """A state to be saved."""

    step: int
    state: dict[str, torch.Tensor]
    metadata: dict[str, Any]

    def problem(self) -> StoreError | None:
        """Why it can't be kept."""
        from drivetrain.plugins.store.storage import check_tensor

        try:
            if isinstance(self.step, bool) or not isinstance(self.step, int) or self.step < 0:
                raise StoreError("a step is a number from 0 on", where="step", found=self.step)
            for name, tensor in self.state.items():
                check_tensor(name, tensor)
            check_metadata(self.metadata)
        except StoreError as error:
            return error
        return None

    def copied(self) -> _Job:
        """With values of its own, in the host's memory."""
        state = {name: _host_copy(tensor) for name, tensor in self.state.items()}
        return _Job(self.step, state, copy.deepcopy(self.metadata))


def _host_copy(tensor: torch.Tensor) -> torch.Tensor:
    """torch's own stager fails on a DTensor whose shard is a view of a larger tensor."""
    import torch
    from torch.distributed.tensor import DTensor

    if not isinstance(tensor, DTensor):
        return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    whole: Any = tensor
    mine = _host_copy(whole.to_local().detach())
    copied: torch.Tensor = DTensor.from_local(
        mine, whole.device_mesh, whole.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )
    return copied


class DcpStore(Store):
    """Sharded state through torch.distributed.checkpoint: in the background, atomic, with checksums, for any ranks."""

    tier = Tier.TUNED

    class Config(StoreConfig):
        background: bool = Field(
            True, description="copy the tensors to the host's memory and write them while training goes on"
        )

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._folders = StateFolders(self.folder)
        self._last: _InBackground | _Saved = _Saved()
        self._group: Any = None

    @classmethod
    def abilities(cls) -> frozenset[str]:
        return frozenset({"async", "reshards"})

    @classmethod
    def probe(cls, context: ProbeContext) -> Probe:
        import torch.distributed

        if not torch.distributed.is_available():
            return Probe.no("missing_dependency", "this build of torch has no torch.distributed")
        return Probe.yes("torch.distributed.checkpoint is there")

    # --- saving ------------------------------------------------------------------------------------------------------

    def save(self, step: int, state: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> Saving:
        self._last.settle()
        self._join_ranks()
        job = _Job(step, dict(state), dict(metadata))
        problem = job.problem()
        if problem is not None and self._group is None:
            raise problem
        # With other ranks the problem is this one's vote: they are not left waiting for a rank that gave up.
        if self.config.background:
            staged = job.copied() if problem is None else job
            self._last = _InBackground(partial(self._write, staged, problem))
        else:
            self._write(job, problem)
            self._last = _Saved()
        return self._last

    def _write(self, job: _Job, problem: StoreError | None) -> None:
        # Without a group the public save() warns at every call that there is none, which is no news here.
        from torch.distributed.checkpoint.api import CheckpointException
        from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
        from torch.distributed.checkpoint.state_dict_saver import _save_state_dict

        from drivetrain.plugins.store.storage import FolderWriter

        writer = FolderWriter(self._folders, job.step, job.metadata, problem)
        planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        try:
            _save_state_dict(job.state, writer, self._group, no_dist=self._group is None, planner=planner)
        except CheckpointException as error:
            if writer.has_begun:
                self._folders.abandon(job.step)
            _raise_first(error, f"the state of step {job.step} could not be saved")

    def _join_ranks(self) -> None:
        """A group of its own on the CPU: what it tells the other ranks can't come between training's own messages. A
        rank that is lost in a save is missed after as long a time as one that is lost in a step."""
        import torch.distributed as dist

        if self._group is None and dist.is_initialized():
            world: Any = dist.group.WORLD
            # Gloo, NCCL and RCCL tell theirs; beside another library it is torch's default.
            options = getattr(world._get_backend(world._device_types[0]), "options", None)
            self._group = dist.new_group(backend="gloo", timeout=getattr(options, "_timeout", None))

    # --- what there is -----------------------------------------------------------------------------------------------

    def steps(self) -> Sequence[int]:
        return self._folders.steps()

    def metadata(self, step: int) -> dict[str, Any]:
        return Index.read(self._folders.find(step)).metadata

    def tensors(self, step: int) -> Mapping[str, StoredTensor]:
        index = Index.read(self._folders.find(step))
        return {name: StoredTensor(entry.shape, entry.dtype) for name, entry in index.tensors.items()}

    def delete(self, step: int) -> None:
        self._folders.delete(step)

    # --- loading -----------------------------------------------------------------------------------------------------

    def load(self, step: int, into: Mapping[str, torch.Tensor]) -> None:
        from torch.distributed.checkpoint.api import CheckpointException
        from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
        from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

        from drivetrain.plugins.store.storage import FolderReader

        self._join_ranks()
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        reader = FolderReader(self._folders, step, into)
        if reader.problem is not None and self._group is None:
            raise reader.problem
        try:
            _load_state_dict(dict(into), reader, self._group, no_dist=self._group is None, planner=planner)
        except CheckpointException as error:
            _raise_first(error, f"the state of step {step} could not be loaded")


def _raise_first(error: BaseException, what: str) -> NoReturn:
    """Raise what went wrong on the first rank that failed, as an error of the tree."""
    failures: dict[int, Any] = error.failures  # type: ignore[attr-defined]
    rank, (first, _) = min(failures.items())
    if isinstance(first, StoreError):
        raise first from error
    raise StoreError(f"{what}: {type(first).__name__}: {first}", where=f"rank {rank}") from error
