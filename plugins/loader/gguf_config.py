"""From GGUF metadata to the keys of a Hugging Face config.json."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from drivetrain.errors import LoaderError, UnknownArchitectureError
from drivetrain.plugins.loader.gguf_file import GgufFile
from drivetrain.plugins.loader.gguf_names import ARCHITECTURES, Architecture

# Llama 3's own rope scaling, which every published Llama 3.x uses but for the factor.
_LLAMA3_KNOWN = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_ROPE_TOLERANCE = 1e-4

# These two models scale attention by hidden size over heads instead of head size, and GGUF does not say so. They are
# told apart by their number of layers, as llama.cpp does.
_GEMMA_27B_LAYERS = {"gemma2": 46, "gemma3": 62}

# End-of-turn tokens of known chat formats; a file often names only the end-of-text token as its eos.
_TURN_ENDS = ("<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<|end|>", "<|eom_id|>")
_CONTROL_TYPE = 3

_SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}


class Metadata:
    """A GGUF file's metadata, asked for by the architecture's own keys."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self.name = str(file.metadata.get("general.architecture", ""))

    def get(self, key: str, default: Any = None) -> Any:
        return self.file.metadata.get(f"{self.name}.{key}", default)

    def need(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise LoaderError(f"the metadata lacks {self.name}.{key}", where=str(self.file.path))
        return value

    def count(self, key: str, default: int | None = None) -> int:
        """A whole number of at least 1. One that is stored for each layer must agree over all of them."""
        value = self.get(key, default)
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise UnknownArchitectureError(
                    f"{self.name}.{key} differs from layer to layer, which no known architecture has",
                    where=str(self.file.path),
                    found=value,
                )
            value = value[0]
        if value is None:
            value = self.need(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise LoaderError(
                f"{self.name}.{key} makes no sense",
                where=str(self.file.path),
                found=value,
                allowed="a whole number >= 1",
            )
        return value

    def real(self, key: str, default: float | None = None) -> float:
        """A finite number."""
        value = self.get(key, default)
        if value is None:
            value = self.need(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise LoaderError(f"{self.name}.{key} is no number", where=str(self.file.path), found=value)
        return value

    def factors(self, tensor: str) -> np.ndarray | None:
        """A small float32 tensor that belongs to the configuration."""
        stored = self.file.tensors.get(tensor)
        return None if stored is None else self.file.data(stored).reshape(-1).view("<f4")


def find_architecture(file: GgufFile) -> Architecture:
    """The mapping of the file's architecture. Raises UnknownArchitectureError."""
    name = str(file.metadata.get("general.architecture"))
    metadata = Metadata(file)
    if name not in ARCHITECTURES or metadata.get("expert_count"):
        raise UnknownArchitectureError(
            "this loader does not know the architecture that the file holds",
            where=str(file.path),
            found=f"{name} with {metadata.get('expert_count')} experts" if name in ARCHITECTURES else name,
            allowed=ARCHITECTURES,
        )
    return ARCHITECTURES[name]


def read_config(file: GgufFile, architecture: Architecture) -> dict[str, Any]:
    """All of config.json that can be known, in its key names. Raises LoaderError."""
    metadata = Metadata(file)
    config = _common(metadata, architecture)
    special = _SPECIAL_CASES.get(metadata.name)
    if special is not None:
        special(metadata, config)
    return config


def read_generation_config(file: GgufFile, config: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults for sampling and every token that ends an answer."""
    found = {
        ours: file.metadata[f"general.sampling.{theirs}"]
        for theirs, ours in _SAMPLING.items()
        if f"general.sampling.{theirs}" in file.metadata
    }
    ends = [file.metadata.get(f"tokenizer.ggml.{role}_token_id") for role in ("eos", "eot", "eom")]
    tokens: Sequence[str] = file.metadata.get("tokenizer.ggml.tokens", ())
    types: Sequence[int] = file.metadata.get("tokenizer.ggml.token_type", ())
    template = str(file.metadata.get("tokenizer.chat_template", ""))
    spoken = {text for text in _TURN_ENDS if text in template}
    if spoken:
        ends += [
            i
            for i, (text, kind) in enumerate(zip(tokens, types, strict=False))
            if kind == _CONTROL_TYPE and text in spoken
        ]
    unique = list(dict.fromkeys(end for end in ends if end is not None))
    if unique:
        found["eos_token_id"] = unique
    found |= {key: config[key] for key in ("bos_token_id", "pad_token_id") if config.get(key) is not None}
    return found


def _common(metadata: Metadata, architecture: Architecture) -> dict[str, Any]:
    file = metadata.file
    hidden, heads = metadata.count("embedding_length"), metadata.count("attention.head_count")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise LoaderError("the file holds no tensor 'token_embd.weight'", where=str(file.path))
    config: dict[str, Any] = {
        "architectures": [architecture.hf_class],
        "model_type": architecture.model_type,
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": metadata.count("feed_forward_length"),
        "num_hidden_layers": metadata.count("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.count("attention.head_count_kv", heads),
        "head_dim": metadata.count("attention.key_length", max(hidden // heads, 1)),
        "max_position_embeddings": metadata.count("context_length"),
        "rms_norm_eps": metadata.real("attention.layer_norm_rms_epsilon"),
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_output.bias" in file.tensors or "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_down.bias" in file.tensors,
        "rope_theta": float(metadata.real("rope.freq_base", 10000.0)),
        "rope_scaling": _rope_scaling(metadata),
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    for role, key in (("bos", "bos"), ("eos", "eos"), ("padding", "pad")):
        config[f"{key}_token_id"] = file.metadata.get(f"tokenizer.ggml.{role}_token_id")
    return config


def _rope_scaling(metadata: Metadata) -> dict[str, Any] | None:
    kind = metadata.get("rope.scaling.type", "none")
    factor = metadata.get("rope.scaling.factor")
    if metadata.factors("rope_freqs.weight") is not None:
        return _llama3_scaling(metadata)
    if kind == "linear" and factor is not None:
        return {"rope_type": "linear", "factor": float(factor)}
    if kind == "yarn" and factor is not None:
        return _yarn_scaling(metadata, float(factor))
    if kind == "longrope" or metadata.factors("rope_factors_long.weight") is not None:
        return _longrope_scaling(metadata)
    if kind in ("none", "linear", "yarn"):
        return None
    raise LoaderError(
        "this rope scaling is not known",
        where=str(metadata.file.path),
        found=kind,
        allowed="none, linear, yarn, longrope, and llama3 through rope_freqs.weight",
    )


def _yarn_scaling(metadata: Metadata, factor: float) -> dict[str, Any]:
    scaling: dict[str, Any] = {"rope_type": "yarn", "factor": factor}
    optional = {
        "original_context_length": "original_max_position_embeddings",
        "yarn_attn_factor": "attention_factor",
        "attn_factor": "attention_factor",
        "yarn_beta_fast": "beta_fast",
        "yarn_beta_slow": "beta_slow",
    }
    for theirs, ours in optional.items():
        value = metadata.get(f"rope.scaling.{theirs}")
        if value is not None:
            scaling[ours] = value
    return scaling


def _longrope_scaling(metadata: Metadata) -> dict[str, Any]:
    long, short = metadata.factors("rope_factors_long.weight"), metadata.factors("rope_factors_short.weight")
    if long is None or short is None:
        raise LoaderError(
            "longrope scaling needs the tensors rope_factors_long.weight and rope_factors_short.weight",
            where=str(metadata.file.path),
        )
    scaling: dict[str, Any] = {
        "rope_type": "longrope",
        "long_factor": [float(str(factor)) for factor in long],
        "short_factor": [float(str(factor)) for factor in short],
    }
    original = metadata.get("rope.scaling.original_context_length")
    stated = metadata.get("rope.scaling.attn_factor")
    if stated is not None and original:
        # LongRoPE (arXiv 2402.13753): the factor that everyone derives from the two lengths; kept only if it differs.
        ratio = metadata.count("context_length") / original
        derived = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
        if abs(stated - derived) > _ROPE_TOLERANCE:
            scaling["attention_factor"] = stated
    return scaling


def _llama3_scaling(metadata: Metadata) -> dict[str, Any]:
    """The parameters of Llama 3's scaling, from the per-frequency divisors that GGUF stores in their place.

    With divisor d and wavelength w of a frequency: d = 1 for w < original / high, d = factor for w > original / low,
    and between them 1/d = (1 - s) / factor + s with s = (original / w - low) / (high - low).
    """
    divisors = metadata.factors("rope_freqs.weight")
    if divisors is None:
        raise LoaderError("the file has no rope_freqs.weight", where=str(metadata.file.path))
    divisors = divisors.astype(np.float64)
    theta = metadata.real("rope.freq_base", 10000.0)
    wavelengths = 2 * math.pi * theta ** (np.arange(len(divisors)) / len(divisors))
    candidates = [{"factor": float(divisors.max()), **_LLAMA3_KNOWN}, _fit_llama3(divisors, wavelengths)]
    for candidate in candidates:
        if candidate is not None and np.allclose(
            _llama3_divisors(candidate, wavelengths), divisors, rtol=_ROPE_TOLERANCE
        ):
            return {"rope_type": "llama3", **candidate}
    raise LoaderError(
        "the divisors in rope_freqs.weight are not of Llama 3's form",
        where=str(metadata.file.path),
        found=divisors.tolist(),
    )


def _llama3_divisors(scaling: Mapping[str, float], wavelengths: np.ndarray) -> np.ndarray:
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = (scaling["original_max_position_embeddings"] / wavelengths - low) / (high - low)
    smooth = np.clip(smooth, 0.0, 1.0)
    divisors: np.ndarray = 1 / ((1 - smooth) / scaling["factor"] + smooth)
    return divisors


def _fit_llama3(divisors: np.ndarray, wavelengths: np.ndarray) -> dict[str, float] | None:
    """Solve for the parameters from the divisors between the two plateaus; they only matter up to a common scale, so
    low_freq_factor is set to 1. None when fewer than two divisors lie there."""
    factor = float(divisors.max())
    between = (divisors > 1 + _ROPE_TOLERANCE) & (divisors < factor * (1 - _ROPE_TOLERANCE))
    if int(between.sum()) < 2:
        return None
    smooth = (1 / divisors[between] - 1 / factor) / (1 - 1 / factor)
    slope, intercept = np.polyfit(1 / wavelengths[between], smooth, 1)
    if intercept >= 0:
        return None
    span = -1 / intercept
    return {
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": float(1 + span),
        "original_max_position_embeddings": round(slope * span),
    }


def _llama(metadata: Metadata, config: dict[str, Any]) -> None:
    if metadata.get("attention.key_length") is None and metadata.get("rope.dimension_count") is not None:
        config["head_dim"] = metadata.count("rope.dimension_count")
    window = metadata.get("attention.sliding_window")
    if window:
        config |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": window}


def _smollm3(metadata: Metadata, config: dict[str, Any]) -> None:
    # The file does not list the layers without rope; the architecture leaves it out of every fourth.
    layers = config["num_hidden_layers"]
    config["no_rope_layer_interval"] = 4
    config["no_rope_layers"] = [int((layer + 1) % 4 != 0) for layer in range(layers)]
    config |= {"use_sliding_window": False, "sliding_window": None, "layer_types": ["full_attention"] * layers}


def _qwen(metadata: Metadata, config: dict[str, Any]) -> None:
    # Qwen2 always has biases on q, k and v and never on the output; its class knows that without a key.
    config["attention_bias"] = "blk.0.attn_output.bias" in metadata.file.tensors
    config |= {"use_sliding_window": False, "sliding_window": None}
    config["layer_types"] = ["full_attention"] * config["num_hidden_layers"]


def _gemma(metadata: Metadata, config: dict[str, Any]) -> None:
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    is_27b = layers == _GEMMA_27B_LAYERS[metadata.name]
    config["query_pre_attn_scalar"] = config["hidden_size"] // heads if is_27b else config["head_dim"]
    config["hidden_act"] = config["hidden_activation"] = "gelu_pytorch_tanh"
    config["sliding_window"] = metadata.get("attention.sliding_window")
    config["attn_logit_softcapping"] = metadata.get("attn_logit_softcapping")
    config["final_logit_softcapping"] = metadata.get("final_logit_softcapping")
    period = 2 if metadata.name == "gemma2" else 6
    config["layer_types"] = _layer_types(metadata, layers, period)
    if metadata.name == "gemma3":
        config["rope_local_base_freq"] = float(metadata.real("rope.freq_base_swa", 10000.0))
        config["use_bidirectional_attention"] = False


def _layer_types(metadata: Metadata, layers: int, period: int) -> list[str]:
    """Sliding or full attention of each layer: as the file lists it, else every ``period``-th is full."""
    pattern = metadata.get("attention.sliding_window_pattern", period)
    if isinstance(pattern, list):
        sliding = [bool(value) for value in pattern]
    else:
        sliding = [(layer + 1) % pattern != 0 for layer in range(layers)]
    if metadata.get("attention.sliding_window") is None:
        sliding = [False] * layers
    return ["sliding_attention" if value else "full_attention" for value in sliding]


def _phi3(metadata: Metadata, config: dict[str, Any]) -> None:
    rotary = metadata.count("rope.dimension_count", config["head_dim"])
    config["partial_rotary_factor"] = rotary / config["head_dim"]
    config["sliding_window"] = metadata.get("attention.sliding_window") or None
    config["original_max_position_embeddings"] = metadata.get(
        "rope.scaling.original_context_length", config["max_position_embeddings"]
    )


def _olmo2(metadata: Metadata, config: dict[str, Any]) -> None:
    window = metadata.get("attention.sliding_window")
    if window:
        # Olmo 3 shares the file format's architecture name, and differs by its sliding layers.
        config |= {"architectures": ["Olmo3ForCausalLM"], "model_type": "olmo3", "sliding_window": window}
        config["layer_types"] = _layer_types(metadata, config["num_hidden_layers"], 4)


def _granite(metadata: Metadata, config: dict[str, Any]) -> None:
    config["attention_multiplier"] = metadata.real("attention.scale", 1.0)
    config["embedding_multiplier"] = metadata.real("embedding_scale", 1.0)
    config["residual_multiplier"] = metadata.real("residual_scale", 1.0)
    config["logits_scaling"] = metadata.real("logit_scale", 1.0)


_SPECIAL_CASES: Mapping[str, Callable[[Metadata, dict[str, Any]], None]] = {
    "llama": _llama,
    "smollm3": _smollm3,
    "qwen2": _qwen,
    "qwen3": _qwen,
    "gemma2": _gemma,
    "gemma3": _gemma,
    "phi3": _phi3,
    "olmo2": _olmo2,
    "granite": _granite,
}
