"""Stores with one fault each, and the test of the kit that must catch it."""

from __future__ import annotations

import pickle
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from drivetrain.contracts.plugin import Plugin
from drivetrain.contracts.store import Saving
from drivetrain.plugins.store.dcp import DcpStore, _InBackground, _Job, _Saved
from drivetrain.plugins.store.state_folder import StateFolders


class KeepsReferences(DcpStore):
    """Writes in the background from the tensors themselves, which training goes on changing."""

    def save(self, step: int, state: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> Saving:
        def work() -> None:
            time.sleep(0.2)
            self._write(_Job(step, dict(state), dict(metadata)), None)

        self._last.settle()
        self._last = _InBackground(work)
        return self._last


class _InPlace(StateFolders):
    def unfinished(self, step: int) -> Path:
        return self.complete(step)

    def steps(self) -> list[int]:
        return sorted(int(path.name.removeprefix("step-")) for path in self.root.glob("step-*"))


class WritesInPlace(DcpStore):
    """Writes where it reads, and lists whatever has a folder."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._folders = _InPlace(self.folder)


class ReadsWhatIsThere(DcpStore):
    """Reads back whatever bytes it finds."""

    def load(self, step: int, into: Mapping[str, torch.Tensor]) -> None:
        from drivetrain.plugins.store import storage

        checked, storage.zlib.crc32 = storage.zlib.crc32, _AnyNumber()  # type: ignore[assignment]
        try:
            super().load(step, into)
        finally:
            storage.zlib.crc32 = checked


class _AnyNumber:
    def __call__(self, data: object) -> _AnyNumber:
        return self

    def __ne__(self, other: object) -> bool:
        return False


class Overwrites(DcpStore):
    """Throws the old state of a step away before the new one is written."""

    def save(self, step: int, state: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> Saving:
        if step in self.steps():
            self.delete(step)
        return super().save(step, state, metadata)


class ListsAsText(DcpStore):
    """Lists steps in the order of their names."""

    def steps(self) -> Sequence[int]:
        return sorted(super().steps(), key=str)


class CastsInSilence(DcpStore):
    """Fills tensors of any floating-point dtype with what was saved in another."""

    def load(self, step: int, into: Mapping[str, torch.Tensor]) -> None:
        stored = self.tensors(step)
        exact = {
            name: tensor.to(getattr(torch, stored[name].dtype)) if name in stored else tensor
            for name, tensor in into.items()
        }
        super().load(step, exact)
        for name, tensor in into.items():
            tensor.detach().copy_(exact[name])


class Pickles(DcpStore):
    """Keeps the metadata as a pickle, too."""

    def save(self, step: int, state: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> Saving:
        saving = super().save(step, state, metadata)
        saving.wait()
        (self.folder / "metadata.pickle").write_bytes(pickle.dumps(dict(metadata)))
        return saving


class WaitsForTheDisk(DcpStore):
    """Claims to save in the background, and has the caller wait."""

    def save(self, step: int, state: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> Saving:
        saving = super().save(step, state, metadata)
        saving.wait()
        return saving


class KeepsTheLocalShard(DcpStore):
    """Takes a rank's share of a tensor for the whole of it."""

    def save(self, step: int, state: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> Saving:
        local = {name: getattr(tensor, "to_local", lambda tensor=tensor: tensor)() for name, tensor in state.items()}
        return super().save(step, local, metadata)


class LeavesRanksWaiting(DcpStore):
    """Refuses on the rank that has the fault, and calls the save of the others a success."""

    def save(self, step: int, state: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> Saving:
        problem = _Job(step, dict(state), dict(metadata)).problem()
        if problem is not None:
            raise problem
        return _Saved()


class MendsNumbers(DcpStore):
    """Replaces what is no number by zero, which hides that a run has failed."""

    def _write(self, job: _Job, problem: Any) -> None:
        state = {name: torch.nan_to_num(t) if t.is_floating_point() else t for name, t in job.state.items()}
        super()._write(_Job(job.step, state, job.metadata), problem)


class DeletesTooMuch(DcpStore):
    """Takes a deleted state's older ones along."""

    def delete(self, step: int) -> None:
        remove = partial(super().delete)
        for older in [other for other in self.steps() if other <= step] or [step]:
            remove(older)


ZOO: dict[type[Plugin], str] = {
    KeepsReferences: "test_later_changes_are_not_saved",
    WritesInPlace: "test_a_kill_at_any_moment_leaves_whole_states",
    ReadsWhatIsThere: "test_a_damaged_file_is_named",
    Overwrites: "test_a_step_is_saved_once",
    ListsAsText: "test_steps_are_listed_in_order",
    CastsInSilence: "test_what_does_not_fit_is_an_error_before_anything_is_written",
    Pickles: "test_nothing_is_pickled",
    WaitsForTheDisk: "test_saving_goes_on_behind_the_caller",
    KeepsTheLocalShard: "test_ranks_save_and_one_loads",
    LeavesRanksWaiting: "test_ranks_are_told_when_one_of_them_can_not_save",
    MendsNumbers: "test_values_come_back_to_the_last_bit",
    DeletesTooMuch: "test_deleting_removes_one_state",
}
"""Faulty store -> the test that must fail for it."""
