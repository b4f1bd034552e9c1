"""The random loader makes a model of a configuration alone, always the same, and never without having been asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from drivetrain import LLM, SamplingParams
from drivetrain.config import load_settings
from drivetrain.errors import ConfigError, LoaderError, MissingTensorError, UnknownArchitectureError
from drivetrain.plugins.loader.random import RandomLoader
from support.tiny_models import VOCAB_SIZE, tiny_configs

torch.set_num_threads(1)
CONFIGS = tiny_configs()


def write(folder: Path, name: str = "llama", **changes: Any) -> Path:
    config = {**CONFIGS[name].to_dict(), "architectures": CONFIGS[name].architectures, **changes}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def opened(folder: Path, **options: Any) -> Any:
    return RandomLoader(RandomLoader.Config(**{"seed": 0, **options})).open(folder)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma3", "phi3", "olmo2"])
def test_it_holds_every_tensor_that_the_model_needs(tmp_path: Path, name: str) -> None:
    """So a model of any architecture is built, and answers to the full length."""
    llm = LLM(str(write(tmp_path, name)), loader={"name": "random", "seed": 1}, engine={"kv_memory": "8MiB"})
    with llm:
        params = SamplingParams(max_tokens=7, temperature=0, ignore_eos=True)
        results = llm.generate([[5, 6, 7], "text of bytes"], params)
    assert [len(result.token_ids) for result in results] == [7, 7]
    assert all(0 <= token < VOCAB_SIZE for result in results for token in result.token_ids)


def test_equal_seeds_give_equal_numbers_and_other_seeds_others(tmp_path: Path) -> None:
    folder = write(tmp_path)
    one, again, other = opened(folder), opened(folder), opened(folder, seed=1)
    for name in one.names():
        tensor = one.tensor(name, torch.float32)
        assert tuple(tensor.shape) == one.shape(name)
        assert torch.equal(tensor, again.tensor(name, torch.float32))
        assert torch.equal(tensor.bfloat16(), one.tensor(name, torch.bfloat16))
        if tensor.dim() == 2:
            assert not torch.equal(tensor, other.tensor(name, torch.float32))
            assert float(tensor.std()) == pytest.approx(0.02, rel=0.1)
        else:
            assert bool((tensor == 1).all())
    first, second = (one.tensor(f"model.layers.{layer}.mlp.up_proj.weight", torch.float32) for layer in (0, 1))
    assert not torch.equal(first, second)


def test_without_a_seed_the_folder_is_refused_with_what_to_do(tmp_path: Path) -> None:
    """Whether the loader was named or is the only one that is left: made-up weights are never served unawares."""
    folder = str(write(tmp_path))
    for options in ({}, {"loader": "random"}):
        with pytest.raises(LoaderError, match="holds no weights") as raised:
            LLM(folder, **options)
        assert "loader.seed" in str(raised.value)


def test_a_folder_with_weights_and_one_without_a_configuration_are_another_format(tmp_path: Path) -> None:
    assert not RandomLoader.recognizes(tmp_path)
    assert not RandomLoader.recognizes(tmp_path / "nothing")
    assert RandomLoader.recognizes(write(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert not RandomLoader.recognizes(tmp_path)


def test_what_makes_no_model_is_told_on_opening(tmp_path: Path) -> None:
    with pytest.raises(UnknownArchitectureError):
        opened(write(tmp_path, architectures=["SurelyUnknownForCausalLM"]))
    with pytest.raises(ConfigError, match="no such device"):
        opened(write(tmp_path), device="abacus")
    with pytest.raises(MissingTensorError, match=r"model\.norm\.weight"):
        opened(write(tmp_path)).tensor("model.norm.weigth", torch.float32)


def test_a_tokenizer_of_the_folder_is_used_and_bytes_without_one(tmp_path: Path) -> None:
    backend = opened(write(tmp_path)).tokenizer().backend
    text = "Grüße, 世界"
    assert backend.decode(backend.encode(text).ids) == text
    assert backend.get_vocab_size() == 256


def test_the_configuration_file_takes_it(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"model: {write(tmp_path)}\nloader: {{name: random, seed: 3}}\n", encoding="utf-8")
    assert load_settings(file).parts["loader"].options == {"seed": 3}
