"""The ledger knows a model's bytes before it is made, to the byte, and what making it takes at most."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from drivetrain import LLM
from drivetrain.assembly import resolve_parts, weigh_model
from drivetrain.config import load_settings
from drivetrain.packed.ledger import model_bytes
from drivetrain.packed.packing import SCRATCH_BYTES, WEIGHTS_AT_ONCE, pack_rows
from drivetrain.plugins.quantizer.fp8 import round_to_float8
from drivetrain.plugins.quantizer.int4 import pack_int4
from drivetrain.plugins.quantizer.int8 import pack_int8
from drivetrain.serving.swap import prepare
from drivetrain.testing.measure import Allocations
from support.allocations import LiveBytes
from support.tiny_models import save_tiny

INT4 = {"name": "int4", "group": 16}
CASES: tuple[tuple[Any, str], ...] = (
    ("none", "bf16"),
    ("int8", "fp32"),
    ({"name": "fp8", "activations": "dynamic"}, "bf16"),
    ({"name": "int8", "rules": {"layers.1": "none", "layers.2.self_attn.q_proj": INT4}}, "fp32"),
)


def options(folder: Path, quantizer: Any, precision: str = "fp32") -> dict[str, Any]:
    return {
        "model": str(folder),
        "quantizer": quantizer,
        "precision": precision,
        "platform": {"name": "cpu", "threads": 1},
        "engine": {"max_model_len": 96},
    }


@pytest.fixture(scope="module", params=["llama3", "gemma3", "phi", "cohere2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ours and the library's modules, tied and not."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("models") / request.param
    save_tiny(request.param, folder)
    return folder


@pytest.mark.parametrize(("quantizer", "precision"), CASES, ids=str)
def test_what_is_foreseen_is_what_is_held(folder: Path, quantizer: Any, precision: str) -> None:
    """Counted from the built model's own tensors; nothing is read to foresee it."""
    chosen = options(folder, quantizer, precision)
    parts = resolve_parts(load_settings(None, chosen), leave_out=("frontend",))
    with Allocations() as allocations:
        foreseen = weigh_model(parts, parts.quantizer)
    assert allocations.largest_bytes < foreseen.total_bytes / 4, "something large was made"
    assert foreseen.is_exact
    with LLM(chosen.pop("model"), **chosen) as llm:
        model: Any = llm._stack.engine.runner.model
        ledger = llm._stack.binder.ledger
        assert ledger is not None
        assert (ledger.rows, ledger.other_bytes) == (foreseen.rows, foreseen.other_bytes)
        if not llm._stack.selection_dict()["fusion"]:  # fusing makes tensors of its own
            assert model_bytes(model) == foreseen.total_bytes
        assert llm.swap(dry_run=True, quantizer=quantizer).extra_memory_bytes == foreseen.total_bytes


def test_a_dry_run_foresees_what_a_swap_then_holds(folder: Path) -> None:
    with LLM(folder, precision="fp32", platform={"name": "cpu", "threads": 1}, engine={"max_model_len": 96}) as llm:
        for part in ("int8", "fp8", "none"):
            plan = llm.swap(dry_run=True, quantizer=part)
            report = llm.swap(quantizer=part)
            assert report.extra_memory_bytes == plan.extra_memory_bytes
            assert report.peak_memory_bytes == plan.peak_memory_bytes > report.extra_memory_bytes


@pytest.mark.parametrize("quantizer", ["int8", INT4, "fp8"], ids=str)
def test_the_peak_that_was_foreseen_is_kept(tmp_path: Path, quantizer: Any) -> None:
    """All that torch holds at any moment of a swap's preparation, traced operation by operation."""
    save_tiny("llama3", tmp_path / "model")
    options: dict[str, Any] = {"kernels": "reference", "attention": "sdpa", "platform": {"name": "cpu", "threads": 1}}
    with LLM(tmp_path / "model", precision="fp32", engine={"max_model_len": 96}, **options) as llm:
        plan = llm.swap(dry_run=True, quantizer=quantizer)
        with LiveBytes() as live:
            prepared = prepare(llm._stack, load_settings(None, {"quantizer": quantizer}).parts)
    assert prepared.extra_memory_bytes < live.most <= plan.peak_memory_bytes


PACKS = {
    "int8": pack_int8,
    "int4": lambda weight: pack_int4(weight, 64),
    "int4 search": lambda weight: pack_int4(weight, 64, searches=True),
    "fp8": lambda weight: pack_rows(weight, round_to_float8),
}


@pytest.mark.parametrize("pack", PACKS.values(), ids=PACKS.keys())
def test_packing_a_large_layer_takes_little_beside_it(pack: Any) -> None:
    """However large the layer: beside it and its packed form, no more than the ledger counts on."""
    weight = torch.randn(4096, 1024)
    assert weight.numel() > 8 * WEIGHTS_AT_ONCE
    with LiveBytes() as live:
        made = pack(weight)
    kept = sum(t.nbytes for t in (made if isinstance(made, dict) else made.tensors).values())
    assert live.most - kept <= SCRATCH_BYTES
