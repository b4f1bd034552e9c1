"""Steps of a whole engine on a GPU, captured and replayed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from drivetrain import LLM, SamplingParams
from drivetrain.serving import runner
from support.tiny_models import save_tiny

PROMPTS = ["The quick brown fox", "There is more than one way", "x", "Numbers such as 1, 22 and 333", "code: f(y)"]
PARAMS = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    save_tiny("llama", folder)
    return folder


def tokens(model: Path, graphs: str, overlap: str = "auto", **options: Any) -> list[list[int]]:
    engine = {"max_model_len": 128, "kv_memory": "64MiB", "graphs": graphs, "overlap": overlap}
    with LLM(model, platform="cuda", precision="fp32", attention="paged-triton", engine=engine, **options) as llm:
        return [list(result.token_ids) for result in llm.generate(PROMPTS, PARAMS)]


@pytest.mark.parametrize("overlap", ["on", "off"])
@pytest.mark.parametrize("kernels", ["triton", "reference"])
def test_replayed_steps_give_the_tokens_of_plain_ones(model: Path, kernels: str, overlap: str) -> None:
    """In float32, where no two best tokens are so near that another order of sums decides between them."""
    assert tokens(model, "on", overlap, kernels=kernels) == tokens(model, "off", overlap, kernels=kernels)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize("captured", ["in pieces", "whole"])
def test_steps_with_prompts_are_replayed_however_they_are_divided(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, captured: str, architecture: str
) -> None:
    """Prompts in chunks beside decodes, more of them than run at a time, windows in some layers."""
    if captured == "in pieces":
        monkeypatch.setattr(runner, "can_capture_prompts", lambda attention: False)
    save_tiny(architecture, tmp_path)
    scheduler = {"name": "fcfs", "max_running": 3, "max_batched_tokens": 20}
    assert tokens(tmp_path, "on", scheduler=scheduler) == tokens(tmp_path, "off", scheduler=scheduler)


@pytest.mark.parametrize("kv", ["int8", "fp8"])
def test_replayed_steps_over_scaled_keys(model: Path, kv: str) -> None:
    quantizer = {"name": "none", "kv": kv}
    assert tokens(model, "on", quantizer=quantizer) == tokens(model, "off", quantizer=quantizer)
