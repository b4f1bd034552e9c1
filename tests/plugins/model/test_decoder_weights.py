"""Rules of loading weights: every fault is found before a tensor is read and named in full; quantizers see each linear
layer as soon as it is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from drivetrain.contracts.model import BuildContext
from drivetrain.contracts.quantizer import Quantizer
from drivetrain.errors import LoaderError, MissingTensorError
from drivetrain.kernels.reference import ReferenceKernels
from drivetrain.plugins.model.decoder import DecoderModel
from support.tiny_models import FolderCheckpoint, save_tiny

torch.set_num_threads(1)

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


class Doubler(Quantizer):
    """Replaces layers by ones that return twice the product, all but those it must not touch."""

    def __init__(self) -> None:
        super().__init__(self.Config())
        self.seen: list[str] = []

    def bits_per_weight(self) -> float | None:
        return None

    def convert(self, name: str, linear: torch.nn.Linear) -> torch.nn.Module:
        assert not any(parameter.is_meta for parameter in linear.parameters())
        self.seen.append(name)
        return linear if name == "lm_head" else torch.nn.Sequential(linear, Twice())


class Twice(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


@pytest.fixture
def checkpoint(tmp_path: Path) -> FolderCheckpoint:
    save_tiny("llama", tmp_path)
    return FolderCheckpoint(tmp_path)


def build(checkpoint: FolderCheckpoint, quantizer: Quantizer | None = None, progress: Any = None) -> Any:
    bind = ReferenceKernels(ReferenceKernels.Config()).make
    steps = progress if progress is not None else lambda *advance: None
    context = BuildContext(torch.device("cpu"), torch.float32, bind, quantizer, steps)
    return DecoderModel(DecoderModel.Config()).build(checkpoint, context)


def test_every_missing_tensor_is_named(checkpoint: FolderCheckpoint) -> None:
    gone = [name for name in checkpoint.tensors if ".mlp." in name]
    for name in gone:
        del checkpoint.tensors[name]
    with pytest.raises(MissingTensorError) as caught:
        build(checkpoint)
    assert all(name in str(caught.value) for name in gone)
    assert str(checkpoint.path) in str(caught.value)


def test_a_tensor_the_model_has_no_place_for_is_an_error(checkpoint: FolderCheckpoint) -> None:
    checkpoint.tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(48)
    with pytest.raises(LoaderError, match=r"no place for: model\.layers\.0\.self_attn\.q_proj\.bias"):
        build(checkpoint)


def test_stored_rope_frequencies_are_harmless(checkpoint: FolderCheckpoint) -> None:
    checkpoint.tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    build(checkpoint)


def test_a_shape_that_differs_is_named_with_both_shapes(checkpoint: FolderCheckpoint) -> None:
    checkpoint.tensors[Q_PROJ] = checkpoint.tensors[Q_PROJ][:-1].clone()
    with pytest.raises(LoaderError, match=r"layers\.1\.self_attn\.q_proj.*expected \(48, 48\), found \(47, 48\)"):
        build(checkpoint)


def test_tied_embeddings_share_memory_and_must_agree_with_the_files(tmp_path: Path) -> None:
    save_tiny("smollm2", tmp_path)
    checkpoint = FolderCheckpoint(tmp_path)
    module = build(checkpoint)
    assert module.lm_head.weight is module.model.embed_tokens.weight
    checkpoint.tensors["lm_head.weight"] = checkpoint.tensors["model.embed_tokens.weight"].clone()
    build(checkpoint)
    checkpoint.tensors["lm_head.weight"][0, 0] += 1
    with pytest.raises(LoaderError, match="tie_word_embeddings"):
        build(checkpoint)


def test_parameters_are_copies_of_the_files_tensors(checkpoint: FolderCheckpoint) -> None:
    before = checkpoint.tensors[Q_PROJ].clone()
    module = build(checkpoint)
    with torch.no_grad():
        module.get_parameter(Q_PROJ).zero_()
    assert torch.equal(checkpoint.tensors[Q_PROJ], before)


def test_a_quantizer_gets_each_linear_layer_once_with_its_weights(checkpoint: FolderCheckpoint) -> None:
    quantizer = Doubler()
    module = build(checkpoint, quantizer)
    names = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]
    expected = {
        f"model.layers.{layer}.{part}.{name}"
        for layer in range(3)
        for part, own in zip(("self_attn", "mlp"), names, strict=True)
        for name in own
    }
    assert set(quantizer.seen) == expected | {"lm_head"}
    assert len(quantizer.seen) == len(set(quantizer.seen))
    x = torch.randn(2, 48)
    torch.testing.assert_close(module.model.layers[1].self_attn.q_proj(x), x @ checkpoint.tensors[Q_PROJ].T * 2)


def test_progress_counts_every_tensor(checkpoint: FolderCheckpoint) -> None:
    seen: list[tuple[int, int | None]] = []
    build(checkpoint, progress=lambda what, done, total, unit="bytes": seen.append((done, total)))
    assert seen == [(done, len(checkpoint.tensors)) for done in range(1, len(checkpoint.tensors) + 1)]
