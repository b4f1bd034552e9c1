"""A tiny Llama checkpoint, and its scores by a plain forward over one whole sequence.

Shapes: T tokens; E hidden size; H query heads; G key/value heads; D head size; V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.nn import functional

from drivetrain.contracts.attention import LayerAttention
from drivetrain.contracts.loader import Checkpoint
from drivetrain.testing.attention_oracle import plain_attention

TINY_LLAMA: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 36,
    "intermediate_size": 52,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100.0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
    "dtype": "float32",
}
"""Keys of its ``config.json``; sizes that are multiples of nothing."""


def _shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(config["num_hidden_layers"]):
        own: dict[str, tuple[int, ...]] = {
            "input_layernorm": (hidden,),
            "self_attn.q_proj": (queries, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, queries),
            "post_attention_layernorm": (hidden,),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in own.items()}
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}


def write_checkpoint(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Path:
    """A folder with ``config.json`` and ``model.safetensors``; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config)))
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    return folder


def write_tiny_llama(folder: Path) -> Path:
    """The tiny Llama with random weights that make attention uneven; returns its folder."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in _shapes(TINY_LLAMA).items():
        noise = torch.randn(shape, generator=generator)
        tensors[name] = 1 + 0.1 * noise if len(shape) == 1 else noise * 1.2 / shape[-1] ** 0.5
    return write_checkpoint(folder, TINY_LLAMA, tensors)


def rewrite_checkpoint(
    folder: Path,
    checkpoint: Checkpoint,
    *,
    without: Collection[str] = (),
    extra: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """The same model in a folder of its own, with some tensors left out and others put in their place or beside."""
    names = [name for name in checkpoint.names() if name not in without]
    tensors = {name: checkpoint.tensor(name, torch.float32).clone() for name in names}
    return write_checkpoint(folder, checkpoint.config, {**tensors, **(extra or {})})


def _norm(x_TE: torch.Tensor, weight_E: torch.Tensor, eps: float) -> torch.Tensor:
    return x_TE / (x_TE.square().mean(-1, keepdim=True) + eps).sqrt() * weight_E


def _rotate(x_THD: torch.Tensor, theta: float) -> torch.Tensor:
    half = x_THD.shape[-1] // 2
    frequencies = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angles_T1R = torch.arange(x_THD.shape[0])[:, None, None] * frequencies
    first, second = x_THD[..., :half], x_THD[..., half:]
    cos, sin = angles_T1R.cos(), angles_T1R.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def llama_logits(checkpoint: Checkpoint, ids: Sequence[int]) -> torch.Tensor:
    """Scores of the tiny Llama for one sequence from position 0, [T, V], in float64.

    Source: Touvron et al. 2023, "LLaMA", section 2.2, with grouped key/value heads.
    """
    config = checkpoint.config
    heads, groups, size = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    eps, theta = config["rms_norm_eps"], config["rope_theta"]
    attention = LayerAttention(heads, groups, size, size**-0.5)

    def weight(name: str) -> torch.Tensor:
        return checkpoint.tensor(f"{name}.weight", torch.float32).double()

    x_TE = weight("model.embed_tokens")[torch.tensor(list(ids))]
    for layer in range(config["num_hidden_layers"]):
        own = f"model.layers.{layer}"
        h_TE = _norm(x_TE, weight(f"{own}.input_layernorm"), eps)
        q_THD, k_TGD, v_TGD = (
            (h_TE @ weight(f"{own}.self_attn.{part}_proj").T).view(len(ids), count, size)
            for part, count in (("q", heads), ("k", groups), ("v", groups))
        )
        o_THD = plain_attention(attention, _rotate(q_THD, theta), _rotate(k_TGD, theta), v_TGD)
        x_TE = x_TE + o_THD.flatten(1) @ weight(f"{own}.self_attn.o_proj").T
        h_TE = _norm(x_TE, weight(f"{own}.post_attention_layernorm"), eps)
        gate, up = (h_TE @ weight(f"{own}.mlp.{part}_proj").T for part in ("gate", "up"))
        x_TE = x_TE + (functional.silu(gate) * up) @ weight(f"{own}.mlp.down_proj").T
    return _norm(x_TE, weight("model.norm"), eps) @ weight("lm_head").T
