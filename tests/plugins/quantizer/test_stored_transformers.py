"""Layers that are stored packed are used so in the transformers library's own modules, too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from drivetrain.contracts.loader import Checkpoint
from drivetrain.errors import LoaderError, MissingTensorError
from drivetrain.plugins.quantizer.formats import write_quantized
from support.quantized_models import SIZES, continued, generated, open_folder, rounded
from support.tiny_models import other_tiny_configs, save_tiny_tokenizer, tiny_model

torch.set_num_threads(1)


def save_full(name: str, folder: Path) -> tuple[Any, Checkpoint]:
    config = other_tiny_configs()[name]
    for key, value in {**SIZES, "head_dim": 16}.items():
        if hasattr(config, key) and key != "num_hidden_layers":
            setattr(config, key, value)
    model = tiny_model(config)
    folder.mkdir()
    model.save_pretrained(folder)
    save_tiny_tokenizer(folder)
    return model, open_folder(folder)


def linear_names(checkpoint: Checkpoint) -> list[str]:
    return [
        name.removesuffix(".weight")
        for name in checkpoint.names()
        if name.endswith(("_proj.weight", "c_fc.weight")) and len(checkpoint.shape(name)) == 2
    ]


@pytest.mark.parametrize("name", ["stablelm", "starcoder2", "cohere2"])
def test_tokens_are_those_of_the_library_with_dequantized_weights(name: str, tmp_path: Path) -> None:
    model, full = save_full(name, tmp_path / "full")
    grids = {layer: rounded(full.tensor(f"{layer}.weight", torch.float32), 4, 32) for layer in linear_names(full)}
    packed = ((layer, grid.packed()) for layer, grid in grids.items())
    folder = write_quantized(tmp_path / "gptq", full, packed, "gptq")
    model.load_state_dict({f"{layer}.weight": grid.weights() for layer, grid in grids.items()}, strict=False)
    found, report = generated(folder)
    chosen = {one["kind"]: one["chosen"]["name"] for one in report["selections"]}
    assert (chosen["model"], chosen["quantizer"]) == ("transformers", "gptq")
    rows = {row["quantizer"]: row["num_layers"] for row in report["weights"]["rows"]}
    assert rows == {"gptq": len(grids), "none": 1}
    assert found == continued(model)
    assert generated(folder, quantizer="none")[0] == found


def test_tensors_that_are_missing_or_too_many_are_named(tmp_path: Path) -> None:
    _, full = save_full("stablelm", tmp_path / "full")
    layer = linear_names(full)[0]
    packed = [(layer, rounded(full.tensor(f"{layer}.weight", torch.float32), 4, 32).packed())]
    file = write_quantized(tmp_path / "gptq", full, packed, "gptq") / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"model.norm.extra": torch.zeros(2)}, file, metadata={"format": "pt"})
    with pytest.raises(LoaderError, match=r"no place for: model\.norm\.extra"):
        generated(file.parent)
    del tensors["model.norm.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(MissingTensorError, match=r"no tensor model\.norm\.weight of shape \(64,\)"):
        generated(file.parent)
