"""GGUF tensor names and layouts, and the way back to those of the Hugging Face checkpoint.

The public converter (llama.cpp's convert_hf_to_gguf) renames tensors, reorders the rows of some query and key
projections, and adds 1 to Gemma's norm weights. Each is undone here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

import numpy as np

_TOP: Mapping[str, str] = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER: Mapping[str, str] = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_QK_NORMS: Mapping[str, str] = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_POST_NORMS: Mapping[str, str] = {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_GEMMA_NORMS: Mapping[str, str] = {**_POST_NORMS, "ffn_norm": "pre_feedforward_layernorm"}
_PHI3_FUSED: Mapping[str, str] = {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}

# Rope frequencies are part of the configuration, not weights; attn_rot_embd is an old copy of the same.
_NOT_WEIGHTS = re.compile(r"rope_freqs\.weight|rope_factors_(long|short)\.weight|blk\.\d+\.attn_rot_embd(\.weight)?")
_LAYER_NAME = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_TOP_NAME = re.compile(r"(\w+)\.(weight|bias)")


class Undo(Enum):
    """What the converter did to a tensor's values, and must be undone."""

    NOTHING = "nothing"
    PERMUTED_QUERY = "rows of each query head interleaved"
    PERMUTED_KEY = "rows of each key head interleaved"
    NORM_PLUS_ONE = "1 added"


@dataclass(frozen=True)
class Architecture:
    """How one GGUF architecture maps to its Hugging Face class.

    hf_class:          entry of ``architectures`` in config.json.
    model_type:        its ``model_type``.
    layer_names:       where its names differ from Llama's.
    permuted:          the converter interleaved the two rotary halves of each query and key head.
    norms_plus_one:    the converter added 1 to every norm weight.
    """

    hf_class: str
    model_type: str
    layer_names: Mapping[str, str] = field(default_factory=dict)
    permuted: bool = False
    norms_plus_one: bool = False


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture("LlamaForCausalLM", "llama", permuted=True),
    "smollm3": Architecture("SmolLM3ForCausalLM", "smollm3", permuted=True),
    "qwen2": Architecture("Qwen2ForCausalLM", "qwen2"),
    "qwen3": Architecture("Qwen3ForCausalLM", "qwen3", _QK_NORMS),
    "gemma2": Architecture("Gemma2ForCausalLM", "gemma2", _GEMMA_NORMS, norms_plus_one=True),
    "gemma3": Architecture("Gemma3ForCausalLM", "gemma3_text", {**_GEMMA_NORMS, **_QK_NORMS}, norms_plus_one=True),
    "phi3": Architecture("Phi3ForCausalLM", "phi3", _PHI3_FUSED),
    "olmo2": Architecture("Olmo2ForCausalLM", "olmo2", {**_POST_NORMS, **_QK_NORMS}),
    "granite": Architecture("GraniteForCausalLM", "granite", permuted=True),
}
"""GGUF architecture (``general.architecture``) -> mapping."""


def is_weight(gguf_name: str) -> bool:
    """False for tensors that belong to the configuration."""
    return _NOT_WEIGHTS.fullmatch(gguf_name) is None


def hf_name(architecture: Architecture, gguf_name: str) -> tuple[str, Undo] | None:
    """The Hugging Face name of a tensor and what must be undone on it; None for a name the architecture lacks."""
    layer = _LAYER_NAME.fullmatch(gguf_name)
    if layer:
        number, part, suffix = layer.groups()
        module = {**_LAYER, **architecture.layer_names}.get(part)
        return (f"model.layers.{number}.{module}.{suffix}", _undo(architecture, part)) if module else None
    top = _TOP_NAME.fullmatch(gguf_name)
    if top and top[1] in _TOP:
        return f"{_TOP[top[1]]}.{top[2]}", _undo(architecture, top[1])
    return None


def _undo(architecture: Architecture, part: str) -> Undo:
    if architecture.permuted and part == "attn_q":
        return Undo.PERMUTED_QUERY
    if architecture.permuted and part == "attn_k":
        return Undo.PERMUTED_KEY
    if architecture.norms_plus_one and part.endswith("norm"):
        return Undo.NORM_PLUS_ONE
    return Undo.NOTHING


def undo(values: np.ndarray, step: Undo, num_heads: int, num_kv_heads: int) -> np.ndarray:
    """Bring values ([rows, ...]) back to the Hugging Face layout.

    Within a head the converter stores rotary pairs side by side (row 2i is half 0, row 2i + 1 is half 1); Hugging Face
    stores half 0 of all pairs, then half 1.
    """
    if step is Undo.NORM_PLUS_ONE:
        shifted: np.ndarray = values - np.float32(1)
        return shifted
    if step is Undo.NOTHING:
        return values
    heads = num_heads if step is Undo.PERMUTED_QUERY else num_kv_heads
    pairs = values.reshape(heads, -1, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)
