"""What every store has to do: give back what it was given, and nothing that is not whole, whoever is killed when."""

from __future__ import annotations

import json
import time
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

import pytest
import torch

from drivetrain.contracts.store import Saving, Store, StoredTensor
from drivetrain.errors import DamagedStateError, StateNotFoundError, StoreError
from drivetrain.registry import PluginRef, load
from drivetrain.testing.ranks import process_context, spawn_ranks
from drivetrain.testing.suite import Suite, about, not_run

State = dict[str, torch.Tensor]

DTYPES = ("float32", "float64", "bfloat16", "float16", "int64", "int32", "int8", "uint8", "bool")
SHAPES: tuple[tuple[int, ...], ...] = ((), (1,), (7,), (3, 5), (0,), (4, 0, 2), (2, 3, 4))
METADATA: Mapping[str, Any] = {
    "plan": {"parts": {"optimizer": {"name": "adamw", "options": {"lr": 1e-4}}}, "digest": "0f" * 8},
    "data": {"epoch": 2, "position": 2**53 + 1, "files": ["a.jsonl", "Grüße, 世界.jsonl"]},
    "loss_scale": 65536.0,
    "is_last": False,
    "note": None,
}
_LARGE = 2**22
"""Elements of a tensor whose saving takes some time."""

_KILLS = (0.0, 0.01, 0.03, 0.08)
"""Seconds after a state is listed when the process that goes on saving is killed."""


def example_state(seed: int = 0) -> State:
    """Tensors of every dtype and shape, under names as a model, an optimizer and a loop give them."""
    generator = torch.Generator().manual_seed(seed)
    state: State = {}
    for number, shape in enumerate(SHAPES):
        for dtype in DTYPES:
            values = torch.randint(0, 2 if dtype == "bool" else 100, shape, generator=generator)
            state[f"model.layers.{number}.{dtype}.weight"] = values.to(getattr(torch, dtype))
    wide = torch.randn(6, 10, generator=generator)
    state["optimizer.model.norm.weight.exp_avg"] = wide.T
    state["optimizer/every.other"] = wide[::2, 1::3]
    state["rng.rank 0"] = torch.get_rng_state()
    state["has.no.number"] = torch.tensor([float("nan"), float("inf"), -0.0])
    return state


def empty_like(state: Mapping[str, torch.Tensor]) -> State:
    """Tensors of the same form to load into, with other values."""
    return {name: torch.ones_like(tensor, memory_format=torch.contiguous_format) for name, tensor in state.items()}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of the values, so that a NaN equals itself."""
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def expect_equal(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    """Equal to the last bit."""
    for name, tensor in wanted.items():
        assert found[name].shape == tensor.shape, f"{name} has shape {tuple(found[name].shape)}"
        assert found[name].dtype == tensor.dtype, f"{name} is {found[name].dtype}"
        torch.testing.assert_close(bits(found[name]), bits(tensor), rtol=0, atol=0, msg=about(name))


def large_state(value: float) -> State:
    return {"large": torch.full((_LARGE,), value), "small": torch.full((3,), value)}


class StoreSuite(Suite):
    """A store in a folder of the test's own, one process at first, then one that is killed, then two ranks."""

    kind = "store"
    rank_seconds: ClassVar[float] = 90.0

    @classmethod
    def store(cls, folder: Path) -> Store:
        return cast(Store, cls.make(folder=str(folder)))

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        return tmp_path / "run" / "states"

    @classmethod
    def saved(cls, folder: Path, step: int = 5, state: State | None = None) -> Store:
        """A store with one complete state."""
        store = cls.store(folder)
        store.save(step, example_state() if state is None else state, METADATA).wait()
        return store

    # --- what comes back ---------------------------------------------------------------------------------------------

    def test_creating_writes_nothing(self, folder: Path) -> None:
        """A store that nothing was saved to lists nothing and has made no folder."""
        store = self.store(folder)
        assert list(store.steps()) == []
        assert not folder.parent.exists(), "a folder was made before anything was saved"

    def test_values_come_back_to_the_last_bit(self, folder: Path) -> None:
        """Every dtype and shape, scalars, empty tensors, views and NaN, by another instance than the one that saved."""
        self.saved(folder)
        into = empty_like(example_state())
        self.store(folder).load(5, into)
        expect_equal(into, example_state())

    def test_tensors_are_described_without_reading_them(self, folder: Path) -> None:
        """Names, shapes and dtypes of a saved state."""
        described = dict(self.saved(folder).tensors(5))
        wanted = {
            name: StoredTensor(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            for name, tensor in example_state().items()
        }
        assert described == wanted

    def test_metadata_comes_back_equal(self, folder: Path) -> None:
        """Nested tables, large numbers, any text, true and null."""
        assert self.saved(folder).metadata(5) == METADATA
        store = self.store(folder)
        store.save(6, {}, {}).wait()
        assert store.metadata(6) == {}

    def test_values_go_into_the_tensors_that_are_given(self, folder: Path) -> None:
        """Parameters and views are written in place; nothing beside them is."""
        state = {"weight": torch.randn(4, 3), "view": torch.randn(2, 2)}
        store = self.saved(folder, state=state)
        parameter, whole = torch.nn.Parameter(torch.zeros(4, 3)), torch.zeros(4, 4)
        store.load(5, {"weight": parameter, "view": whole[1:3, ::2]})
        assert torch.equal(parameter.detach(), state["weight"])
        assert torch.equal(whole[1:3, ::2], state["view"])
        assert not whole[0].any()
        assert not whole[:, 1::2].any(), "it was written beside the view"

    def test_a_part_can_be_loaded(self, folder: Path) -> None:
        """Names that are not asked for are no matter."""
        state = example_state()
        some = dict(list(state.items())[::7])
        into = empty_like(some)
        self.saved(folder).load(5, into)
        expect_equal(into, some)

    def test_nothing_is_pickled(self, folder: Path) -> None:
        """No file is a pickle or holds one: opening such a file can run any code."""
        self.saved(folder)
        for path in files_of(folder):
            with path.open("rb") as file:
                first = file.read(2)
            assert first not in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"), f"{path.name} is a pickle"
            if zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as archive:
                    pickles = [name for name in archive.namelist() if name.endswith(".pkl")]
                assert not pickles, f"{path.name} holds a pickle"

    # --- many states -------------------------------------------------------------------------------------------------

    def test_steps_are_listed_in_order(self, folder: Path) -> None:
        """Rising, as numbers, whatever the order in which they were saved."""
        store = self.store(folder)
        for step in (30, 4, 100, 0, 1_000_000_000):
            store.save(step, {"a": torch.tensor(step)}, {"step": step}).wait()
        assert list(store.steps()) == list(self.store(folder).steps()) == [0, 4, 30, 100, 1_000_000_000]
        for step in store.steps():
            into = {"a": torch.tensor(0)}
            store.load(step, into)
            assert (int(into["a"]), store.metadata(step)) == (step, {"step": step})

    def test_a_step_is_saved_once(self, folder: Path) -> None:
        """A second state of one step is refused, and the first stays as it is."""
        store = self.saved(folder)
        with pytest.raises(StoreError):
            store.save(5, {"a": torch.zeros(1)}, {}).wait()
        assert list(store.steps()) == [5]
        assert store.metadata(5) == METADATA
        into = empty_like(example_state())
        store.load(5, into)
        expect_equal(into, example_state())

    def test_saves_may_follow_one_another(self, folder: Path) -> None:
        """A save that is begun while another is under way waits for it; both become complete."""
        store = self.store(folder)
        savings = [store.save(step, {"a": torch.full((1000,), float(step))}, {}) for step in range(4)]
        for saving in savings:
            saving.wait()
            saving.wait()
            assert saving.is_done
        assert list(store.steps()) == [0, 1, 2, 3]

    def test_deleting_removes_one_state(self, folder: Path) -> None:
        """The state is gone from the list and the disk, and the others stay."""
        store = self.saved(folder, 1)
        before = set(files_of(folder))
        store.save(2, example_state(), {}).wait()
        store.delete(2)
        assert list(store.steps()) == [1]
        assert set(files_of(folder)) == before, "something of the deleted state is left, or something else is gone"
        with pytest.raises(StateNotFoundError):
            store.metadata(2)
        store.save(2, example_state(), {}).wait()
        assert list(store.steps()) == [1, 2]

    def test_pruning_keeps_the_newest(self, folder: Path) -> None:
        """``keep`` states stay; with null all do."""
        store = cast(Store, self.make(folder=str(folder), keep=2))
        for step in (1, 2, 3, 4):
            store.save(step, {"a": torch.ones(1)}, {}).wait()
        assert cast(Store, self.make(folder=str(folder), keep=None)).prune() == []
        assert store.prune() == [1, 2]
        assert list(store.steps()) == [3, 4]
        assert store.prune() == []

    # --- what is refused ---------------------------------------------------------------------------------------------

    def test_a_missing_step_is_an_error(self, folder: Path) -> None:
        """Loading, describing and deleting what is not there raise StateNotFoundError, before the first save too."""
        for store in (self.store(folder), self.saved(folder)):
            calls: tuple[Callable[[], object], ...] = (
                partial(store.load, 6, {"a": torch.zeros(1)}),
                partial(store.metadata, 6),
                partial(store.tensors, 6),
                partial(store.delete, 6),
            )
            for call in calls:
                with pytest.raises(StateNotFoundError, match="6"):
                    call()

    def test_what_does_not_fit_is_an_error_before_anything_is_written(self, folder: Path) -> None:
        """A name that the state lacks, another shape and another dtype raise StoreError, which names the tensor."""
        store = self.saved(folder, state={"good": torch.ones(4), "weight": torch.ones(2, 3)})
        for name, tensor in (
            ("surely.no.such", torch.zeros(1)),
            ("weight", torch.zeros(3, 2)),
            ("weight", torch.zeros(6)),
            ("weight", torch.zeros(2, 3, dtype=torch.bfloat16)),
        ):
            good = torch.zeros(4)
            with pytest.raises(StoreError, match=name):
                store.load(5, {"good": good, name: tensor})
            assert not good.any(), "another tensor was written to"
            assert not tensor.any(), "it was written to"

    @pytest.mark.parametrize(
        "state", [{"a": 3}, {"a": [torch.ones(1)]}, {"a": {"b": torch.ones(1)}}, {1: torch.ones(1)}]
    )
    def test_what_is_no_tensor_is_refused(self, folder: Path, state: Any) -> None:
        """Numbers, lists and tables are no tensors, and a number is no name: StoreError, and nothing is listed."""
        store = self.store(folder)
        with pytest.raises(StoreError):
            store.save(5, state, {}).wait()
        assert list(store.steps()) == []

    @pytest.mark.parametrize(
        "metadata", [{"a": {1, 2}}, {"a": torch.ones(1)}, {1: "a"}, {"a": (1, 2)}, {"a": float("nan")}], ids=str
    )
    def test_what_is_no_json_is_refused(self, folder: Path, metadata: Any) -> None:
        """Metadata that would not come back equal is a StoreError, and nothing is listed."""
        store = self.store(folder)
        with pytest.raises(StoreError):
            store.save(5, {"a": torch.ones(1)}, metadata).wait()
        assert list(store.steps()) == []

    def test_a_place_that_cannot_be_written_is_an_error(self, tmp_path: Path) -> None:
        """A folder below a file: StoreError, and no error of the system."""
        (tmp_path / "file").write_text("in the way")
        store = self.store(tmp_path / "file" / "states")
        with pytest.raises(StoreError):
            store.save(5, {"a": torch.ones(1)}, {}).wait()
        assert list(store.steps()) == []

    # --- in the background -------------------------------------------------------------------------------------------

    def test_later_changes_are_not_saved(self, folder: Path) -> None:
        """Once ``save`` has returned, tensors and metadata may be changed: what is saved are the values of then."""
        store = self.store(folder)
        state, metadata = large_state(1.0), {"position": [1]}
        saving = store.save(5, state, metadata)
        for tensor in state.values():
            tensor.fill_(2.0)
        metadata["position"].append(2)
        saving.wait()
        into = empty_like(large_state(0.0))
        store.load(5, into)
        expect_equal(into, large_state(1.0))
        assert store.metadata(5) == {"position": [1]}

    def test_saving_goes_on_behind_the_caller(self, folder: Path) -> None:
        """Where ``async`` is claimed, ``save`` has returned before a large state is on the disk."""
        self.require_claim("async")
        store = self.store(folder)
        were_open = []
        for step in range(3):
            saving = store.save(step, large_state(float(step)), {})
            were_open.append(not saving.is_done)
            saving.wait()
        assert any(were_open), "each time, the state was complete when save returned"

    # --- accidents ---------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("damage", ["a flipped bit", "cut short", "gone"])
    def test_a_damaged_file_is_named(self, folder: Path, damage: str) -> None:
        """Bytes that are not those that were saved raise DamagedStateError with the file's name."""
        store = self.saved(folder, state=large_state(3.0))
        path = max(files_of(folder), key=lambda file: file.stat().st_size)
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        if damage == "gone":
            path.unlink()
        else:
            path.write_bytes(data if damage == "a flipped bit" else data[:-7])
        for reader in (store, self.store(folder)):
            with pytest.raises(DamagedStateError, match=path.name):
                reader.load(5, empty_like(large_state(0.0)))

    def test_damaged_records_are_errors_of_the_tree(self, folder: Path) -> None:
        """Whatever happens to the smaller files, what comes of it is a StoreError, or the state is not listed."""
        store = self.saved(folder, state=large_state(3.0))
        small = sorted(files_of(folder), key=lambda file: file.stat().st_size)[:-1]
        for path in small:
            whole = path.read_bytes()
            for junk in (b"", whole[: len(whole) // 2], b"\x00" * len(whole), whole.replace(b"3", b"4")):
                if junk == whole:
                    continue
                path.write_bytes(junk)
                if 5 in store.steps():
                    with pytest.raises(StoreError):
                        self._read_all(store)
            path.write_bytes(whole)
        self._read_all(store)

    @staticmethod
    def _read_all(store: Store) -> None:
        store.metadata(5)
        into = empty_like(large_state(0.0))
        store.load(5, into)

    def test_a_kill_at_any_moment_leaves_whole_states(self, folder: Path) -> None:
        """A process that saves one state after the other is killed in the middle: every state that is listed is whole,
        none that was complete is lost, and the next process goes on."""
        self._importable()
        store = self.saved(folder, 0, large_state(0.0))
        for delay in _KILLS:
            complete = list(store.steps())
            self._kill_while_saving(folder, store, delay)
            listed = list(store.steps())
            assert set(complete) <= set(listed), f"of {complete}, only {listed} are left"
            for step in listed:
                into = empty_like(large_state(-1.0))
                store.load(step, into)
                expect_equal(into, large_state(float(step)))
        store.save(listed[-1] + 1, large_state(1.0), {}).wait()

    def _kill_while_saving(self, folder: Path, store: Store, delay: float) -> None:
        last = list(store.steps())[-1]
        options = {**self.options, "folder": str(folder)}
        child = process_context().Process(target=_save_for_ever, args=(self.ref(), options, last + 1), daemon=True)
        child.start()
        try:
            deadline = time.monotonic() + self.time_limit_seconds
            while list(store.steps())[-1] == last:
                assert child.is_alive(), f"the process that saves has ended with {child.exitcode}"
                assert time.monotonic() < deadline, f"nothing was saved within {self.time_limit_seconds:g} s"
                time.sleep(0.002)
            time.sleep(delay)
        finally:
            child.kill()
            child.join()

    # --- ranks -------------------------------------------------------------------------------------------------------

    def test_ranks_save_and_one_loads(self, folder: Path, tmp_path: Path) -> None:
        """Where ``reshards`` is claimed: what two ranks saved in shards, one process loads whole."""
        self._require_ranks()
        self._run_ranks(_save_in_shards, folder, tmp_path)
        store = self.store(folder)
        wanted = {**whole_tensors(), "plain": torch.arange(5), "own.0": torch.full((2,), 0.0), "own.1": torch.ones(2)}
        assert {name: stored.shape for name, stored in store.tensors(7).items()} == {
            name: tuple(tensor.shape) for name, tensor in wanted.items()
        }
        assert store.metadata(7) == METADATA
        into = empty_like(wanted)
        store.load(7, into)
        expect_equal(into, wanted)

    def test_ranks_load_what_one_saved(self, folder: Path, tmp_path: Path) -> None:
        """Where ``reshards`` is claimed: what one process saved, two ranks load in shards."""
        self._require_ranks()
        self.store(folder).save(7, whole_tensors(), METADATA).wait()
        self._run_ranks(_load_in_shards, folder, tmp_path)

    def test_ranks_are_told_when_one_of_them_can_not_save(self, folder: Path, tmp_path: Path) -> None:
        """What one rank can't keep is an error on every rank, none is left waiting, and nothing is listed."""
        self._require_ranks()
        self._run_ranks(_save_what_one_rank_lacks, folder, tmp_path)
        assert list(self.store(folder).steps()) == []

    def _require_ranks(self) -> None:
        self.require_claim("reshards")
        self._importable()
        if not torch.distributed.is_available():
            not_run("this build of torch has no torch.distributed")

    def _importable(self) -> None:
        if "<locals>" in self.ref().target:
            pytest.skip("the class is defined inside a function, where no other process can import it")

    def _run_ranks(self, work: Callable[[Store, int], None], folder: Path, tmp_path: Path) -> None:
        options = {**self.options, "folder": str(folder)}
        arguments = (work, self.ref(), options)
        spawn_ranks(_rank_main, arguments, meet=tmp_path / "rendezvous", count=2, seconds=self.rank_seconds)


def files_of(folder: Path) -> list[Path]:
    """Every file below a store's folder."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


# --- what runs in other processes ------------------------------------------------------------------------------------


def _made(ref: PluginRef, options: Mapping[str, Any]) -> Store:
    torch.set_num_threads(1)
    plugin = load(ref)
    return cast(Store, plugin(plugin.Config.model_validate(options)))


def _save_for_ever(ref: PluginRef, options: Mapping[str, Any], step: int) -> None:
    store = _made(ref, options)
    last: Saving | None = None
    while True:
        last = store.save(step, large_state(float(step)), json.loads(json.dumps(METADATA)))
        if step % 2:
            last.wait()
        step += 1


def _rank_main(rank: int, work: Callable[[Store, int], None], ref: PluginRef, options: Mapping[str, Any]) -> None:
    work(_made(ref, options), rank)


def whole_tensors() -> State:
    """Tensors that two ranks share evenly, unevenly, and so that one has nothing."""
    return {
        "even": torch.arange(24.0).view(6, 4),
        "uneven": torch.arange(15, dtype=torch.int32).view(5, 3),
        "columns": torch.arange(21).view(3, 7).to(torch.bfloat16),
        "one": torch.full((1,), 4.0),
        "nothing": torch.zeros(0, 3),
        "copies": torch.arange(3.0),
    }


def in_shards(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Each as a DTensor over both ranks: by rows, ``columns`` by columns, ``copies`` whole on each."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    places = {"columns": Shard(1), "copies": Replicate()}
    return {
        name: distribute_tensor(tensor.clone(), mesh, [places.get(name, Shard(0))]) for name, tensor in tensors.items()
    }


def _save_in_shards(store: Store, rank: int) -> None:
    state = in_shards(whole_tensors())
    state |= {"plain": torch.arange(5), f"own.{rank}": torch.full((2,), float(rank))}
    store.save(7, state, METADATA).wait()
    torch.distributed.barrier()
    assert list(store.steps()) == [7]


def _load_in_shards(store: Store, rank: int) -> None:
    into = in_shards(empty_like(whole_tensors()))
    store.load(7, into)
    expect_equal({name: tensor.full_tensor() for name, tensor in into.items()}, whole_tensors())


def _save_what_one_rank_lacks(store: Store, rank: int) -> None:
    state: dict[str, Any] = {"plain": torch.ones(3), "own": torch.ones(1) if rank else "no tensor"}
    try:
        store.save(7, state, {}).wait()
    except StoreError:
        return
    raise AssertionError("a rank was told that the state is complete")
