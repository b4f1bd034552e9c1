"""The layers of a decoder. Parameters are named as in the Hugging Face checkpoint of the architecture.

Shapes: T tokens of a step; E hidden size; I intermediate size; H query heads; G key/value heads; D head size; R rotary
dims.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from drivetrain.contracts.attention import AttentionStep, TakesWritten
from drivetrain.contracts.kernels import (
    Angles,
    DecoderLayerParts,
    FindsLargest,
    KernelSpec,
    LargestOutput,
    Projection,
)
from drivetrain.fusion import Fuser, is_plain_linear
from drivetrain.plugins.model.decoder.config import DecoderConfig


@dataclass(frozen=True)
class Kernels:
    """Binds logical operations for one device and dtype."""

    bind: Callable[[KernelSpec], Callable[..., Any]]
    device_type: str
    dtype: torch.dtype

    def spec(self, operation: str, sizes: Mapping[str, int], params: Mapping[str, float] | None = None) -> KernelSpec:
        dtype_name = str(self.dtype).removeprefix("torch.")
        return KernelSpec(operation, self.device_type, dtype_name, sizes, params or {})

    def __call__(
        self, operation: str, sizes: Mapping[str, int], params: Mapping[str, float] | None = None
    ) -> Callable[..., Any]:
        return self.bind(self.spec(operation, sizes, params))


class Linear(nn.Linear):
    """A linear layer whose product is the bound operation ``linear``."""

    def __init__(self, in_features: int, out_features: int, bias: bool, kernels: Kernels) -> None:
        super().__init__(in_features, out_features, bias=bias, dtype=kernels.dtype)
        self._linear = kernels("linear", {"I": in_features, "O": out_features})

    def reset_parameters(self) -> None:
        """Leave the parameters as they are: they are made on the meta device and loaded afterwards."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self._linear(x, self.weight, self.bias)
        return out

    def find_largest(self) -> LargestOutput | None:
        """What finds the largest outputs of rows, bias left out; None where the kernel has nothing for it."""
        return self._linear.largest_of(self.weight) if isinstance(self._linear, FindsLargest) else None


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dim. ``bound`` tells a fusion what it is."""

    def __init__(self, size: int, config: DecoderConfig, kernels: Kernels) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dtype=kernels.dtype))
        params = {"eps": config.norm_eps, "weight_offset": config.norm_offset}
        self.bound = kernels.spec("rms_norm", {"E": size}, params)
        self._norm = kernels.bind(self.bound)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self._norm(x, self.weight)
        return out


def _weight(norm: RMSNorm | None) -> torch.Tensor | None:
    return None if norm is None else norm.weight


class Attention(nn.Module):
    """Grouped-query attention over whatever the step holds of each sequence."""

    def __init__(self, config: DecoderConfig, layer: int, kernels: Kernels) -> None:
        super().__init__()
        self.layer = layer
        self.head_size = config.head_size
        self.q_size = config.num_heads * config.head_size
        self.kv_size = config.num_kv_heads * config.head_size
        self.rotates = config.layers[layer].rope is not None
        self._make_projections(config, kernels)
        self.o_proj = Linear(self.q_size, config.hidden_size, config.output_bias, kernels)
        self.norms_heads = config.qk_norm == "head"
        self.norms_projections = config.qk_norm == "projection"
        if config.qk_norm is not None:
            self.q_norm = RMSNorm(self.head_size if self.norms_heads else self.q_size, config, kernels)
            self.k_norm = RMSNorm(self.head_size if self.norms_heads else self.kv_size, config, kernels)
        sizes = {"H": config.num_heads, "G": config.num_kv_heads, "D": config.head_size}
        sizes["R"] = config.ropes[0].rotary_size
        self._rope = kernels("rope", sizes)
        self._rope_write_spec = kernels.spec("rope_write", sizes)
        self._rope_write: Callable[..., torch.Tensor] | None = None

    def _make_projections(self, config: DecoderConfig, kernels: Kernels) -> None:
        self.q_proj = Linear(config.hidden_size, self.q_size, config.qkv_bias, kernels)
        self.k_proj = Linear(config.hidden_size, self.kv_size, config.qkv_bias, kernels)
        self.v_proj = Linear(config.hidden_size, self.kv_size, config.qkv_bias, kernels)

    def project(self, x_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries [T, H * D], keys and values [T, G * D]."""
        return self.q_proj(x_TE), self.k_proj(x_TE), self.v_proj(x_TE)

    def projections(self) -> tuple[Projection, Projection, Projection]:
        """Where queries, keys and values come from."""
        return Projection(self.q_proj), Projection(self.k_proj), Projection(self.v_proj)

    def forward(self, x_TE: torch.Tensor, angles: Angles | None, step: AttentionStep) -> torch.Tensor:
        q, k, v = self.project(x_TE)
        if self.norms_projections:
            q, k = self.q_norm(q), self.k_norm(k)
        q_THD, k_TGD, v_TGD = (part.unflatten(-1, (-1, self.head_size)) for part in (q, k, v))
        if self.norms_heads:
            q_THD, k_TGD = self.q_norm(q_THD), self.k_norm(k_TGD)
        if angles is None:
            o_THD = step.attend(self.layer, q_THD, k_TGD, v_TGD)
        else:
            o_THD = self._rotate_and_attend(q_THD, k_TGD, v_TGD, angles, step)
        out: torch.Tensor = self.o_proj(o_THD.flatten(1))
        return out

    def _rotate_and_attend(
        self, q_THD: torch.Tensor, k_TGD: torch.Tensor, v_TGD: torch.Tensor, angles: Angles, step: AttentionStep
    ) -> torch.Tensor:
        if self._rope_write is not None and not torch.is_grad_enabled() and isinstance(step, TakesWritten):
            pages = step.layer_pages(self.layer)
            if pages is not None:
                q_THD = self._rope_write(q_THD, k_TGD, v_TGD, *angles, pages.keys, pages.values, pages.slots)
                return step.attend_written(self.layer, q_THD)
        q_THD, k_TGD = self._rope(q_THD, k_TGD, *angles)
        return step.attend(self.layer, q_THD, k_TGD, v_TGD)

    def fuse_with(self, fuser: Fuser) -> None:
        """Rotate keys on their way into the cache, in the steps whose attention backend lets the model write."""
        if not self.rotates or self._rope_write is not None:
            return
        where, spec = fuser.name_of(self), self._rope_write_spec
        operation = fuser.better("rope_write", where, spec)
        if operation is not None:
            fuser.set_attribute(self, "_rope_write", operation)
            # Rotated keys are not written and read before they are written to the cache.
            num_bytes = 2 * self.kv_size * getattr(torch, spec.dtype).itemsize
            fuser.did("rope_write", where, "rope + writes of keys and values", spec, num_bytes)


class FusedAttention(Attention):
    """Attention whose queries, keys and values come out of one product."""

    def _make_projections(self, config: DecoderConfig, kernels: Kernels) -> None:
        self.qkv_proj = Linear(config.hidden_size, self.q_size + 2 * self.kv_size, config.qkv_bias, kernels)

    def project(self, x_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = self.qkv_proj(x_TE).split((self.q_size, self.kv_size, self.kv_size), dim=-1)
        return q, k, v

    def projections(self) -> tuple[Projection, Projection, Projection]:
        sizes, firsts = (self.q_size, self.kv_size, self.kv_size), (0, self.q_size, self.q_size + self.kv_size)
        q, k, v = (Projection(self.qkv_proj, first, size) for first, size in zip(firsts, sizes, strict=True))
        return q, k, v


class MLP(nn.Module):
    """The gated feed-forward part of a layer."""

    def __init__(self, config: DecoderConfig, kernels: Kernels) -> None:
        super().__init__()
        self.inner_size = config.intermediate_size
        self._make_projections(config, kernels)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, config.mlp_bias, kernels)
        self._activate = kernels(config.activation, {"E": config.intermediate_size})
        self._activation = config.activation
        self._gated_linear: Callable[..., torch.Tensor] | None = None

    def _make_projections(self, config: DecoderConfig, kernels: Kernels) -> None:
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, config.mlp_bias, kernels)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, config.mlp_bias, kernels)

    def project(self, x_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gate and up, each [T, I]."""
        return self.gate_proj(x_TE), self.up_proj(x_TE)

    def halves(self) -> tuple[nn.Module, ...]:
        """The layers that gate and up come from."""
        return self.gate_proj, self.up_proj

    def weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights of gate and up, each [I, E]."""
        return self.gate_proj.weight, self.up_proj.weight

    def projections(self) -> tuple[Projection, Projection]:
        """Where gate and up come from."""
        return Projection(self.gate_proj), Projection(self.up_proj)

    def forward(self, x_TE: torch.Tensor) -> torch.Tensor:
        if self._gated_linear is not None:
            gated_TI = self._gated_linear(x_TE, *self.weights())
        else:
            gated_TI = self._activate(*self.project(x_TE))
        out: torch.Tensor = self.down_proj(gated_TI)
        return out

    def fuse_with(self, fuser: Fuser) -> None:
        """One operation for both products and the activation, where a kernel provider has it."""
        where, halves = fuser.name_of(self), self.halves()
        if self._gated_linear is not None or any(half in fuser.taken for half in halves):
            return
        if not all(is_plain_linear(half) for half in halves):
            kinds = ", ".join(sorted({type(half).__name__ for half in halves}))
            fuser.leave("gated_linear", where, f"gate and up are of {kinds}, not plain products of their own")
            return
        if any(half.bias is not None for half in halves):
            fuser.leave("gated_linear", where, "gate and up have biases")
            return
        gate_IE = self.weights()[0]
        params = {"activation": float(self._activation == "gelu_tanh_mul")}
        spec = fuser.spec(gate_IE, "gated_linear", {"I": gate_IE.shape[1], "O": gate_IE.shape[0]}, params)
        operation = fuser.better("gated_linear", where, spec)
        if operation is not None:
            fuser.set_attribute(self, "_gated_linear", operation)
            fuser.taken |= set(halves)
            num_bytes = 4 * gate_IE.shape[0] * gate_IE.element_size()
            fuser.did("gated_linear", where, "gate + up + activation", spec, num_bytes)


class FusedMLP(MLP):
    """The feed-forward part whose gate and up come out of one product."""

    def _make_projections(self, config: DecoderConfig, kernels: Kernels) -> None:
        self.gate_up_proj = Linear(config.hidden_size, 2 * config.intermediate_size, config.mlp_bias, kernels)

    def project(self, x_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate_TI, up_TI = self.gate_up_proj(x_TE).chunk(2, dim=-1)
        return gate_TI, up_TI

    def halves(self) -> tuple[nn.Module, ...]:
        return (self.gate_up_proj,)

    def weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        gate_IE, up_IE = self.gate_up_proj.weight.chunk(2)
        return gate_IE, up_IE

    def projections(self) -> tuple[Projection, Projection]:
        size = self.inner_size
        return Projection(self.gate_up_proj, 0, size), Projection(self.gate_up_proj, size, size)


class DecoderLayer(nn.Module):
    """One layer: attention, then MLP, each added to the residual stream. Subclasses say where the norms stand."""

    def __init__(self, config: DecoderConfig, layer: int, kernels: Kernels) -> None:
        super().__init__()
        self.residual_scale = config.residual_scale
        self.self_attn = (FusedAttention if config.fused_projections else Attention)(config, layer, kernels)
        self.mlp = (FusedMLP if config.fused_projections else MLP)(config, kernels)

    def add(self, residual_TE: torch.Tensor, update_TE: torch.Tensor) -> torch.Tensor:
        """The residual stream with an update, scaled where the architecture says so."""
        return torch.add(residual_TE, update_TE, alpha=self.residual_scale)

    def norms(self) -> tuple[RMSNorm | None, RMSNorm | None, RMSNorm | None, RMSNorm | None]:
        """The norms before and after attention, and before and after the MLP."""
        raise NotImplementedError

    def parts(self) -> DecoderLayerParts:
        """Its weights, for a kernel that runs the whole layer."""
        before_attention, after_attention, before_mlp, after_mlp = self.norms()
        attention, mlp = self.self_attn, self.mlp
        q, k, v = attention.projections()
        gate, up = mlp.projections()
        return DecoderLayerParts(
            before_attention=_weight(before_attention),
            after_attention=_weight(after_attention),
            before_mlp=_weight(before_mlp),
            after_mlp=_weight(after_mlp),
            q_norm=_weight(getattr(attention, "q_norm", None)),
            k_norm=_weight(getattr(attention, "k_norm", None)),
            q=q,
            k=k,
            v=v,
            o=Projection(attention.o_proj),
            gate=gate,
            up=up,
            down=Projection(mlp.down_proj),
        )


class NormBeforeLayer(DecoderLayer):
    """Norms before attention and before the MLP (Llama and most others)."""

    def __init__(self, config: DecoderConfig, layer: int, kernels: Kernels) -> None:
        super().__init__(config, layer, kernels)
        self.input_layernorm = RMSNorm(config.hidden_size, config, kernels)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config, kernels)

    def norms(self) -> tuple[RMSNorm | None, RMSNorm | None, RMSNorm | None, RMSNorm | None]:
        return self.input_layernorm, None, self.post_attention_layernorm, None

    def forward(self, x_TE: torch.Tensor, angles: Angles | None, step: AttentionStep) -> torch.Tensor:
        x_TE = self.add(x_TE, self.self_attn(self.input_layernorm(x_TE), angles, step))
        return self.add(x_TE, self.mlp(self.post_attention_layernorm(x_TE)))


class NormAfterLayer(DecoderLayer):
    """Norms after attention and after the MLP (OLMo 2)."""

    def __init__(self, config: DecoderConfig, layer: int, kernels: Kernels) -> None:
        super().__init__(config, layer, kernels)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config, kernels)
        self.post_feedforward_layernorm = RMSNorm(config.hidden_size, config, kernels)

    def norms(self) -> tuple[RMSNorm | None, RMSNorm | None, RMSNorm | None, RMSNorm | None]:
        return None, self.post_attention_layernorm, None, self.post_feedforward_layernorm

    def forward(self, x_TE: torch.Tensor, angles: Angles | None, step: AttentionStep) -> torch.Tensor:
        x_TE = self.add(x_TE, self.post_attention_layernorm(self.self_attn(x_TE, angles, step)))
        return self.add(x_TE, self.post_feedforward_layernorm(self.mlp(x_TE)))


class NormAroundLayer(DecoderLayer):
    """Norms before and after attention and MLP (Gemma 2 and 3)."""

    def __init__(self, config: DecoderConfig, layer: int, kernels: Kernels) -> None:
        super().__init__(config, layer, kernels)
        self.input_layernorm = RMSNorm(config.hidden_size, config, kernels)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config, kernels)
        self.pre_feedforward_layernorm = RMSNorm(config.hidden_size, config, kernels)
        self.post_feedforward_layernorm = RMSNorm(config.hidden_size, config, kernels)

    def norms(self) -> tuple[RMSNorm | None, RMSNorm | None, RMSNorm | None, RMSNorm | None]:
        before_attention, after_attention = self.input_layernorm, self.post_attention_layernorm
        return before_attention, after_attention, self.pre_feedforward_layernorm, self.post_feedforward_layernorm

    def forward(self, x_TE: torch.Tensor, angles: Angles | None, step: AttentionStep) -> torch.Tensor:
        attended_TE = self.self_attn(self.input_layernorm(x_TE), angles, step)
        x_TE = self.add(x_TE, self.post_attention_layernorm(attended_TE))
        fed_TE = self.mlp(self.pre_feedforward_layernorm(x_TE))
        return self.add(x_TE, self.post_feedforward_layernorm(fed_TE))


LAYERS: Mapping[str, type[DecoderLayer]] = {
    "before": NormBeforeLayer,
    "after": NormAfterLayer,
    "around": NormAroundLayer,
}
"""Layer class by placement of the norms."""
