"""Greedy tokens of a fused model, served, equal those of the same model unfused; also after a swap of its kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch

from drivetrain import LLM, SamplingParams, fusion
from drivetrain.assembly import build_model, resolve_parts
from drivetrain.config import load_settings
from drivetrain.contracts.plugin import Purpose
from drivetrain.errors import ConfigError, FusionError
from support.tiny_models import VOCAB_SIZE, save_tiny

torch.set_num_threads(1)

PARAMS = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
NAMES = ["llama", "llama-bias", "qwen3", "gemma3", "phi3", "olmo2", "granite", "gpt-neox", "stablelm", "qwen3-moe"]


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(2, VOCAB_SIZE, (n,), generator=generator).tolist() for n in (1, 9, 26)]


def opened(folder: Path, fuse: object, **options: Any) -> LLM:
    settings = {"max_model_len": 64, "fuse": fuse}
    options = {"kernels": "reference", "attention": "sdpa", **options}
    return LLM(folder, engine=settings, platform={"name": "cpu", "threads": 1}, **options)


def tokens(llm: LLM) -> list[list[int]]:
    return [list(result.token_ids) for result in llm.generate(prompts(), PARAMS)]


@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_the_same(name: str, tmp_path: Path) -> None:
    save_tiny(name, tmp_path / name)
    with opened(tmp_path / name, False) as llm:
        assert llm.selection_dict()["fusion"] is None
        expected = tokens(llm)
    with opened(tmp_path / name, True) as llm:
        report = llm.selection_dict()["fusion"]
        assert tokens(llm) == expected
    assert report["fused"] or report["left"]


@pytest.mark.parametrize("name", ["llama", "llama-bias", "gemma2", "phi3"])
def test_tokens_are_the_same_with_the_kernels_of_the_machine(name: str, tmp_path: Path) -> None:
    """Whatever ``auto`` takes here, whole layers in one call too: they read the joined weights."""
    save_tiny(name, tmp_path / name)
    chosen = {"kernels": "auto", "attention": "auto"}
    with opened(tmp_path / name, False, **chosen) as llm:
        expected = tokens(llm)
    with opened(tmp_path / name, True, **chosen) as llm:
        assert tokens(llm) == expected
        assert llm.selection_dict()["fusion"]["fused"]


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3", "smollm3-window", "olmo2", "stablelm"])
def test_tokens_are_the_same_with_everything_fused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a provider that has every operation: keys are rotated on their way into the cache, and so on."""
    save_tiny(name, tmp_path / name)
    with opened(tmp_path / name, False) as llm:
        expected = tokens(llm)
    monkeypatch.setattr(fusion, "fuse_model", lambda model, binder: fusion.fuse(model, binder, reference_too=True))
    with opened(tmp_path / name, True) as llm:
        assert llm.selection_dict()["fusion"]["fused"]
        assert tokens(llm) == expected


def test_a_swap_of_kernels_fuses_the_new_model_and_shares_its_weights(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "llama")
    with opened(tmp_path / "llama", True) as llm:
        expected, before = tokens(llm), llm.selection_dict()["fusion"]
        report = llm.swap(kernels="reference")
        assert report.extra_memory_bytes == 0
        assert tokens(llm) == expected
        assert llm.selection_dict()["fusion"] == before


def test_what_was_fused_is_told_in_a_note_to_who_asked_for_it(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "llama")
    for fuse, is_told in ((True, True), ("auto", False)):
        with opened(tmp_path / "llama", fuse) as llm:
            notes = [note for note in llm.selection_dict()["notes"] if note.startswith("fusion: 6 places")]
            assert bool(notes) is is_told
            assert len(llm.selection_dict()["fusion"]["fused"]) > 0


def test_layers_that_run_in_one_call_are_left_alone_unless_told(tmp_path: Path) -> None:
    """There is nothing to gain, and joining weights takes time and memory at the start."""
    save_tiny("llama", tmp_path / "llama")
    parts = {"kernels": "cpu", "attention": "paged-cpu"}
    with opened(tmp_path / "llama", "auto", **parts) as llm:
        assert llm.selection_dict()["fusion"] is None
        assert llm.selection_dict()["not_fused"] == "the kernels of cpu run whole layers in one call"
    for changed in ({"kernels": "reference"}, {"attention": "sdpa"}):
        with opened(tmp_path / "llama", "auto", **{**parts, **changed}) as llm:
            assert llm.selection_dict()["fusion"] is not None


def test_a_model_that_changes_is_an_error_or_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(model: object, binder: object) -> None:
        raise FusionError("the outputs are not the same")

    save_tiny("llama", tmp_path / "llama")
    monkeypatch.setattr(fusion, "fuse_model", refuse)
    with pytest.raises(FusionError, match="not the same"):
        opened(tmp_path / "llama", True)
    with opened(tmp_path / "llama", "auto") as llm:
        assert "not fused: the outputs are not the same" in llm.selection_dict()["notes"]
        assert llm.selection_dict()["fusion"] is None


def test_a_model_for_training_keeps_its_parameters(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "llama")
    settings = load_settings(None, {"model": str(tmp_path / "llama"), "engine": {"fuse": True}}, [])
    parts = resolve_parts(settings, purpose=Purpose.TRAIN)
    model, binder = build_model(parts, parts.kernels, parts.quantizer)
    assert binder.fusion is None
    assert "model.layers.0.self_attn.q_proj.weight" in dict(cast(torch.nn.Module, model).named_parameters())


def test_another_value_is_an_error(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "llama")
    with pytest.raises(ConfigError, match=r"engine\.fuse"):
        opened(tmp_path / "llama", "sometimes")
