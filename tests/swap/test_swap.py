"""Law 9: parts are exchanged in a running engine, and no request notices more than a moment."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from drivetrain import LLM, SamplingParams
from drivetrain.config import load_settings
from drivetrain.errors import ConfigError, DrivetrainError, PluginError, SwapError
from drivetrain.observers import hookimpl
from drivetrain.registry import Registry
from drivetrain.serving.swap import SwapOutcome, prepare, put_to_the_vote
from drivetrain.serving.vote import Ballot
from support.swap_parts import GATE, refs_with_swap_parts
from support.tiny_models import save_tiny

GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
SEEDED = SamplingParams(temperature=1.0, seed=11, max_tokens=40, ignore_eos=True, n=2, logprobs=1)
PROMPTS = [[3 + i, 5, 7, 9 + i, 2 + i % 3] for i in range(12)]


@pytest.fixture(scope="module", params=["llama3", "gemma2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with full attention only, and one whose windowed layers free blocks."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("models") / request.param
    save_tiny(request.param, folder)
    return folder


@contextmanager
def serving(folder: Path, **engine: Any) -> Iterator[LLM]:
    options: dict[str, Any] = {"platform": {"name": "cpu", "threads": 1}, "engine": {"max_model_len": 96, **engine}}
    with LLM(folder, attention={"name": "sdpa", "block_size": 4}, **options) as llm:
        llm._stack.parts.registry = Registry(refs_with_swap_parts())
        yield llm


@pytest.fixture
def llm(folder: Path) -> Iterator[LLM]:
    with serving(folder) as llm:
        yield llm


@pytest.fixture
def overlapping(folder: Path) -> Iterator[LLM]:
    with serving(folder, overlap="on") as llm:
        yield llm


class Traffic:
    """Requests in flight, in threads of their own, and what must come of them.

    rounds: whether the same requests come again and again, from two threads that are half a round apart: the engine
            always has some until the block ends.
    """

    def __init__(self, llm: LLM, params: SamplingParams = GREEDY, *, rounds: bool = False) -> None:
        self._llm, self._params = llm, params
        before = self._num_steps()
        self.expected = self._run()
        self._half_a_round = (self._num_steps() - before) // 2
        self.results: list[Any] = []
        self._failure: BaseException | None = None
        self._rounds = rounds
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._record) for _ in range(1 + rounds)]

    def _num_steps(self) -> int:
        return self._llm._loop.engine.metrics.num_steps

    def _run(self) -> list[Any]:
        results = self._llm.generate(PROMPTS, self._params)
        return [[(c.token_ids, c.text, c.finish_reason) for c in result.completions] for result in results]

    def _record(self) -> None:
        try:
            self.results.append(self._run())
            while self._rounds and not self._ended.is_set():
                self.results.append(self._run())
        except BaseException as error:
            self._failure = error

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            before = self._num_steps()
            thread.start()
            while self._num_steps() < before + (self._half_a_round if self._rounds else 2):
                time.sleep(0.0002)
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()
        if self._failure is not None:
            raise self._failure
        assert all(result == self.expected for result in self.results)


def assert_whole(llm: LLM) -> None:
    """Nothing leaked: every block is free and the books balance."""
    engine = llm._loop.engine
    engine.kv.check()
    assert [pool.num_used for pool in engine.kv.pools] == [0 for _ in engine.kv.pools]
    assert engine.num_running == engine.num_waiting == 0
    assert engine._sampler.num_tracked == 0


THERE_AND_BACK = [
    ({"attention": {"name": "same-layout", "block_size": 4}}, {"attention": {"name": "sdpa", "block_size": 4}}, "keep"),
    (
        {"attention": {"name": "other-layout", "block_size": 4}},
        {"attention": {"name": "sdpa", "block_size": 4}},
        "recompute",
    ),
    ({"attention": {"name": "sdpa", "block_size": 7}}, {"attention": {"name": "sdpa", "block_size": 4}}, "recompute"),
    ({"scheduler": "priority"}, {"scheduler": "fcfs"}, "keep"),
    ({"scheduler": {"name": "fcfs", "max_running": 3}}, {"scheduler": {"name": "fcfs", "max_running": 80}}, "keep"),
    ({"quantizer": "exact"}, {"quantizer": "none"}, "keep"),
    ({"kernels": "reference"}, {"kernels": "reference"}, "keep"),
    (
        {"attention": {"name": "other-layout", "block_size": 5}, "scheduler": "priority", "quantizer": "exact"},
        {"attention": {"name": "sdpa", "block_size": 4}, "scheduler": "fcfs", "quantizer": "none"},
        "recompute",
    ),
]


@pytest.mark.parametrize(("there", "back", "cache"), THERE_AND_BACK)
@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_there_and_back_under_load(llm: LLM, there: Any, back: Any, cache: str, params: SamplingParams) -> None:
    """Outputs equal those of an undisturbed run, and so do those of requests that come afterwards."""
    with Traffic(llm, params) as traffic:
        for parts in (there, back):
            report = llm.swap(probation_steps=2, **parts)
            assert report.outcome is SwapOutcome.FINALIZED
            assert report.cache.value == cache
    assert traffic._run() == traffic.expected
    assert llm._loop.engine.epoch == 2
    assert_whole(llm)


@pytest.mark.parametrize("place", [1, 4, 7])
def test_the_overlapped_loop_is_settled_before_a_swap(overlapping: LLM, place: int) -> None:
    """No step is under way when parts are exchanged, and all outputs stay as they were."""
    there, back, cache = THERE_AND_BACK[place]
    with Traffic(overlapping) as traffic:
        for parts in (there, back):
            report = overlapping.swap(probation_steps=2, **parts)
            assert report.outcome is SwapOutcome.FINALIZED
            assert report.cache.value == cache
    assert traffic._run() == traffic.expected
    assert_whole(overlapping)


def test_a_cache_that_can_be_converted_is_kept(llm: LLM) -> None:
    """Running requests and cached prefixes go on with what was computed."""
    with Traffic(llm) as traffic:
        report = llm.swap(probation_steps=2, attention={"name": "converting", "block_size": 4})
        assert (report.outcome, report.cache.value) == (SwapOutcome.FINALIZED, "convert")
        assert report.requests_recomputed == 0
    before = llm.stats()["prefix_hit_tokens"]
    assert traffic._run() == traffic.expected
    assert llm.stats()["prefix_hit_tokens"] > before
    assert llm.swap(dry_run=True, attention={"name": "sdpa", "block_size": 4}).cache.value == "recompute"
    assert_whole(llm)


def test_a_probation_ends_with_the_last_request(llm: LLM) -> None:
    """Whoever waits for a swap does not wait for steps that nobody asks for."""
    with Traffic(llm):
        report = llm.swap(probation_steps=10**6, timeout_seconds=60, scheduler="priority")
    assert report.outcome is SwapOutcome.FINALIZED
    assert llm._loop.engine.probation is None


def test_chunks_carry_the_epoch_that_made_them(llm: LLM) -> None:
    as_long_as_can_be = SamplingParams(temperature=0, max_tokens=90, ignore_eos=True)  # so that the swap comes in it
    stream = llm.stream(PROMPTS[0], as_long_as_can_be)
    epochs = [next(stream).epoch]
    llm.swap(scheduler="priority")
    epochs += [chunk.epoch for chunk in stream]
    assert epochs[0] == 0
    assert epochs[-1] == 1
    assert epochs == sorted(epochs)
    assert llm.selection_dict()["epoch"] == 1
    assert llm.explain()["scheduler"].chosen.name == "priority"


FAULTS = [
    ({"attention": {"name": "faulty", "phase": "prepare"}}, "prepared|told to fail in prepare"),
    ({"quantizer": {"name": "faulty", "phase": "prepare"}}, "told to fail in prepare"),
    ({"scheduler": {"name": "faulty", "phase": "prepare"}}, "told to fail in prepare"),
    ({"scheduler": {"name": "faulty", "phase": "commit"}}, "commit failed and was undone"),
    ({"attention": {"name": "faulty-converter", "block_size": 4}}, "commit failed and was undone"),
]


@pytest.mark.parametrize(("parts", "message"), FAULTS)
def test_a_fault_before_the_commit_ends_changes_nothing(llm: LLM, parts: Any, message: str) -> None:
    digest = llm.selection_dict()["plan_digest"]
    with Traffic(llm), pytest.raises(DrivetrainError, match=message):
        llm.swap(**parts)
    assert llm._loop.engine.epoch == 0
    assert llm.selection_dict()["plan_digest"] == digest
    assert_whole(llm)


@pytest.mark.parametrize(
    "parts",
    [
        {"attention": {"name": "faulty", "phase": "raise", "block_size": 4}},
        {"attention": {"name": "faulty", "phase": "raise", "block_size": 6}},
        {"attention": {"name": "faulty", "phase": "nan", "block_size": 4}},
        {"quantizer": {"name": "faulty", "phase": "nan"}},
        {"scheduler": {"name": "faulty", "phase": "raise"}},
    ],
)
def test_a_fault_on_probation_is_rolled_back(llm: LLM, parts: Any) -> None:
    """The failing step is run again by the old parts: no token is lost, doubled or changed."""
    digest = llm.selection_dict()["plan_digest"]
    with Traffic(llm, rounds=True) as traffic:
        report = llm.swap(probation_steps=1000, **parts)
        assert report.outcome is SwapOutcome.ROLLED_BACK
        assert "told to fail" in (report.reason or "") or "finite" in (report.reason or "")
    assert llm.selection_dict()["plan_digest"] == digest
    assert traffic._run() == traffic.expected
    assert_whole(llm)


def test_a_dry_run_says_what_it_takes_and_changes_nothing(llm: LLM) -> None:
    kept = llm.swap(dry_run=True, attention={"name": "same-layout", "block_size": 4})
    anew = llm.swap(dry_run=True, attention={"name": "other-layout", "block_size": 4})
    assert (kept.outcome, kept.cache.value, kept.extra_memory_bytes) == (SwapOutcome.DRY_RUN, "keep", 0)
    assert anew.cache.value == "recompute"
    assert anew.extra_memory_bytes > 0
    assert llm._loop.engine.epoch == 0


@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        ({"attention": "spda"}, PluginError, "Did you mean 'sdpa'"),
        ({"attention": {"name": "sdpa", "blok_size": 4}}, ConfigError, "block_size"),
        ({"platform": "cpu"}, SwapError, "can't exchange its platform"),
        ({}, SwapError, "nothing to exchange"),
        ({"atention": "sdpa"}, ConfigError, "attention"),
        (
            {"scheduler": "priority", "engine": {"max_waiting": 3}},
            SwapError,
            "settings stay as they are; found 'engine'",
        ),
        ({"scheduler": "priority", "model": "another"}, SwapError, "settings stay as they are; found 'model'"),
        ({"scheduler": "priority", "probation_steps": "8"}, SwapError, "probation_steps must be"),
        ({"scheduler": "priority", "dry_run": "no"}, SwapError, "dry_run must be"),
    ],
)
def test_bad_input_is_refused(llm: LLM, parts: Any, error: type[DrivetrainError], message: str) -> None:
    with pytest.raises(error, match=message):
        llm.swap(**parts)


# --- time limits ---------------------------------------------------------------------------------------------------


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Closed for what hangs in the test; open again afterwards, whatever happens."""
    GATE.clear()
    yield GATE
    GATE.set()


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < deadline, "it did not come to be"
        time.sleep(0.01)


@pytest.mark.parametrize("kind", ["attention", "quantizer", "scheduler"])
def test_a_part_that_hangs_while_it_is_prepared_is_given_up(
    llm: LLM, gate: threading.Event, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The caller gets an error in time, nothing has changed, and the next swap works while the last still hangs."""
    digest = llm.selection_dict()["plan_digest"]
    with Traffic(llm):
        began = time.monotonic()
        with pytest.raises(SwapError, match=f"preparing {kind} took longer than 0.5 s"):
            llm.swap(timeout_seconds=0.5, **{kind: {"name": "faulty", "phase": "hang"}})
        assert time.monotonic() - began < 10
        assert llm._loop.engine.epoch == 0
        assert llm.selection_dict()["plan_digest"] == digest
        assert llm.swap(probation_steps=1, scheduler="priority").outcome is SwapOutcome.FINALIZED
    gate.set()
    wait_until(lambda: "is dropped" in caplog.text)
    assert llm.explain()[kind].chosen.name != "faulty"
    assert llm._loop.engine.epoch == 1
    assert_whole(llm)


def test_who_closes_the_engine_does_not_wait_for_parts_that_are_being_made(llm: LLM, gate: threading.Event) -> None:
    """A server once took SIGTERM only when the swap was prepared, or its time was up."""
    failures: list[Exception] = []

    def swap() -> None:
        try:
            llm.swap(timeout_seconds=300, attention={"name": "faulty", "phase": "hang"})
        except SwapError as error:
            failures.append(error)

    thread = threading.Thread(target=swap)
    thread.start()
    wait_until(lambda: bool(llm._loop._preparing))
    llm.close()
    thread.join(10)
    assert not thread.is_alive()
    assert "the engine stopped before the swap was finished" in str(failures[0])
    (preparing,) = (one.thread for one in llm._loop._preparing)
    assert preparing.is_alive()
    gate.set()
    wait_until(lambda: not preparing.is_alive())


def test_the_limit_of_the_settings_holds_where_none_is_named(folder: Path, gate: threading.Event) -> None:
    with LLM(folder, engine={"max_model_len": 96, "swap_timeout_seconds": 0.3}) as llm:
        llm._stack.parts.registry = Registry(refs_with_swap_parts())
        with pytest.raises(SwapError, match=r"longer than 0\.3 s"):
            llm.swap(dry_run=True, attention={"name": "faulty", "phase": "hang"})


def test_parts_that_stall_on_probation_are_given_up_and_rolled_back(llm: LLM, gate: threading.Event) -> None:
    """The caller has its error while the step still stalls; the old parts come back as soon as it returns."""
    digest = llm.selection_dict()["plan_digest"]
    stalling = {"name": "faulty", "phase": "stall", "block_size": 4}
    with Traffic(llm, rounds=True) as traffic:
        with pytest.raises(SwapError, match="did not pass their probation in time"):
            llm.swap(timeout_seconds=2, probation_steps=1000, attention=stalling)
        with pytest.raises(SwapError, match="not undone yet"):
            llm.swap(scheduler="priority")
        gate.set()
        wait_until(lambda: llm._loop.engine.epoch == 2)
    assert llm.selection_dict()["plan_digest"] == digest
    value = llm._stack.engine.metrics.registry.get_sample_value
    assert value("drivetrain_swaps_total", {"kind": "attention", "outcome": "rolled back"}) == 1
    assert llm.swap(scheduler="priority").outcome is SwapOutcome.FINALIZED
    assert traffic._run() == traffic.expected
    assert_whole(llm)


def test_an_engine_that_stalls_before_the_commit_is_not_waited_for(llm: LLM, gate: threading.Event) -> None:
    """The commit does not take place any more when the engine comes back."""
    with Traffic(llm, rounds=True):
        llm.swap(probation_steps=0, attention={"name": "faulty", "phase": "stall", "block_size": 4, "after": 0})
        with pytest.raises(SwapError, match="came to no step boundary in time; nothing has changed"):
            llm.swap(timeout_seconds=1, scheduler="priority")
        gate.set()
    assert llm.explain()["scheduler"].chosen.name == "fcfs"
    assert llm._loop.engine.epoch == 1
    assert_whole(llm)


def test_options_without_a_name_are_those_of_the_part_in_use(llm: LLM) -> None:
    """To change one limit must not bring back the default scheduler, nor set its other options back."""
    llm.swap(scheduler={"name": "priority", "max_running": 5, "max_batched_tokens": 64})
    report = llm.swap(scheduler={"max_running": 6})
    assert report.changes == {"scheduler": ("priority", "priority")}
    assert llm.explain()["scheduler"].options == {"max_running": 6, "max_batched_tokens": 64}


def test_a_scheduler_may_allow_any_number_of_requests(llm: LLM) -> None:
    """What never runs takes no memory: such a swap once ended the process for want of it."""
    with Traffic(llm):
        llm.swap(probation_steps=2, scheduler={"name": "fcfs", "max_running": 10**12})
    assert_whole(llm)


@pytest.mark.parametrize("seconds", [0, -1, float("inf"), float("nan"), True, "5", 10**400, 1e300])
def test_a_time_limit_that_is_none_is_refused(llm: LLM, seconds: Any) -> None:
    with pytest.raises(SwapError, match="timeout_seconds must be a number > 0"):
        llm.swap(timeout_seconds=seconds, scheduler="priority")


# --- the vote ------------------------------------------------------------------------------------------------------


class OtherRank:
    """A second rank that answers as it is told: a value, an exception to raise, or None for yes."""

    def __init__(self, answer: object = None, waits: threading.Event | None = None) -> None:
        self._answer, self._waits = answer, waits
        self.asked: list[Ballot] = []

    def vote(self, ballot: Ballot) -> str | None:
        self.asked.append(ballot)
        if self._waits is not None:
            assert self._waits.wait(60)
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ("its memory is full", "rank 1: its memory is full"),
        (ConnectionError("rank 1 is gone"), "rank 1: ConnectionError: rank 1 is gone"),
        ("", "rank 1: "),
    ],
)
def test_a_rank_that_does_not_say_yes_leaves_all_as_it_was(llm: LLM, answer: object, why: str) -> None:
    digest = llm.selection_dict()["plan_digest"]
    llm._loop.peers["rank 1"] = OtherRank(answer)
    with Traffic(llm) as traffic, pytest.raises(SwapError, match=f"not every rank agrees.*{why}"):
        llm.swap(attention={"name": "other-layout", "block_size": 4}, quantizer="exact")
    assert llm._loop.engine.epoch == 0
    assert llm.selection_dict()["plan_digest"] == digest
    assert traffic._run() == traffic.expected
    assert_whole(llm)


def test_a_rank_that_never_answers_says_no(llm: LLM, gate: threading.Event) -> None:
    llm._loop.peers["rank 1"] = OtherRank(waits=gate)
    with Traffic(llm), pytest.raises(SwapError, match=r"not every rank agrees.*rank 1: no answer"):
        llm.swap(timeout_seconds=1, scheduler="priority")
    gate.set()  # its yes comes too late
    assert llm._loop.engine.epoch == 0
    assert llm.explain()["scheduler"].chosen.name == "fcfs"


def test_every_rank_is_asked_about_the_same_swap(llm: LLM) -> None:
    """All say yes: the swap is made, and the plan they voted on is the one that is then in force."""
    others = [OtherRank(), OtherRank()]
    llm._loop.peers.update({f"rank {number}": other for number, other in enumerate(others, 1)})
    assert llm.swap(dry_run=True, scheduler="priority").outcome is SwapOutcome.DRY_RUN
    assert [other.asked for other in others] == [[], []]
    llm.swap(scheduler="priority")
    (ballot,) = others[0].asked
    assert others[1].asked == [ballot]
    assert (ballot.epoch, ballot.changes) == (0, {"scheduler": ("fcfs", "priority")})
    assert ballot.plan_digest == llm.selection_dict()["plan_digest"]


def test_this_rank_says_no_when_the_engine_has_moved_on(llm: LLM) -> None:
    prepared = prepare(llm._stack, load_settings(None, {"attention": "other-layout"}).parts)
    llm.swap(scheduler="priority")
    with pytest.raises(SwapError, match="rank 0: the engine is at epoch 1"):
        put_to_the_vote(llm._stack, prepared, {}, time.monotonic() + 5)


def test_one_swap_at_a_time(llm: LLM) -> None:
    llm._loop._swapping.acquire()
    try:
        with pytest.raises(SwapError, match="under way"):
            llm.swap(scheduler="priority")
    finally:
        llm._loop._swapping.release()


def test_a_closed_engine_swaps_nothing(llm: LLM) -> None:
    llm.close()
    with pytest.raises(DrivetrainError):
        llm.swap(scheduler="priority")


def test_observers_and_metrics_are_told(folder: Path) -> None:
    seen: list[tuple[str, str, str, int]] = []

    class Watcher:
        @hookimpl
        def swap_done(self, kind: str, old: str, new: str, epoch: int) -> None:
            seen.append((kind, old, new, epoch))

    with LLM(folder, engine={"max_model_len": 96}, observers=[Watcher()]) as llm:
        llm.swap(scheduler="priority")
        value = llm._stack.engine.metrics.registry.get_sample_value
        assert value("drivetrain_swaps_total", {"kind": "scheduler", "outcome": "finalized"}) == 1
        assert value("drivetrain_epoch") == 1
    assert seen == [("scheduler", "fcfs", "priority", 1)]
