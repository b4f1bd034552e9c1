"""Rules of reading a decoder's configuration: old and new keys mean the same, rope equals the library's maths, and what
is unknown or contradicts itself is an error that names the key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from drivetrain.contracts.plugin import ProbeContext
from drivetrain.errors import LoaderError, UnknownArchitectureError
from drivetrain.plugins.model.decoder import DecoderModel
from drivetrain.plugins.model.decoder.config import ARCHITECTURES, read_config
from drivetrain.plugins.model.decoder.rope import ROPE_KINDS
from support.tiny_models import FolderCheckpoint, save_tiny, tiny_configs

SMOLLM2_135M: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "max_position_embeddings": 8192,
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "vocab_size": 49152,
}


def keys(**changes: Any) -> dict[str, Any]:
    return {**SMOLLM2_135M, **changes}


def describe(config: dict[str, Any]) -> Any:
    return DecoderModel(DecoderModel.Config()).describe(config, "float32")


def test_smollm2_135m_has_its_published_shape() -> None:
    spec = describe(SMOLLM2_135M)
    assert spec.num_parameters == 134_515_008
    assert (spec.num_layers, spec.max_position, spec.hidden_size) == (30, 8192, 576)
    layer = spec.attention.layers[29]
    assert (layer.num_heads, layer.num_kv_heads, layer.head_size, layer.scale) == (9, 3, 64, 0.125)
    assert spec.attention.groups[0].window is None


def test_every_architecture_of_the_issue_is_built() -> None:
    families = ["Llama", "SmolLM3", "Mistral", "Qwen2", "Qwen3", "Gemma2", "Gemma3", "Phi3", "Olmo2", "Granite"]
    assert set(ARCHITECTURES) == {f"{family}ForCausalLM" for family in families} == DecoderModel.architectures


@pytest.mark.parametrize("name", sorted(tiny_configs()))
def test_frequencies_equal_the_librarys(name: str) -> None:
    """Only kinds that scale are in the library's table; the plain one is its definition."""
    config = tiny_configs()[name]
    for rope, layer_type in zip(
        read_config(json.loads(config.to_json_string())).ropes, ("full_attention", "sliding_attention"), strict=False
    ):
        table = config.rope_parameters
        nested = table.get(layer_type, table)
        found, scale = ROPE_KINDS[rope.kind](rope)
        assert rope.theta == nested["rope_theta"]
        if nested["rope_type"] == "default":
            expected, expected_scale = (
                1.0 / rope.theta ** (torch.arange(0, rope.rotary_size, 2) / rope.rotary_size),
                1.0,
            )
        else:
            given = layer_type if layer_type in table else None
            expected, expected_scale = ROPE_INIT_FUNCTIONS[nested["rope_type"]](config, "cpu", layer_type=given)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
        assert scale == pytest.approx(expected_scale)


SCALED = [
    {"rope_type": "linear", "factor": 2.5},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 1024},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048},
    {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 1024, "beta_fast": 16, "beta_slow": 2,
     "truncate": False, "mscale": 1.5, "mscale_all_dim": 0.7},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048, "attention_factor": 0.8},
    {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 2048,
     "short_factor": [1.0 + i / 32 for i in range(32)], "long_factor": [2.0 + i for i in range(32)]},
    {"rope_type": "longrope", "original_max_position_embeddings": 1024, "attention_factor": 1.25,
     "short_factor": [1.0] * 32, "long_factor": [3.0] * 32},
]  # fmt: skip


@pytest.mark.parametrize("table", SCALED, ids=lambda table: table["rope_type"])
@pytest.mark.parametrize("style", ["rope_parameters", "rope_scaling"])
def test_scaled_frequencies_equal_the_librarys_for_real_sizes(table: dict[str, Any], style: str) -> None:
    theirs = transformers.LlamaConfig(
        hidden_size=128, num_attention_heads=2, max_position_embeddings=8192,
        rope_parameters={"rope_theta": 10000.0, **table},
    )  # fmt: skip
    expected, expected_scale = ROPE_INIT_FUNCTIONS[table["rope_type"]](theirs, "cpu")
    if style == "rope_parameters":
        own = keys(rope_parameters={"rope_theta": 10000.0, **table})
    else:
        own = keys(rope_theta=10000.0, rope_scaling={"type": table["rope_type"], **table})
    own.update(hidden_size=128, num_attention_heads=2, num_key_value_heads=2)
    (rope,) = read_config(own).ropes
    found, scale = ROPE_KINDS[rope.kind](rope)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert scale == pytest.approx(expected_scale)


def test_gemma3_keys_of_both_library_versions_mean_the_same() -> None:
    common = keys(architectures=["Gemma3ForCausalLM"], head_dim=64, num_hidden_layers=7, sliding_window=512)
    for key in ("rope_theta", "rope_scaling", "hidden_act"):
        del common[key]
    old = {**common, "rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 6,
           "rope_scaling": {"rope_type": "linear", "factor": 8.0}}  # fmt: skip
    new = {**common, "layer_types": ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"],
           "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                               "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}}  # fmt: skip
    assert read_config(old) == read_config(new)
    config = read_config(new)
    assert [layer.rope for layer in config.layers] == [1, 1, 1, 1, 1, 0, 1]
    assert [layer.window for layer in config.layers] == [512] * 5 + [None, 512]


def test_windows_follow_each_architectures_rule() -> None:
    def windows(name: str, **changes: Any) -> list[int | None]:
        config = read_config(keys(architectures=[f"{name}ForCausalLM"], num_hidden_layers=4, head_dim=64, **changes))
        return [layer.window for layer in config.layers]

    assert windows("Llama", sliding_window=5) == [None] * 4
    assert windows("Mistral", sliding_window=5) == [5] * 4
    assert windows("Mistral", sliding_window=None) == [None] * 4
    assert windows("Mistral") == [4096] * 4
    assert windows("Qwen2", sliding_window=5) == [None] * 4
    assert windows("Qwen2", sliding_window=5, use_sliding_window=True, max_window_layers=3) == [None, None, None, 5]
    assert windows("Gemma2", sliding_window=5) == [5, None, 5, None]
    assert windows("Phi3") == [None] * 4
    assert windows("Gemma2", sliding_window=5, layer_types=["full_attention"] * 4) == [None] * 4


def test_yarn_stretches_the_context_and_longrope_ends_it_at_the_original_length() -> None:
    assert describe(keys(rope_scaling=SCALED[3], max_position_embeddings=2048)).max_position == 8192
    assert describe(keys(rope_scaling=SCALED[6])).max_position == 2048
    long = DecoderModel(DecoderModel.Config(long_context=True)).describe(keys(rope_scaling=SCALED[6]), "float32")
    assert long.max_position == 8192


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_act": "gelu_pytorch_than"}, ["hidden_act", "gelu_pytorch_tanh"]),
        ({"rope_scaling": {"rope_type": "yarm", "factor": 2.0}}, ["rope_scaling.rope_type", "yarn"]),
        ({"rope_scaling": {"rope_type": "linear"}}, ["rope_scaling.factor"]),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}}, ["32 numbers"]),
        ({"rope_parameters": "default"}, ["rope_parameters", "table"]),
        ({"rope_theta": -1}, ["rope_theta", "above zero"]),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, ["rope_scaling.factor", "above zero"]),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 0}},
            ["low_freq_factor", "above zero"],
        ),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4}}, ["high_freq_factor", "above"]),
        ({"hidden_size": None}, ["hidden_size", "lacks"]),
        ({"vocab_size": 0}, ["vocab_size", "positive"]),
        ({"num_hidden_layers": True}, ["num_hidden_layers", "positive"]),
        ({"rms_norm_eps": "small"}, ["rms_norm_eps", "number"]),
        ({"num_key_value_heads": 4}, ["num_key_value_heads", "multiple"]),
        ({"hidden_size": 577}, ["head_dim", "multiple"]),
        ({"head_dim": 7}, ["even number"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "whole heads"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["gptq", "quantization_config"]),
        ({"architectures": ["Gemma2ForCausalLM"], "layer_types": ["full_attention"]}, ["layer_types", "30 entries"]),
        ({"architectures": ["Gemma2ForCausalLM"], "layer_types": ["linear"] * 30}, ["layer_types", "full_attention"]),
        ({"architectures": ["SmolLM3ForCausalLM"], "no_rope_layers": [1]}, ["no_rope_layers"]),
        ({"architectures": ["Gemma3ForCausalLM"], "use_bidirectional_attention": True}, ["bidirectional"]),
    ],
)
def test_a_wrong_key_is_an_error_that_names_it(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(LoaderError) as caught:
        describe(keys(**changes))
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_an_unknown_architecture_is_an_error_with_the_nearest_and_all_known() -> None:
    with pytest.raises(UnknownArchitectureError, match=r"LlamaForCasualLM.*GraniteForCausalLM.*Did you mean LlamaFor"):
        describe(keys(architectures=["LlamaForCasualLM"]))
    with pytest.raises(UnknownArchitectureError, match="drivetrain\\[transformers\\]"):
        describe(keys(architectures=["BloomModel"]))


def test_the_probe_answers_by_architecture(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)

    def probe(architecture: str) -> Any:
        checkpoint = FolderCheckpoint(tmp_path, lambda config: config.update(architectures=[architecture]))
        return DecoderModel.probe(ProbeContext(checkpoint=checkpoint))

    assert probe("Qwen3ForCausalLM").ok
    assert (probe("BloomForCausalLM").ok, probe("BloomForCausalLM").code) == (False, "unsupported_architecture")
    assert DecoderModel.probe(ProbeContext()).ok
