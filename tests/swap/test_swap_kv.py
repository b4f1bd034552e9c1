"""Keys and values as int8 and fp8 in an engine: from the start, and by a swap with requests in flight."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from drivetrain import LLM, SamplingParams
from drivetrain.assembly import resolve_parts
from drivetrain.config import load_settings
from drivetrain.contracts.attention import PAGED_SCALED, ScaledCache
from drivetrain.contracts.plugin import Probe, ProbeContext
from drivetrain.contracts.versions import ContractVersion, fit
from drivetrain.errors import NoCandidateError, PluginError, SwapError
from drivetrain.plugins.attention.sdpa import SdpaAttention
from drivetrain.registry import Registry
from drivetrain.serving.swap import SwapOutcome
from support.swap_parts import refs_with_swap_parts
from support.tiny_models import save_tiny

GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
PROMPTS = [[3 + i, 5, 7, 9 + i, 2 + i % 3, *range(4, 4 + i)] for i in range(12)]
FORMATS = ("int8", "fp8")
FULL: dict[str, Any] = {"quantizer": {"name": "none"}}


def kept_as(kv: str) -> dict[str, Any]:
    return {"quantizer": {"name": "none", "kv": kv}}


@pytest.fixture(scope="module", params=["llama3", "gemma2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with full attention only, and one whose windowed layers free blocks."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("models") / request.param
    save_tiny(request.param, folder)
    return folder


@contextmanager
def serving(folder: Path, attention: str = "sdpa", kv: str = "auto", **engine: Any) -> Iterator[LLM]:
    scheduler = {"name": "fcfs", "max_batched_tokens": engine.pop("max_batched_tokens", 512), "max_running": 64}
    options: dict[str, Any] = {"platform": {"name": "cpu", "threads": 1}, "engine": {"max_model_len": 96, **engine}}
    chosen = {"attention": {"name": attention, "block_size": 4}, "scheduler": scheduler, **kept_as(kv)}
    with LLM(folder, **chosen, **options) as llm:
        llm._stack.parts.registry = Registry(refs_with_swap_parts())
        yield llm


def run(llm: LLM, prompts: Any = PROMPTS) -> list[tuple[int, ...]]:
    return [result.token_ids for result in llm.generate(prompts, GREEDY)]


@contextmanager
def traffic(llm: LLM) -> Iterator[list[tuple[int, ...]]]:
    """Requests in flight, in two threads of their own, for as long as it takes; what came of the last is there."""
    found: list[tuple[int, ...]] = []
    is_over = threading.Event()

    def generate() -> None:
        while not is_over.is_set():
            found[:] = run(llm)
            assert [len(tokens) for tokens in found] == [40] * len(PROMPTS), "a request was dropped or cut"

    engine = llm._loop.engine
    before = engine.metrics.num_steps
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(generate) for _ in range(2)]
        while engine.metrics.num_steps < before + 3:
            time.sleep(0.001)
        try:
            yield found
        finally:
            is_over.set()
        for one in both:
            one.result()


def assert_whole(llm: LLM) -> None:
    engine = llm._loop.engine
    engine.kv.check()
    assert [pool.num_used for pool in engine.kv.pools] == [0 for _ in engine.kv.pools]
    assert engine.num_running == engine.num_waiting == 0


# --- from the start --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv", FORMATS)
@pytest.mark.parametrize("attention", ["sdpa", "paged-cpu"])
def test_chunks_prefixes_and_preemption_change_no_token(folder: Path, attention: str, kv: str) -> None:
    """Keys that were rounded when they were written are the same however a prompt is cut, whoever computed them, and
    when they are computed anew."""
    with serving(folder, attention, kv, prefix_cache=False) as llm:
        assert isinstance(llm._loop.engine.runner.cache, ScaledCache)
        expected = run(llm)
    with serving(folder, attention, kv, max_batched_tokens=13) as llm:
        assert run(llm) == expected
        assert run(llm) == expected
        assert llm.stats()["prefix_hit_tokens"] > 0
    small = 40 * sum(
        llm._stack.parts.attention.bytes_per_block(llm._loop.engine.runner.spec, group)
        for group in llm._loop.engine.kv.groups
    )
    with serving(folder, attention, kv, kv_memory=str(small), prefix_cache=False) as llm:
        assert run(llm) == expected
        assert llm.stats()["preemptions"] > 0
        assert_whole(llm)


def test_the_same_memory_holds_more_tokens(folder: Path) -> None:
    counts = {}
    for kv in ("auto", *FORMATS):
        with serving(folder, kv=kv, kv_memory="200000") as llm:
            counts[kv] = llm._loop.engine.kv.pools[0].total
            size = llm._loop.engine.runner.spec.layers[0].head_size
    for kv in FORMATS:
        assert counts[kv] / counts["auto"] == pytest.approx(4 * size / (size + 4), rel=0.05)


@pytest.mark.parametrize("kv", FORMATS)
def test_who_can_not_keep_the_format_is_refused(kv: str) -> None:
    """Under ``auto`` with a reason, by name with an error."""
    settings = load_settings(options={"platform": "cpu", **kept_as(kv)})
    report = resolve_parts(settings, leave_out=("frontend",)).report
    flex = next(c for c in report["attention"].candidates if c.name == "flex")
    assert (flex.code, flex.wanted, flex.offered) == ("unsupported_kv", kv, "auto")
    assert kv in flex.reason
    named = load_settings(options={"platform": "cpu", "attention": "flex", **kept_as(kv)})
    with pytest.raises((NoCandidateError, PluginError), match=f"does not keep keys and values as {kv}"):
        resolve_parts(named, leave_out=("frontend",))


class OldAttention(SdpaAttention):
    """A backend that was written before there were KV formats, and whose probe looks at nothing."""

    contract_version = "1.1"

    @classmethod
    def abilities(cls) -> frozenset[str]:
        return frozenset({"training"})

    @classmethod
    def probe(cls, context: ProbeContext) -> Probe:
        return Probe.yes()


def test_a_backend_of_an_older_contract_is_not_given_a_format_that_it_does_not_know() -> None:
    lifted = fit("attention", OldAttention, where="attention/old")
    assert lifted.contract_version == str(ContractVersion.spoken("attention"))
    assert lifted.probe(ProbeContext()).ok
    assert lifted.probe(ProbeContext(kv="int8")).code == "unsupported_kv"


# --- by a swap -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv", FORMATS)
@pytest.mark.parametrize("attention", ["sdpa", "paged-cpu"])
def test_there_and_back_under_load(folder: Path, attention: str, kv: str) -> None:
    """Full keys are scaled and requests go on; the way back computes them anew. Afterwards nothing remembers."""
    with serving(folder, attention, kv) as llm:
        of_format = run(llm)
    with serving(folder, attention) as llm:
        full, model = run(llm), llm._loop.engine.runner.model
        with traffic(llm):
            for _ in range(10):
                report = llm.swap(probation_steps=2, **kept_as(kv))
                assert (report.outcome, report.cache.value) == (SwapOutcome.FINALIZED, "convert")
                assert report.requests_recomputed == 0
                num_kept = report.requests_kept
                assert report.weights is None
                if num_kept:
                    break
                # It fell between two rounds of requests, which both threads ended at once.
                llm.swap(probation_steps=2, **FULL)
        assert num_kept > 0, "nothing was ever in flight"
        runner = llm._loop.engine.runner
        assert runner.model is model, "the weights were loaded again, although they stay as they are"
        assert runner.attention.kv_contract(runner.spec).layout == PAGED_SCALED
        assert isinstance(runner.cache, ScaledCache)
        assert run(llm) == of_format
        assert run(llm) == of_format, "a cached prefix is of another format"
        with traffic(llm):
            report = llm.swap(probation_steps=2, **FULL)
            assert (report.outcome, report.cache.value) == (SwapOutcome.FINALIZED, "recompute")
        assert run(llm) == full
        assert_whole(llm)


def test_from_one_format_to_the_other_all_is_computed_anew(folder: Path) -> None:
    """What was rounded once is not rounded again."""
    with serving(folder, kv="fp8") as llm:
        of_fp8 = run(llm)
    with serving(folder, kv="int8") as llm:
        run(llm)
        assert llm.swap(**kept_as("fp8")).cache.value == "recompute"
        assert run(llm) == of_fp8


def test_backend_format_and_weights_at_once(folder: Path) -> None:
    """Another backend and another quantizer, which keeps int8 too: requests in flight go on, with keys of both."""
    with serving(folder) as llm:
        full = run(llm)
        with traffic(llm):
            there = {"attention": {"name": "paged-cpu", "block_size": 4}, "quantizer": {"name": "exact", "kv": "int8"}}
            report = llm.swap(probation_steps=2, **there)
            assert (report.outcome, report.cache.value) == (SwapOutcome.FINALIZED, "convert")
            assert report.weights is not None
        back = {"attention": {"name": "sdpa", "block_size": 4}, **FULL}
        assert llm.swap(**back).cache.value == "recompute"
        assert run(llm) == full


def test_a_dry_run_tells_the_memory(folder: Path) -> None:
    with serving(folder) as llm:
        spec, kv = llm._loop.engine.runner.spec, llm._loop.engine.kv
        report = llm.swap(dry_run=True, **kept_as("int8"))
        full = sum(
            pool.total * llm._stack.parts.attention.bytes_per_block(spec, group)
            for pool, group in zip(kv.pools, kv.groups, strict=True)
        )
        assert report.cache.value == "convert"
        assert report.extra_memory_bytes == full * (spec.layers[0].head_size + 4) // (4 * spec.layers[0].head_size)
        assert llm._loop.engine.runner.spec.kv == "auto"


def test_a_backend_that_can_not_keep_it_is_no_part_of_a_swap(folder: Path) -> None:
    """Nor does the live one change to something else in silence."""
    with serving(folder) as llm:
        expected = run(llm)
        llm.swap(attention={"name": "plain-only", "block_size": 4})
        with pytest.raises(SwapError, match="plain-only does not keep keys and values that way") as caught:
            llm.swap(**kept_as("int8"))
        assert "attention" in str(caught.value)
        assert llm._loop.engine.epoch == 1
        assert run(llm) == expected


def test_a_fault_on_probation_brings_full_keys_back(folder: Path) -> None:
    with serving(folder) as llm:
        expected = run(llm)
        with traffic(llm) as found:
            parts = {"scheduler": {"name": "faulty", "phase": "raise"}, **kept_as("int8")}
            report = llm.swap(probation_steps=1000, **parts)
            assert report.outcome is SwapOutcome.ROLLED_BACK
        runner = llm._loop.engine.runner
        assert runner.spec.kv == llm._stack.parts.context.kv == "auto"
        assert not isinstance(runner.cache, ScaledCache)
        assert found
        assert run(llm) == expected
        assert_whole(llm)
