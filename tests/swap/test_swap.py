"""Law 9: parts are exchanged in a running engine, and no request notices more than a moment."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from drivetrain import LLM, SamplingParams
from drivetrain.errors import ConfigError, DrivetrainError, PluginError, SwapError
from drivetrain.observers import hookimpl
from drivetrain.registry import Registry
from drivetrain.serving.swap import SwapOutcome
from support.swap_parts import refs_with_swap_parts
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
    """Requests in flight, in a thread of their own, and what must come of them."""

    def __init__(self, llm: LLM, params: SamplingParams = GREEDY) -> None:
        self._llm, self._params = llm, params
        self.expected = self._run()
        self.results: list[Any] = []
        self._failure: BaseException | None = None
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._record)

    def _run(self) -> list[Any]:
        results = self._llm.generate(PROMPTS, self._params)
        return [[(c.token_ids, c.text, c.finish_reason) for c in result.completions] for result in results]

    def _record(self) -> None:
        try:
            self.results = self._run()
        except BaseException as error:
            self._failure = error

    def __enter__(self) -> Traffic:
        engine = self._llm._loop.engine
        before = engine.metrics.snapshot()["steps"]
        self._thread.start()
        while engine.metrics.snapshot()["steps"] < before + 2:
            pass
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        assert self.results == self.expected


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


def test_chunks_carry_the_epoch_that_made_them(llm: LLM) -> None:
    stream = llm.stream(PROMPTS[0], GREEDY)
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
    with Traffic(llm) as traffic:
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
    ],
)
def test_bad_input_is_refused(llm: LLM, parts: Any, error: type[DrivetrainError], message: str) -> None:
    with pytest.raises(error, match=message):
        llm.swap(**parts)


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
