"""Every GGUF architecture comes back as the Hugging Face model it was made from.

Tiny random models are written as the public converter writes them (its renaming, its permuted rows, its +1 on Gemma's
norms), read back, and put into transformers again: the same logits show that configuration and tensors are right.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

from drivetrain.errors import LoaderError, UnknownArchitectureError
from drivetrain.plugins.loader.gguf import GgufCheckpoint, GgufLoader

torch.set_num_threads(1)

VOCAB = 48
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@dataclass(frozen=True)
class Case:
    """One architecture: its transformers config and what the converter adds to the common metadata."""

    arch: str
    config_class: str
    config: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    permuted: bool = False
    gemma: bool = False
    hf_class: str = ""


GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 4, "tie_word_embeddings": True}
CASES = {
    "llama": Case("llama", "LlamaConfig", {"rope_theta": 5e5}, permuted=True),
    "llama-tied": Case("llama", "LlamaConfig", {"tie_word_embeddings": True}, permuted=True),
    "llama-biases": Case("llama", "LlamaConfig", {"attention_bias": True, "mlp_bias": True}, permuted=True),
    "llama3-rope": Case(
        "llama",
        "LlamaConfig",
        {"rope_theta": 5e5, "rope_scaling": LLAMA3, "head_dim": 64},
        {"rope.dimension_count": 64},
        permuted=True,
    ),
    "llama-linear-rope": Case(
        "llama",
        "LlamaConfig",
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0},
        permuted=True,
    ),
    "mistral": Case(
        "llama",
        "MistralConfig",
        {"sliding_window": 4},
        {"attention.sliding_window": 4},
        permuted=True,
        hf_class="MistralForCausalLM",
    ),
    "smollm3": Case("smollm3", "SmolLM3Config", {"num_hidden_layers": 4, "no_rope_layer_interval": 4}, permuted=True),
    "qwen2": Case("qwen2", "Qwen2Config", {"rope_theta": 1e6}),
    "qwen2-yarn": Case(
        "qwen2",
        "Qwen2Config",
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32},
    ),
    "qwen3": Case("qwen3", "Qwen3Config", {"head_dim": 16}, {"attention.key_length": 16}),
    "gemma2": Case(
        "gemma2",
        "Gemma2Config",
        {**GEMMA, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
        {
            "attention.key_length": 16,
            "attention.sliding_window": 4,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
        },
        gemma=True,
    ),
    "gemma3": Case(
        "gemma3",
        "Gemma3TextConfig",
        {
            **GEMMA,
            "num_hidden_layers": 7,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
        {
            "attention.key_length": 16,
            "attention.sliding_window": 4,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
        },
        gemma=True,
        hf_class="Gemma3ForCausalLM",
    ),
    "phi3": Case(
        "phi3",
        "Phi3Config",
        {"sliding_window": 5, "original_max_position_embeddings": 128},
        {"attention.sliding_window": 5, "rope.dimension_count": 8, "rope.scaling.original_context_length": 128},
    ),
    "phi3-longrope": Case(
        "phi3",
        "Phi3Config",
        {
            "original_max_position_embeddings": 32,
            "partial_rotary_factor": 0.5,
            "rope_scaling": {
                "rope_type": "longrope",
                "long_factor": [1.5, 2.25],
                "short_factor": [1.0, 1.25],
                "partial_rotary_factor": 0.5,
            },
        },
        {
            "attention.sliding_window": 0,
            "rope.dimension_count": 4,
            "rope.scaling.original_context_length": 32,
            "rope.scaling.attn_factor": math.sqrt(1 + math.log(4) / math.log(32)),
        },
    ),
    "olmo2": Case("olmo2", "Olmo2Config"),
    "granite": Case(
        "granite",
        "GraniteConfig",
        {
            "attention_multiplier": 0.25,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "logits_scaling": 2.0,
        },
        {"attention.scale": 0.25, "embedding_scale": 3.0, "residual_scale": 0.5, "logit_scale": 2.0},
        permuted=True,
    ),
}
EXTRA_TENSORS = {
    "phi3-longrope": {
        "rope_factors_long.weight": np.array([1.5, 2.25], np.float32),
        "rope_factors_short.weight": np.array([1.0, 1.25], np.float32),
    }
}


def tiny_model(case: Case) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, case.config_class)(**SHAPE | copy.deepcopy(dict(case.config)))
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Norm weights and biases start as constants; only random ones show a wrong order.
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


def permuted(weights: np.ndarray, heads: int) -> np.ndarray:
    halves = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    return halves.swapaxes(1, 2).reshape(weights.shape)


def llama3_divisors(theta: float, head_dim: int) -> np.ndarray:
    """The extra tensor that stands for Llama 3's rope scaling, frequency by frequency."""
    divisors = []
    for index in range(head_dim // 2):
        wavelength = 2 * math.pi * theta ** (2 * index / head_dim)
        if wavelength < 8192 / 4:
            divisors.append(1.0)
        elif wavelength > 8192:
            divisors.append(8.0)
        else:
            smooth = (8192 / wavelength - 1) / 3
            divisors.append(1 / ((1 - smooth) / 8 + smooth))
    return np.array(divisors, np.float32)


def write_gguf(path: Path, case: Case, model: Any, extra: Mapping[str, np.ndarray]) -> None:
    config = model.config
    writer = gguf.GGUFWriter(path, case.arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    for key, value in case.metadata.items():
        add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}[type(value)]
        add(f"{case.arch}.{key}", value)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == case.arch)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    tied = config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and tied:
            continue
        values = tensor.numpy().copy()
        if case.permuted and ".q_proj." in name:
            values = permuted(values, config.num_attention_heads)
        if case.permuted and ".k_proj." in name:
            values = permuted(values, config.num_key_value_heads)
        if case.gemma and name.endswith("norm.weight"):
            values = values + 1
        stem, suffix = name.rsplit(".", 1)
        writer.add_tensor(f"{names.get_name(stem)}.{suffix}", values)
    for name, values in extra.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def open_case(name: str, folder: Path) -> tuple[Any, GgufCheckpoint]:
    case = CASES[name]
    model = tiny_model(case)
    extra = dict(EXTRA_TENSORS.get(name, {}))
    if name == "llama3-rope":
        extra["rope_freqs.weight"] = llama3_divisors(5e5, 64)
    write_gguf(folder / "tiny.gguf", case, model, extra)
    return model, GgufLoader(GgufLoader.Config()).open(folder / "tiny.gguf")


@pytest.mark.parametrize("name", CASES)
def test_read_back_model_equals_the_one_written(name: str, tmp_path: Path) -> None:
    model, checkpoint = open_case(name, tmp_path)
    config = {key: value for key, value in checkpoint.config.items() if key != "architectures"}
    again_config = type(model.config)(**config)
    again_config._attn_implementation = "eager"
    again = transformers.AutoModelForCausalLM.from_config(again_config).float().eval()
    state = {tensor: checkpoint.tensor(tensor, torch.float32) for tensor in checkpoint.names()}
    missing, unexpected = again.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if checkpoint.config["tie_word_embeddings"] else set())
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if CASES[name].gemma else {"rtol": 0.0, "atol": 0.0}
    for tensor, values in state.items():
        assert checkpoint.shape(tensor) == tuple(values.shape)
        torch.testing.assert_close(values, model.state_dict()[tensor], **tolerance)
    ids = torch.arange(3, 43).remainder(VOCAB)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_config_names_the_class_and_agrees_with_the_original(name: str, tmp_path: Path) -> None:
    model, checkpoint = open_case(name, tmp_path)
    assert checkpoint.architecture == (CASES[name].hf_class or type(model).__name__)
    original = model.config.to_dict()
    ours = checkpoint.config
    for key in SHAPE:
        assert ours[key] == original[key], key
    for key in ("tie_word_embeddings", "hidden_act", "head_dim", "layer_types", "sliding_window", "no_rope_layers"):
        if key in ours and original.get(key) is not None:
            assert ours[key] == original[key], key
    assert checkpoint.eos_token_ids == (2,)


def test_llama3_scaling_is_recovered_from_its_divisors(tmp_path: Path) -> None:
    _, checkpoint = open_case("llama3-rope", tmp_path)
    assert checkpoint.config["rope_scaling"] == LLAMA3


def test_llama3_scaling_with_unusual_parameters_is_fitted(tmp_path: Path) -> None:
    case = CASES["llama3-rope"]
    model = tiny_model(case)
    wavelengths = 2 * math.pi * 5e5 ** (np.arange(32) / 32)
    smooth = np.clip((4096 / wavelengths - 2) / (16 - 2), 0, 1)
    divisors = (1 / ((1 - smooth) / 32 + smooth)).astype(np.float32)
    write_gguf(tmp_path / "tiny.gguf", case, model, {"rope_freqs.weight": divisors})
    scaling = GgufLoader(GgufLoader.Config()).open(tmp_path / "tiny.gguf").config["rope_scaling"]
    # Only the ratios matter: 2, 16 and 4096 say the same as 1, 8 and 2048.
    assert scaling["factor"] == pytest.approx(32)
    assert scaling["high_freq_factor"] == pytest.approx(8, rel=1e-3)
    assert scaling["original_max_position_embeddings"] == pytest.approx(2048, rel=1e-3)


def test_divisors_of_another_form_are_refused(tmp_path: Path) -> None:
    case = CASES["llama3-rope"]
    noise = np.linspace(1, 7, 32, dtype=np.float32) ** 2
    write_gguf(tmp_path / "tiny.gguf", case, tiny_model(case), {"rope_freqs.weight": noise})
    with pytest.raises(LoaderError, match="rope_freqs"):
        GgufLoader(GgufLoader.Config()).open(tmp_path / "tiny.gguf")


def test_experts_are_an_unknown_architecture(tmp_path: Path) -> None:
    case = Case("llama", "LlamaConfig", metadata={"expert_count": 8}, permuted=True)
    write_gguf(tmp_path / "tiny.gguf", case, tiny_model(case), {})
    with pytest.raises(UnknownArchitectureError, match="8 experts"):
        GgufLoader(GgufLoader.Config()).open(tmp_path / "tiny.gguf")


def test_a_tensor_that_the_architecture_lacks_is_named(tmp_path: Path) -> None:
    case = CASES["llama"]
    write_gguf(tmp_path / "tiny.gguf", case, tiny_model(case), {"blk.0.attn_sinks.weight": np.ones(4, np.float32)})
    with pytest.raises(LoaderError, match=r"blk\.0\.attn_sinks\.weight"):
        GgufLoader(GgufLoader.Config()).open(tmp_path / "tiny.gguf")
