"""What quantizers cost a real model in quality, and that their memory is what was foreseen.

The reference is float32, with weights as dequantized from the model's Q4_1 file.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from drivetrain import LLM
from drivetrain.assembly import build_model, resolve_parts, weigh_model
from drivetrain.config import load_settings
from drivetrain.serving.swap import prepare
from drivetrain.testing.measure import Allocations
from support.allocations import LiveBytes
from support.perplexity import perplexity

pytestmark = pytest.mark.model

ENGINE = {"max_model_len": 272, "prefix_cache": False}


def lossy(name: str, **options: Any) -> dict[str, Any]:
    return {"name": name, "allow_lossy": True, **options}


BOUNDS: tuple[tuple[dict[str, Any], float], ...] = (
    (lossy("int8"), 0.005),
    (lossy("w8a8", scales="block"), 0.02),
    (lossy("fp8"), 0.08),
    (lossy("int4", group=32, rules={"lm_head": lossy("int8")}), 0.06),
)
"""Quantizer -> how much perplexity may rise."""


@pytest.fixture(scope="module")
def llm(smollm2: Path) -> Iterator[LLM]:
    with LLM(smollm2, precision="fp32", quantizer="none", engine=ENGINE) as llm:
        yield llm


@pytest.fixture(scope="module")
def full(llm: LLM) -> float:
    return perplexity(llm, 2048)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("part", "bound"), BOUNDS, ids=str)
def test_perplexity_stays_near_that_of_full_weights(llm: LLM, full: float, part: Any, bound: float) -> None:
    """Over 2,048 tokens of English, in the engine that has the quantizer swapped in."""
    llm.swap(quantizer=part)
    found = perplexity(llm, 2048)
    assert found / full - 1 < bound, f"perplexity {found:.3f}, with full weights {full:.3f}"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_memory_of_a_swap_is_what_was_foreseen(llm: LLM) -> None:
    """The process never takes more than the stated peak beside what it had, and keeps a tied table only once."""
    part = lossy("int8")
    plan = llm.swap(dry_run=True, quantizer=part)
    assert plan.extra_memory_bytes < 130 * 2**20
    prepare(llm._stack, load_settings(None, {"quantizer": part}).parts)  # kernels compile, and libraries are loaded
    before = _reset_peak()
    prepared = prepare(llm._stack, load_settings(None, {"quantizer": part}).parts)
    peak = _peak()
    assert prepared.extra_memory_bytes == plan.extra_memory_bytes
    # Pages of the mapped file count as the process's own once they are read.
    mapped = llm._stack.parts.checkpoint.stored_bytes()  # type: ignore[union-attr]
    assert peak - before <= plan.peak_memory_bytes + mapped


def _reset_peak() -> int:
    """Forget the process's peak; returns what it has now, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024


def test_blocks_of_the_file_are_foreseen_and_taken_without_a_copy(smollm2: Path) -> None:
    """They are views of the file: the peak is what the model holds, and norms on their way."""
    chosen = {"model": str(smollm2), "quantizer": "gguf", "precision": "fp32", "engine": {"fuse": False}}
    parts = resolve_parts(load_settings(None, chosen), leave_out=("frontend",))
    with Allocations() as allocations:
        foreseen = weigh_model(parts, parts.quantizer)
    assert allocations.largest_bytes < 2**20
    with LiveBytes() as live:
        build_model(parts, parts.kernels, parts.quantizer)
    assert live.most <= foreseen.peak_bytes < 1.1 * foreseen.total_bytes
