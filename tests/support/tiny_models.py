"""Tiny random models of every architecture, written to disk as complete model folders, and a reader for them."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PretrainedConfig

from drivetrain.contracts.loader import Checkpoint, TokenizerData
from drivetrain.errors import MissingTensorError

VOCAB_SIZE = 288
BOS, EOS = 0, 1

_TEXT = (
    "The quick brown fox jumps over the lazy dog while the other dogs sleep.",
    "There is more than one way to write a sentence, and there is more than one thing to say.",
    "Numbers such as 1, 22 and 333 are here, and so are the signs of code: x = f(y) + [1, 2];",
)

_CHAT_TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}: {{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}


def _rope(kind: str, theta: float = 100.0, **rest: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **rest}}


def _longrope(pairs: int, original: int, **rest: Any) -> dict[str, Any]:
    short = [1.0 + 0.05 * i for i in range(pairs)]
    long = [2.0 + 0.7 * i for i in range(pairs)]
    return _rope(
        "longrope",
        short_factor=short,
        long_factor=long,
        original_max_position_embeddings=original,
        partial_rotary_factor=0.5,
        **rest,
    )


def tiny_configs() -> dict[str, PretrainedConfig]:
    """Name -> configuration of a tiny model, for every architecture that the decoder builds and its variants.

    Windows are shorter than a prompt of 20 tokens; sizes are odd where the architecture lets them be.
    """
    t = transformers

    def make(cls: type[PretrainedConfig], architecture: str, **changes: Any) -> PretrainedConfig:
        return cls(**{**COMMON, **changes}, architectures=[architecture])

    def llama(**changes: Any) -> PretrainedConfig:
        return make(t.LlamaConfig, "LlamaForCausalLM", **changes)

    gemma = {"head_dim": 10, "query_pre_attn_scalar": 12, "sliding_window": 6, "tie_word_embeddings": True}
    llama3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    return {
        "llama": llama(),
        "llama-bias": llama(attention_bias=True, mlp_bias=True, num_key_value_heads=6),
        "llama3": llama(**_rope("llama3", factor=8.0, **llama3)),
        "llama-linear": llama(**_rope("linear", factor=4.0)),
        "llama-dynamic": llama(**_rope("dynamic", factor=4.0)),
        "llama-yarn": llama(**_rope("yarn", factor=4.0, original_max_position_embeddings=64)),
        "smollm2": llama(
            hidden_size=36, num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True, rms_norm_eps=1e-5
        ),
        "smollm3": make(
            t.SmolLM3Config, "SmolLM3ForCausalLM", num_hidden_layers=4, no_rope_layer_interval=2, **_rope("default")
        ),
        "smollm3-window": make(
            t.SmolLM3Config,
            "SmolLM3ForCausalLM",
            no_rope_layers=[1, 0, 1],
            use_sliding_window=True,
            sliding_window=5,
            tie_word_embeddings=True,
        ),
        "mistral": make(t.MistralConfig, "MistralForCausalLM", sliding_window=7, head_dim=14),
        "mistral-full": make(t.MistralConfig, "MistralForCausalLM", sliding_window=None),
        "qwen2": make(t.Qwen2Config, "Qwen2ForCausalLM", tie_word_embeddings=True),
        "qwen2-window": make(
            t.Qwen2Config, "Qwen2ForCausalLM", use_sliding_window=True, sliding_window=5, max_window_layers=1
        ),
        "qwen3": make(t.Qwen3Config, "Qwen3ForCausalLM", head_dim=6, tie_word_embeddings=True),
        "gemma2": make(t.Gemma2Config, "Gemma2ForCausalLM", **gemma),
        "gemma3": make(
            t.Gemma3TextConfig,
            "Gemma3ForCausalLM",
            **{**gemma, "num_hidden_layers": 4},
            layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
            rope_parameters={
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            },
            final_logit_softcapping=20.0,
        ),
        "phi3": make(t.Phi3Config, "Phi3ForCausalLM", original_max_position_embeddings=64, **_longrope(2, 64)),
        "phi3-window": make(t.Phi3Config, "Phi3ForCausalLM", sliding_window=9, num_key_value_heads=3),
        "olmo2": make(t.Olmo2Config, "Olmo2ForCausalLM"),
        "granite": make(
            t.GraniteConfig,
            "GraniteForCausalLM",
            embedding_multiplier=3.0,
            residual_multiplier=0.4,
            attention_multiplier=0.2,
            logits_scaling=2.5,
            tie_word_embeddings=True,
        ),
    }


def other_tiny_configs() -> dict[str, PretrainedConfig]:
    """Name -> configuration of a tiny model whose architecture the decoder does not build."""
    t = transformers

    def make(cls: type[PretrainedConfig], architecture: str, **changes: Any) -> PretrainedConfig:
        return cls(**{**COMMON, **changes}, architectures=[architecture])

    gpt2 = {"n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": 256, "vocab_size": VOCAB_SIZE}
    ends = {"bos_token_id": BOS, "eos_token_id": EOS}
    experts = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
    return {
        "stablelm": make(t.StableLmConfig, "StableLmForCausalLM", partial_rotary_factor=0.5),
        "gpt-neox": make(t.GPTNeoXConfig, "GPTNeoXForCausalLM", num_key_value_heads=None),
        "gpt2": t.GPT2Config(**gpt2, **ends, architectures=["GPT2LMHeadModel"]),
        "starcoder2": make(t.Starcoder2Config, "Starcoder2ForCausalLM", sliding_window=6),
        "cohere2": make(t.Cohere2Config, "Cohere2ForCausalLM", sliding_window=6, tie_word_embeddings=True),
        "qwen3-moe": make(t.Qwen3MoeConfig, "Qwen3MoeForCausalLM", head_dim=8, **experts),
        "phi": make(t.PhiConfig, "PhiForCausalLM"),
    }


def _randomize(model: torch.nn.Module, seed: int) -> None:
    """Weights that make attention uneven and the likeliest token clear; the library's own give nearly flat scores."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(0.1 * noise)
            else:
                parameter.copy_(noise * 1.2 / parameter.shape[-1] ** 0.5)


def tiny_model(config: PretrainedConfig, seed: int = 0) -> Any:
    """The library's own float32 model of a configuration, with eager attention, in eval mode."""
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    _randomize(model, seed)
    return model.eval()


def tiny_tokenizer() -> Tokenizer:
    """A byte-level BPE tokenizer of VOCAB_SIZE tokens; every text can be encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    return tokenizer


@functools.cache
def _configs() -> dict[str, PretrainedConfig]:
    """All of them; making them takes half a second."""
    return {**tiny_configs(), **other_tiny_configs()}


def save_tiny(name: str, folder: Path, seed: int = 0) -> Any:
    """Write the complete model folder of ``name``, and return the library's model of the same weights."""
    model = tiny_model(copy.deepcopy(_configs()[name]), seed)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    save_tiny_tokenizer(folder)
    return model


def save_tiny_tokenizer(folder: Path) -> None:
    """Write ``tokenizer.json`` and its settings."""
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "chat_template": _CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


class FolderCheckpoint(Checkpoint):
    """The plainest reader of a folder with ``config.json`` and ``model.safetensors``."""

    def __init__(self, folder: Path, change: Callable[[dict[str, Any]], None] | None = None) -> None:
        """``change`` may edit the configuration after it was read."""
        self.path = folder
        config = json.loads((folder / "config.json").read_text())
        if change is not None:
            change(config)
        self.config: Mapping[str, Any] = config
        self.generation_config: Mapping[str, Any] = {}
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            self.tensors: dict[str, torch.Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def names(self) -> Sequence[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self.tensors:
            raise MissingTensorError("no such tensor", where=str(self.path), found=name)
        return tuple(self.tensors[name].shape)

    def stored_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def tensor(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        self.shape(name)
        return self.tensors[name].to(dtype)

    def tokenizer(self) -> TokenizerData:
        backend = Tokenizer.from_file(str(self.path / "tokenizer.json"))
        return TokenizerData(backend, _CHAT_TEMPLATE, {"bos_token": "<s>", "eos_token": "</s>"})
