"""Training on a GPU: the losses are those of a CPU, whatever the policy, the precision, and the way through a save."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from drivetrain import LLM, SamplingParams, Trainer
from support.quantized_models import save_round_sizes
from support.training import read_figures, run_settings, write_chats

STEPS = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training") / "llama"
    save_round_sizes(folder, hidden_size=256, intermediate_size=512, num_hidden_layers=3)
    return folder


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chats(tmp_path_factory.mktemp("training") / "chats.jsonl")


@pytest.fixture(scope="module")
def wanted(model: Path, chats: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[float, ...]:
    """Losses on the CPU in float32, by the reference parts."""
    settings = run_settings(model, chats, tmp_path_factory.mktemp("wanted"), steps=STEPS, micro_batch=4)
    return Trainer(**settings, kernels="reference", attention="sdpa").run().losses


def settings_of(model: Path, data: Path, folder: Path, trainer: dict[str, Any] | None = None, **parts: Any) -> Any:
    settings = run_settings(model, data, folder, **{"steps": STEPS, "micro_batch": 4, **(trainer or {})})
    chosen = {
        "platform": "cuda",
        "precision": "fp32",
        "kernels": {"name": "triton", "tune": False},
        "attention": {"name": "paged-triton", "tune": False},
    }
    return {**settings, **chosen, **parts}


@pytest.mark.parametrize("kernels", ["triton", "reference"])
@pytest.mark.parametrize("attention", ["paged-triton", "sdpa"])
def test_losses_are_those_of_the_cpu(
    model: Path, chats: Path, tmp_path: Path, wanted: tuple[float, ...], attention: str, kernels: str
) -> None:
    named: dict[str, Any] = {"attention": attention, "kernels": kernels}
    parts = {kind: {"name": name, "tune": False} if "triton" in name else name for kind, name in named.items()}
    found = Trainer(**settings_of(model, chats, tmp_path, **parts)).run().losses
    assert found == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("policy", ["none", "full", "selective", "offload"])
def test_bf16_under_every_policy(
    model: Path, chats: Path, tmp_path: Path, wanted: tuple[float, ...], policy: str
) -> None:
    """Recomputed and offloaded activations are those that were there: every policy stays as near as none."""
    checkpoint = {"name": "offload", "smallest": 0} if policy == "offload" else policy
    settings = settings_of(model, chats, tmp_path, precision="bf16", checkpoint=checkpoint)
    assert Trainer(**settings).run().losses == pytest.approx(wanted, rel=0.03)


def test_policies_give_the_losses_of_none(model: Path, chats: Path, tmp_path: Path) -> None:
    found = {}
    for policy in ("none", "full", "selective", "offload"):
        checkpoint = {"name": "offload", "smallest": 0} if policy == "offload" else policy
        settings = settings_of(model, chats, tmp_path / policy, {"steps": 3}, checkpoint=checkpoint)
        found[policy] = Trainer(**settings).run().losses
    assert all(losses == pytest.approx(found["none"], rel=1e-5) for losses in found.values())


def test_fp16_with_a_loss_scale(model: Path, chats: Path, tmp_path: Path, wanted: tuple[float, ...]) -> None:
    precision = {"name": "fp16", "initial_scale": 2.0**30, "growth_steps": 4}
    settings = settings_of(model, chats, tmp_path, {"steps": 30}, precision=precision)
    losses = Trainer(**settings).run().losses
    figures = read_figures(tmp_path)
    skipped = [line["skipped"] for line in figures]
    assert skipped[0] == 1.0, "a scale of 2**30 overflows float16"
    assert 0.0 in skipped
    assert figures[-1]["loss_scale"] < 2.0**30
    assert losses[0] == pytest.approx(wanted[0], rel=0.02)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_interrupted_run_goes_on(model: Path, chats: Path, tmp_path: Path, precision: str) -> None:
    """Six steps at once, and three with three more by another trainer; the trained model is served on the device."""
    whole = Trainer(**settings_of(model, chats, tmp_path / "whole", precision=precision)).run().losses
    store = {"name": "dcp", "folder": str(tmp_path / "cut" / "state"), "every": 3, "background": True}
    cut = settings_of(model, chats, tmp_path / "cut", precision=precision, store=store)

    class Stop(Exception):
        pass

    def stop(result: Any, steps: int) -> None:
        if result.step == 4:
            raise Stop

    with pytest.raises(Stop):
        Trainer(**cut).run(on_step=stop)
    result = Trainer(**cut).run()
    assert result.losses == pytest.approx(whole[3:], rel=1e-4 if precision == "fp32" else 2e-2)
    assert result.folder is not None
    with LLM(result.folder, platform="cuda", engine={"max_model_len": 96, "kv_memory": "16MiB"}) as llm:
        assert len(llm.generate([[5, 6, 7]], SamplingParams(max_tokens=4, ignore_eos=True))[0].token_ids) == 4
    assert torch.cuda.memory_allocated() > 0
