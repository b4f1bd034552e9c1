"""Rules of the paged-triton backend: its plan of a step, what its probe refuses, and, in Triton's interpreter, the
conformance suite and what that does not ask."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from drivetrain.contracts.attention import AttentionBatch, AttentionSpec, LayerAttention
from drivetrain.contracts.model import ModelSpec
from drivetrain.contracts.platform import PlatformFacts
from drivetrain.contracts.plugin import ProbeContext
from drivetrain.errors import EngineError
from drivetrain.plugins.attention.paged_triton import PagedTritonAttention, StepPlan
from drivetrain.testing.run import Report
from support.interpreted import (
    InterpretedAttention,
    expect_no_failure,
    has_interpreter,
    has_triton,
    names_of_tests,
    run_in_interpreter,
    run_interpreted_suite,
)


def plan_of(lengths: list[int], contexts: list[int], *, cached: bool = True) -> StepPlan:
    starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    kv_lengths = torch.tensor(lengths) + torch.tensor(contexts)
    return StepPlan(AttentionBatch(lengths, contexts, starts, kv_lengths.to(torch.int32)), cached, None)


# --- the plan ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows_of_token", [1, 3, 4])
def test_tiles_cover_every_row_of_every_prompt_once(rows_of_token: int) -> None:
    lengths = [5, 1, 40, 17]
    tiles = plan_of(lengths, [0, 9, 3, 0]).tiles(rows_of_token, 16)
    assert tiles.dtype == torch.int32
    covered = {(s, row) for s, first in tiles.tolist() for row in range(first, first + 16)}
    wanted = {(s, row) for s in (0, 2, 3) for row in range(lengths[s] * rows_of_token)}
    assert wanted <= covered
    assert len(tiles) == sum(-(-lengths[s] * rows_of_token // 16) for s in (0, 2, 3))


def test_tiles_with_most_keys_come_first() -> None:
    tiles = plan_of([64, 32], [0, 1000]).tiles(1, 16).tolist()
    assert tiles[0] == [1, 16]
    assert [first for s, first in tiles if s == 0] == [48, 32, 16, 0]


def test_without_a_cache_a_single_token_is_a_prompt_like_any_other() -> None:
    alone, cached = plan_of([1, 3], [0, 0], cached=False), plan_of([1, 3], [0, 0])
    assert (alone.tiles(1, 16).shape[0], alone.has_decodes) == (2, False)
    assert (cached.tiles(1, 16).shape[0], cached.has_decodes) == (1, True)


# --- the plugin ----------------------------------------------------------------------------------------------------


def context(device_type: str, head_size: int = 64, dtype: str = "bfloat16") -> ProbeContext:
    facts = PlatformFacts("p", device_type, "device", 1, frozenset({dtype}), "arch", "gloo")
    spec = AttentionSpec((LayerAttention(4, 2, head_size, 1.0),), dtype)
    model = ModelSpec("LlamaForCausalLM", 128, 4 * head_size, 1, 4096, 10_000, spec)
    return ProbeContext(platform=facts, dtype=dtype, model=model)


@has_triton
def test_the_probe_takes_a_gpu_and_refuses_what_the_kernels_do_not_do() -> None:
    assert PagedTritonAttention.probe(context("cuda")).ok
    assert PagedTritonAttention.probe(context("cuda", head_size=256)).ok
    assert PagedTritonAttention.probe(context("cpu")).code == "no_device"
    assert PagedTritonAttention.probe(context("xpu")).code == "no_device"
    assert PagedTritonAttention.probe(context("cuda", dtype="float64")).code == "unsupported_dtype"
    refused = PagedTritonAttention.probe(context("cuda", head_size=512))
    assert (refused.code, refused.wanted, refused.offered) == ("unsupported_shape", "512", "256")


def test_context_without_a_cache_is_an_error() -> None:
    backend = PagedTritonAttention(PagedTritonAttention.Config())
    spec = AttentionSpec((LayerAttention(1, 1, 8, 1.0),), "float32")
    batch = AttentionBatch([1], [3], torch.tensor([0, 1]), torch.tensor([4]))
    with pytest.raises(EngineError, match="no cache was given"):
        backend.begin(spec, batch, None)


# --- in the interpreter --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report() -> Report:
    return run_interpreted_suite(InterpretedAttention, "paged-triton")


@has_interpreter
@pytest.mark.slow
@pytest.mark.parametrize("test", names_of_tests(InterpretedAttention))
def test_the_suite_passes(report: Report, test: str) -> None:
    not_claimed = ("test_a_sequence_does_not_feel_its_neighbours", "test_a_cache_of_another_layout_is_converted")
    may_skip = (*not_claimed, "test_a_step_stays_on_the_device")
    expect_no_failure(report, test, may_skip=may_skip)


@has_interpreter
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_the_suite_does_not_ask() -> None:
    folder = Path(__file__).parent / "interpreted"
    run_in_interpreter(folder, "check_paged_triton.py", "check_decode_steps.py", "check_prompt_steps.py")
