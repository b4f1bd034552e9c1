"""From the keys of a ``config.json`` to the shape of a decoder.

``ARCHITECTURES`` says how each architecture differs from Llama; :func:`read_config` combines it with one model's sizes.
Keys of transformers 4 (``rope_theta`` and ``rope_scaling``) and 5 (``rope_parameters``) are both read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from drivetrain.errors import LoaderError, UnknownArchitectureError, nearest
from drivetrain.plugins.model.decoder.rope import ROPE_KINDS, RopeConfig

Keys = Mapping[str, Any]
"""The keys of a ``config.json``."""

NormPlacement = Literal["before", "after", "around"]
"""Where a layer norms: before attention and MLP (Llama), after them (OLMo 2), or both (Gemma)."""

QKNorm = Literal["head", "projection"]
"""What is normed of queries and keys: each head by itself (Qwen 3), or the whole projection (OLMo 2)."""

_ACTIVATIONS = {"silu": "silu_mul", "swish": "silu_mul", "gelu_pytorch_tanh": "gelu_tanh_mul"}
"""Name in ``config.json`` -> logical operation of the gated MLP."""

_LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclass(frozen=True)
class LayerConfig:
    """What may differ from layer to layer.

    window: tokens back that a query sees, itself included; None sees all.
    rope:   index into the model's ropes; None leaves queries and keys unrotated.
    """

    window: int | None
    rope: int | None


@dataclass(frozen=True)
class DecoderConfig:
    """The shape of one decoder. Sizes are in numbers of features unless said otherwise.

    norm_offset:         added to the weight of every norm.
    qk_norm:             norm of queries and keys; None for none.
    fused_projections:   q, k, v in one linear layer, and gate and up in another.
    activation:          logical operation of the gated MLP.
    embedding_scale:     factor on the embeddings.
    rounds_embedding_scale: the factor is first rounded to the parameter dtype.
    residual_scale:      factor on what attention and MLP add to the residual stream.
    attention_scale:     factor on the attention scores.
    attention_soft_cap:  bound of the attention scores; None for none.
    logits_divisor:      the logits are divided by it.
    logits_soft_cap:     bound of the logits; None for none.
    rope_in_float32:     queries and keys are rotated in float32.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    max_position: int
    norm_eps: float
    norm_offset: float
    norms: NormPlacement
    qk_norm: QKNorm | None
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    fused_projections: bool
    tie_embeddings: bool
    activation: str
    embedding_scale: float
    rounds_embedding_scale: bool
    residual_scale: float
    attention_scale: float
    attention_soft_cap: float | None
    logits_divisor: float
    logits_soft_cap: float | None
    rope_in_float32: bool
    ropes: tuple[RopeConfig, ...]
    layers: tuple[LayerConfig, ...]


@dataclass(frozen=True)
class Architecture:
    """How one architecture differs from Llama; the fields beside the functions are as in :class:`DecoderConfig`.

    bias:         which biases there are: ``keys`` reads attention_bias and mlp_bias, ``qkv`` and ``none`` are fixed.
    windows:      the window of each layer.
    has_rope:     whether each layer rotates; None means that all do.
    has_partial_rotary: whether ``partial_rotary_factor`` is honoured.
    local_theta:  default base of a second rope for the layers with a window; None uses one rope for all.
    is_gemma:     Gemma's names of keys, its embedding scale and soft caps.
    is_granite:   Granite's four multipliers.
    """

    windows: Callable[[Keys, int], list[int | None]] = lambda keys, n: [None] * n
    has_rope: Callable[[Keys, int], list[bool]] | None = None
    bias: Literal["keys", "qkv", "none"] = "keys"
    norms: NormPlacement = "before"
    norm_offset: float = 0.0
    qk_norm: QKNorm | None = None
    fused_projections: bool = False
    tie_embeddings: bool = False
    default_theta: float = 10_000.0
    local_theta: float | None = None
    has_partial_rotary: bool = False
    rope_in_float32: bool = False
    is_gemma: bool = False
    is_granite: bool = False


# --- reading single keys -------------------------------------------------------------------------------------------


def _fail(what: str, key: str, found: object, allowed: str | None = None, hint: str | None = None) -> LoaderError:
    return LoaderError(what, where=f"config.json, {key}", found=found, allowed=allowed, hint=hint)


def _integer(keys: Keys, key: str, default: int | None = None) -> int:
    value = keys.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise _fail("a size must be a positive integer", key, value, "an integer >= 1")
    return value


def _number(keys: Keys, key: str, default: float | None = None, where: str = "") -> float:
    value = keys.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _fail("a number is needed", f"{where}{key}", value, "a number")
    return float(value)


def _optional_number(keys: Keys, key: str, where: str = "") -> float | None:
    return None if keys.get(key) is None else _number(keys, key, where=where)


def _positive(number: float, key: str) -> float:
    if not 0 < number < math.inf:
        raise _fail("a number above zero is needed", key, number, "a number > 0")
    return number


def _choice(found: object, allowed: Mapping[str, Any] | tuple[str, ...], key: str) -> str:
    if not isinstance(found, str) or found not in allowed:
        near = nearest(str(found), allowed)
        hint = f"Did you mean {near!r}?" if near else None
        raise _fail("the decoder does not know this value", key, found, ", ".join(allowed), hint)
    return found


# --- windows and rope by layer -------------------------------------------------------------------------------------


def _layer_types(keys: Keys, num_layers: int, default: Callable[[int], bool]) -> list[bool]:
    """Whether each layer has a window: from ``layer_types``, or by the architecture's own rule."""
    types = keys.get("layer_types")
    if types is None:
        return [default(layer) for layer in range(num_layers)]
    if len(types) < num_layers:
        raise _fail("there is not one entry for each layer", "layer_types", len(types), f"{num_layers} entries")
    return [_choice(name, _LAYER_TYPES, "layer_types") == "sliding_attention" for name in types[:num_layers]]


def _window(keys: Keys, default: int | None) -> int | None:
    """``sliding_window``, where an explicit null means none and an absent key the architecture's default."""
    if "sliding_window" in keys and keys["sliding_window"] is None:
        return None
    return default if "sliding_window" not in keys else _integer(keys, "sliding_window")


def _one_window(default: int | None) -> Callable[[Keys, int], list[int | None]]:
    return lambda keys, num_layers: [_window(keys, default)] * num_layers


def _qwen_windows(keys: Keys, num_layers: int) -> list[int | None]:
    if not keys.get("use_sliding_window", False):
        return [None] * num_layers
    window, first = _window(keys, 4096), keys.get("max_window_layers", 28)
    return [window if has else None for has in _layer_types(keys, num_layers, lambda layer: layer >= first)]


def _smollm3_rope(keys: Keys, num_layers: int) -> list[bool]:
    flags = keys.get("no_rope_layers")
    if flags is None:
        interval = _integer(keys, "no_rope_layer_interval", 4)
        return [(layer + 1) % interval != 0 for layer in range(num_layers)]
    if len(flags) < num_layers:
        raise _fail("there is not one entry for each layer", "no_rope_layers", len(flags), f"{num_layers} entries")
    return [bool(flag) for flag in flags[:num_layers]]


def _smollm3_windows(keys: Keys, num_layers: int) -> list[int | None]:
    if not keys.get("use_sliding_window", False):
        return [None] * num_layers
    window, rotates = _window(keys, None), _smollm3_rope(keys, num_layers)
    has_window = _layer_types(keys, num_layers, lambda layer: window is not None and not rotates[layer])
    return [window if has else None for has in has_window]


def _gemma2_windows(keys: Keys, num_layers: int) -> list[int | None]:
    window = _window(keys, 4096)
    return [window if has else None for has in _layer_types(keys, num_layers, lambda layer: layer % 2 == 0)]


def _gemma3_windows(keys: Keys, num_layers: int) -> list[int | None]:
    window, pattern = _window(keys, 4096), _integer(keys, "sliding_window_pattern", 6)
    has_window = _layer_types(keys, num_layers, lambda layer: (layer + 1) % pattern != 0)
    return [window if has else None for has in has_window]


ARCHITECTURES: Mapping[str, Architecture] = {
    "LlamaForCausalLM": Architecture(),
    "SmolLM3ForCausalLM": Architecture(
        windows=_smollm3_windows, has_rope=_smollm3_rope, tie_embeddings=True, default_theta=2_000_000.0
    ),
    "MistralForCausalLM": Architecture(windows=_one_window(4096), bias="none"),
    "Qwen2ForCausalLM": Architecture(windows=_qwen_windows, bias="qkv"),
    "Qwen3ForCausalLM": Architecture(windows=_qwen_windows, qk_norm="head"),
    "Gemma2ForCausalLM": Architecture(
        windows=_gemma2_windows, norms="around", norm_offset=1.0, tie_embeddings=True, is_gemma=True
    ),
    "Gemma3ForCausalLM": Architecture(
        windows=_gemma3_windows,
        norms="around",
        norm_offset=1.0,
        qk_norm="head",
        tie_embeddings=True,
        default_theta=1_000_000.0,
        local_theta=10_000.0,
        is_gemma=True,
    ),
    "Phi3ForCausalLM": Architecture(
        windows=_one_window(None), bias="none", fused_projections=True, has_partial_rotary=True
    ),
    "Olmo2ForCausalLM": Architecture(norms="after", qk_norm="projection", rope_in_float32=True),
    "GraniteForCausalLM": Architecture(is_granite=True),
}
"""Every architecture the decoder builds, by its Hugging Face class name."""


# --- rope ----------------------------------------------------------------------------------------------------------


def _rope_keys(keys: Keys, layer_type: str | None) -> tuple[Keys, str]:
    """The table that describes the rope of some layers, and its name in the file."""
    table = keys.get("rope_parameters")
    name = "rope_parameters"
    if table is None:
        table, name = keys.get("rope_scaling") or {}, "rope_scaling"
    table = _table(table, name)
    if name == "rope_scaling":
        # The older key scales only the layers that see everything.
        return ({} if layer_type == "sliding_attention" else table), name
    if any(isinstance(table.get(kind), Mapping) for kind in _LAYER_TYPES):
        chosen = layer_type or "full_attention"
        return _table(table.get(chosen) or {}, f"{name}.{chosen}"), f"{name}.{chosen}"
    return table, name


def _table(found: object, name: str) -> Keys:
    if not isinstance(found, Mapping):
        raise _fail("a table is needed", name, found, "a table with rope_type and its numbers")
    return found


def _longrope_factors(table: Keys, key: str, where: str, expected: int) -> tuple[float, ...]:
    factors = table.get(key)
    if not isinstance(factors, list | tuple) or len(factors) != expected:
        found = None if factors is None else f"{len(factors)} numbers"
        raise _fail("longrope needs one factor for each frequency", where + key, found, f"{expected} numbers")
    return tuple(float(factor) for factor in factors)


def _read_rope(
    keys: Keys, traits: Architecture, head_size: int, max_position: int, layer_type: str | None, long_context: bool
) -> RopeConfig:
    table, name = _rope_keys(keys, layer_type)
    where = f"{name}."
    kind = table.get("rope_type") or table.get("type") or "default"
    if kind == "su" or (kind == "yarn" and "short_factor" in table):
        kind = "longrope"  # names that early releases of Phi-3 gave it
    kind = _choice(kind, tuple(ROPE_KINDS), f"{name}.rope_type")
    is_local = layer_type == "sliding_attention"
    theta_key, default_theta = "rope_theta", traits.default_theta
    if is_local:
        theta_key, default_theta = "rope_local_base_freq", traits.local_theta or traits.default_theta
    theta = _optional_number(table, "rope_theta", where)
    if theta is None:
        theta = _number(keys, theta_key, default_theta)
    fraction = _number(table, "partial_rotary_factor", keys.get("partial_rotary_factor") or 1.0, where)
    if fraction != 1.0 and not traits.has_partial_rotary:
        raise _fail("this architecture rotates whole heads", f"{where}partial_rotary_factor", fraction, "1.0")
    rotary_size = int(head_size * fraction)
    if rotary_size < 2 or rotary_size % 2:
        raise _fail("an even number of dims must be rotated", f"{where}partial_rotary_factor", rotary_size)
    factor = _optional_number(table, "factor", where)
    if kind in ("linear", "dynamic", "llama3") and factor is None:
        raise _fail(f"rope of type {kind} needs a factor", f"{where}factor", None, "a number")
    low, high = _number(table, "low_freq_factor", 1.0, where), _number(table, "high_freq_factor", 4.0, where)
    if kind == "llama3" and high <= low:
        raise _fail("high_freq_factor must be above low_freq_factor", f"{where}high_freq_factor", high, f"> {low:g}")
    is_longrope = kind == "longrope"
    attention_factor = _optional_number(table, "attention_factor", where)
    return RopeConfig(
        kind=kind,
        theta=_positive(theta, f"{where}rope_theta"),
        rotary_size=rotary_size,
        max_position=max_position,
        factor=None if factor is None else _positive(factor, f"{where}factor"),
        original_length=_original_length(keys, table, max_position),
        low_freq_factor=_positive(low, f"{where}low_freq_factor"),
        high_freq_factor=high,
        attention_factor=attention_factor,
        # 0 stands for "not set" in published files
        beta_fast=_positive(_optional_number(table, "beta_fast", where) or 32.0, f"{where}beta_fast"),
        beta_slow=_positive(_optional_number(table, "beta_slow", where) or 1.0, f"{where}beta_slow"),
        mscale=_number(table, "mscale", 0.0, where),
        mscale_all_dim=_number(table, "mscale_all_dim", 0.0, where),
        truncate=bool(table.get("truncate", True)),
        short_factors=_longrope_factors(table, "short_factor", where, rotary_size // 2) if is_longrope else (),
        long_factors=_longrope_factors(table, "long_factor", where, rotary_size // 2) if is_longrope else (),
        use_long_factors=is_longrope and long_context,
    )


def _original_length(keys: Keys, table: Keys, max_position: int) -> int:
    source = keys if keys.get("original_max_position_embeddings") is not None else table
    return _integer(source, "original_max_position_embeddings", max_position)


def _usable_positions(ropes: tuple[RopeConfig, ...], max_position: int) -> int:
    """Positions over which one set of frequencies holds, so that cached keys never need to be rotated anew."""
    usable = max_position
    for rope in ropes:
        if rope.kind == "longrope" and not rope.use_long_factors:
            usable = min(usable, rope.original_length)
        elif rope.kind == "yarn":
            usable = max(usable, int(rope.original_length * rope.stretch))
    return usable


# --- the whole -----------------------------------------------------------------------------------------------------

_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "rms_norm_eps",
)


def find_architecture(keys: Keys) -> tuple[str, Architecture]:
    """Name and traits of the architecture that a ``config.json`` names. Raises UnknownArchitectureError."""
    name = str((keys.get("architectures") or ["unknown"])[0])
    if name not in ARCHITECTURES:
        near = nearest(name, ARCHITECTURES)
        raise UnknownArchitectureError(
            "the decoder does not build this architecture",
            where="config.json, architectures",
            found=name,
            allowed=ARCHITECTURES,
            hint=f"Did you mean {near}?" if near else 'Other architectures: pip install "drivetrain[transformers]"',
        )
    return name, ARCHITECTURES[name]


def _check(keys: Keys) -> None:
    missing = [key for key in _REQUIRED if keys.get(key) is None]
    if missing:
        raise LoaderError("the configuration lacks keys that the decoder needs", where="config.json", found=missing)
    if keys.get("quantization_config") is not None:
        method = keys["quantization_config"].get("quant_method", "an unnamed method")
        raise LoaderError(
            f"the weights were quantized by {method}, which no loader reads yet",
            where="config.json, quantization_config",
            hint="Name the unquantized model, or a GGUF file of it.",
        )
    if keys.get("use_bidirectional_attention"):
        raise _fail("the decoder attends causally only", "use_bidirectional_attention", True, "false")


def _heads(keys: Keys) -> tuple[int, int, int]:
    """Query heads, key/value heads, head size."""
    num_heads, hidden = _integer(keys, "num_attention_heads"), _integer(keys, "hidden_size")
    num_kv_heads = _integer(keys, "num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise _fail("query heads are no multiple of key/value heads", "num_key_value_heads", (num_heads, num_kv_heads))
    if keys.get("head_dim") is not None:
        return num_heads, num_kv_heads, _integer(keys, "head_dim")
    if hidden % num_heads:
        raise _fail(
            "hidden_size is no multiple of the heads, and no head_dim is given", "head_dim", (hidden, num_heads)
        )
    return num_heads, num_kv_heads, hidden // num_heads


def _activation(keys: Keys, traits: Architecture) -> str:
    key, default = ("hidden_activation", "gelu_pytorch_tanh") if traits.is_gemma else ("hidden_act", "silu")
    return _ACTIVATIONS[_choice(keys.get(key) or default, _ACTIVATIONS, key)]


def _ropes_and_layers(
    keys: Keys, traits: Architecture, head_size: int, max_position: int, long_context: bool
) -> tuple[tuple[RopeConfig, ...], tuple[LayerConfig, ...]]:
    num_layers = _integer(keys, "num_hidden_layers")
    windows = traits.windows(keys, num_layers)
    rotates = traits.has_rope(keys, num_layers) if traits.has_rope else [True] * num_layers
    kinds = (None,) if traits.local_theta is None else _LAYER_TYPES
    ropes = tuple(_read_rope(keys, traits, head_size, max_position, kind, long_context) for kind in kinds)
    # A layer of type sliding_attention has the local rope even when sliding_window is null.
    is_local = [False] * num_layers
    if traits.local_theta is not None:
        is_local = [window is not None for window in traits.windows({**keys, "sliding_window": 1}, num_layers)]
    layers = tuple(
        LayerConfig(window, int(local) if rotate else None)
        for window, rotate, local in zip(windows, rotates, is_local, strict=True)
    )
    return ropes, layers


def read_config(keys: Keys, *, long_context: bool = False) -> DecoderConfig:
    """The decoder that the keys of a ``config.json`` describe.

    long_context: with LongRoPE, use the long factors for all positions; see the plugin's Config.
    Raises UnknownArchitectureError, or LoaderError naming the key that is absent, unknown or contradicts another.
    """
    name, traits = find_architecture(keys)
    _check(keys)
    num_heads, num_kv_heads, head_size = _heads(keys)
    max_position = _integer(keys, "max_position_embeddings")
    ropes, layers = _ropes_and_layers(keys, traits, head_size, max_position, long_context)
    has_bias = traits.bias == "keys"
    attention_bias = has_bias and bool(keys.get("attention_bias", False))
    attention_scale = head_size**-0.5
    if traits.is_gemma:
        attention_scale = _number(keys, "query_pre_attn_scalar", 256) ** -0.5
    elif traits.is_granite:
        attention_scale = _number(keys, "attention_multiplier", 1.0)
    default_caps = (50.0, 30.0) if name == "Gemma2ForCausalLM" else (None, None)
    attention_cap, logits_cap = (
        _cap(keys, key, default) if traits.is_gemma else None
        for key, default in zip(("attn_logit_softcapping", "final_logit_softcapping"), default_caps, strict=True)
    )
    embedding_scale = _integer(keys, "hidden_size") ** 0.5 if traits.is_gemma else 1.0
    tie = keys.get("tie_word_embeddings")
    return DecoderConfig(
        architecture=name,
        vocab_size=_integer(keys, "vocab_size"),
        hidden_size=_integer(keys, "hidden_size"),
        intermediate_size=_integer(keys, "intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        max_position=_usable_positions(ropes, max_position),
        norm_eps=_number(keys, "rms_norm_eps"),
        norm_offset=traits.norm_offset,
        norms=traits.norms,
        qk_norm=traits.qk_norm,
        qkv_bias=traits.bias == "qkv" or attention_bias,
        output_bias=attention_bias,
        mlp_bias=has_bias and bool(keys.get("mlp_bias", False)),
        fused_projections=traits.fused_projections,
        tie_embeddings=traits.tie_embeddings if tie is None else bool(tie),
        activation=_activation(keys, traits),
        embedding_scale=_number(keys, "embedding_multiplier", 1.0) if traits.is_granite else embedding_scale,
        rounds_embedding_scale=traits.is_gemma,
        residual_scale=_number(keys, "residual_multiplier", 1.0) if traits.is_granite else 1.0,
        attention_scale=attention_scale,
        attention_soft_cap=attention_cap,
        logits_divisor=_number(keys, "logits_scaling", 1.0) if traits.is_granite else 1.0,
        logits_soft_cap=logits_cap,
        rope_in_float32=traits.rope_in_float32,
        ropes=ropes,
        layers=layers,
    )


def _cap(keys: Keys, key: str, default: float | None) -> float | None:
    """A soft cap, where an explicit null means none and an absent key the architecture's default."""
    return default if key not in keys else _optional_number(keys, key)
