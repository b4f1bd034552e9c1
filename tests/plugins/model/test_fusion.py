"""A fused model scores as it did: every architecture, with and without a cache, transformers' own models too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from drivetrain.binding import KernelBinder
from drivetrain.contracts.model import BuildContext
from drivetrain.contracts.source import silent
from drivetrain.fusion import FusionReport, fuse
from drivetrain.kernels.reference import ReferenceKernels
from drivetrain.plugins.attention.sdpa import SdpaAttention
from drivetrain.plugins.model.decoder import DecoderModel
from drivetrain.plugins.model.transformers import TransformersModel
from support.paging import Pages, whole_batch
from support.swap_parts import ExactQuantizer
from support.tiny_models import VOCAB_SIZE, FolderCheckpoint, other_tiny_configs, save_tiny, tiny_configs

torch.set_num_threads(1)

CPU = torch.device("cpu")
DECODER = [*tiny_configs()]
LIBRARY = [*other_tiny_configs(), "llama", "gemma2", "qwen3", "olmo2"]
STEPS = ({0: 9, 1: 4}, {0: 1, 1: 1}, {1: 3, 0: 1}, {0: 1, 1: 1})


def build(plugin: Any, folder: Path, quantizer: Any = None, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    binder = KernelBinder([("reference", ReferenceKernels(ReferenceKernels.Config()))])
    context = BuildContext(CPU, dtype, binder.bind, quantizer, silent)
    return plugin(plugin.Config()).build(FolderCheckpoint(folder), context), binder


@torch.inference_mode()
def scores(model: Any) -> list[torch.Tensor]:
    """Scores of a packed forward without a cache, and of a few mixed steps over one."""
    attention = SdpaAttention(SdpaAttention.Config(block_size=4))
    spec = model.spec.attention
    ids = torch.randint(0, VOCAB_SIZE, (40,), generator=torch.Generator().manual_seed(3))
    positions = torch.cat((torch.arange(9), torch.arange(4)))
    step = attention.begin(spec, whole_batch([9, 4]), None)
    found = [model.logits(model(ids[:13], positions, step))]
    pages, start = Pages(spec, 4, 16), 0
    cache = attention.allocate(spec, pages.num_blocks, CPU)
    for new_tokens in STEPS:
        batch = pages.batch(new_tokens)
        own = ids[start : start + batch.num_tokens]
        start += batch.num_tokens
        found.append(model.logits(model(own, pages.positions(batch), attention.begin(spec, batch, cache))))
    return found


def patterns_of(report: FusionReport) -> set[str]:
    return {one.pattern for one in report.fused}


def check(plugin: Any, folder: Path) -> FusionReport:
    """Fused as far as can be, and then once more."""
    model, binder = build(plugin, folder)
    wanted, state = scores(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = fuse(model, binder, reference_too=True)
    assert report.num_layers == model.spec.num_layers
    torch.testing.assert_close(scores(model), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert fuse(model, binder, reference_too=True).fused == ()
    return report


@pytest.mark.parametrize("name", DECODER)
def test_the_decoder_scores_the_same(name: str, tmp_path: Path) -> None:
    save_tiny(name, tmp_path / name)
    report = check(DecoderModel, tmp_path / name)
    assert {"rope_write"} <= patterns_of(report)


def test_what_is_fused_in_a_llama(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "llama")
    report = check(DecoderModel, tmp_path / "llama")
    assert patterns_of(report) == {"shared_input", "gated_linear", "add_norm", "rope_write"}
    assert sum(one.pattern == "add_norm" for one in report.fused) == 2 * report.num_layers


def test_a_granite_says_why_its_sums_stay(tmp_path: Path) -> None:
    """Its residual stream is scaled, which no operation covers."""
    save_tiny("granite", tmp_path / "granite")
    report = check(DecoderModel, tmp_path / "granite")
    assert any("a sum that is scaled" in one.reason for one in report.left)


@pytest.mark.parametrize("name", LIBRARY)
def test_transformers_models_score_the_same(name: str, tmp_path: Path) -> None:
    save_tiny(name, tmp_path / name)
    report = check(TransformersModel, tmp_path / name)
    assert report.fused or report.left


def test_what_is_fused_in_transformers_llama(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "llama")
    report = check(TransformersModel, tmp_path / "llama")
    assert patterns_of(report) == {"norm", "gated_linear", "shared_input", "add_norm"}
    assert report.operations_after < report.operations_before


def test_bfloat16_stays_within_its_tolerance(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "llama")
    for plugin in (DecoderModel, TransformersModel):
        model, binder = build(plugin, tmp_path / "llama", dtype=torch.bfloat16)
        wanted = scores(model)
        fuse(model, binder, reference_too=True)
        for found, expected in zip(scores(model), wanted, strict=True):
            assert float((found - expected).float().norm() / expected.float().norm()) < 5e-2


def test_quantized_projections_are_left_with_a_reason(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "llama")
    model, binder = build(DecoderModel, tmp_path / "llama", ExactQuantizer(ExactQuantizer.Config()))
    wanted = scores(model)
    report = fuse(model, binder, reference_too=True)
    assert patterns_of(report) == {"add_norm", "rope_write"}
    assert any("q_proj is a ExactLinear, which is no plain product" in one.reason for one in report.left)
    assert any("gate and up are of ExactLinear" in one.reason for one in report.left)
    torch.testing.assert_close(scores(model), wanted, rtol=1e-4, atol=1e-4)


def test_a_fused_decoder_trains_as_it_did(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "llama")
    gradients = []
    for is_fused in (False, True):
        model, binder = build(DecoderModel, tmp_path / "llama")
        if is_fused:
            fuse(model, binder, reference_too=True)
        ids, positions = torch.arange(7), torch.arange(7)
        step = SdpaAttention(SdpaAttention.Config()).begin(model.spec.attention, whole_batch([7]), None)
        model.logits(model(ids, positions, step)).square().mean().backward()
        gradients.append(
            torch.cat([p.grad.flatten().sort().values for p in sorted(model.parameters(), key=lambda p: p.numel())])
        )
    total = [float(one.norm()) for one in gradients]
    assert total[0] == pytest.approx(total[1], rel=1e-5)
    torch.testing.assert_close(gradients[0].sort().values, gradients[1].sort().values, rtol=1e-3, atol=1e-6)
