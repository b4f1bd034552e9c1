"""One configurable decoder for the Llama family and its relatives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from pydantic import Field

from drivetrain.contracts.attention import AttentionSpec, LayerAttention
from drivetrain.contracts.kernels import KernelSpec
from drivetrain.contracts.loader import Checkpoint
from drivetrain.contracts.model import BuildContext, CausalLM, LayeredModel, Model, ModelSpec
from drivetrain.contracts.plugin import PluginConfig, Tier
from drivetrain.plugins.model.decoder.by_layer import LayeredDecoder
from drivetrain.plugins.model.decoder.config import ARCHITECTURES, DecoderConfig, read_config
from drivetrain.plugins.model.decoder.layers import Kernels
from drivetrain.plugins.model.decoder.module import DecoderForCausalLM
from drivetrain.plugins.model.decoder.weights import check_names, check_tied, load_weights


class DecoderModelConfig(PluginConfig):
    """Settings of the decoder."""

    long_context: bool = Field(
        False,
        description="For models with LongRoPE (Phi-3 128k): use the long factors for every position, which allows the "
        "whole context. Off, the short factors are used and the context ends at the original length, where short "
        "prompts score as the model's authors intended. No effect on other models.",
    )


def _attention_spec(config: DecoderConfig, dtype: str) -> AttentionSpec:
    return AttentionSpec(
        tuple(
            LayerAttention(
                num_heads=config.num_heads,
                num_kv_heads=config.num_kv_heads,
                head_size=config.head_size,
                scale=config.attention_scale,
                window=layer.window,
                soft_cap=config.attention_soft_cap,
            )
            for layer in config.layers
        ),
        dtype,
    )


def _unbound(spec: KernelSpec) -> Callable[..., Any]:
    """A module that is made only to be counted needs no kernels."""

    def refuse(*tensors: torch.Tensor) -> None:
        raise AssertionError(f"{spec.operation} called on a module that was made only to be described")

    return refuse


def parameter_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter that a ``config.json`` stands for; of those that are tied, one.

    Raises LoaderError and UnknownArchitectureError.
    """
    shape = read_config(config)
    empty = _on_meta(shape, None, Kernels(_unbound, "meta", torch.float32), torch.device("meta"))
    return {name: tuple(parameter.shape) for name, parameter in empty.named_parameters()}


def _on_meta(
    config: DecoderConfig, spec: ModelSpec | None, kernels: Kernels, device: torch.device
) -> DecoderForCausalLM:
    with torch.device("meta"):
        return DecoderForCausalLM(config, spec, kernels, device)


def _num_parameters(config: DecoderConfig) -> int:
    """Of all layers, by making one of each kind."""
    kinds = Counter(config.layers)
    kernels = Kernels(_unbound, "meta", torch.float32)
    empty = _on_meta(replace(config, layers=tuple(kinds)), None, kernels, torch.device("meta"))
    of_layers = [sum(parameter.numel() for parameter in layer.parameters()) for layer in empty.model.layers]
    rest = sum(parameter.numel() for parameter in empty.parameters()) - sum(of_layers)
    return rest + sum(count * size for count, size in zip(kinds.values(), of_layers, strict=True))


class DecoderModel(Model):
    """Llama 2/3, SmolLM 2/3, Mistral, Qwen 2/3, Gemma 2/3 (text), Phi-3, OLMo 2 and Granite."""

    tier = Tier.PORTABLE
    Config = DecoderModelConfig
    config: DecoderModelConfig
    architectures = frozenset(ARCHITECTURES)

    @classmethod
    def abilities(cls) -> frozenset[str]:
        return frozenset({"layerwise", "meta"})

    def describe(self, config: Mapping[str, Any], dtype: str) -> ModelSpec:
        shape = read_config(config, long_context=self.config.long_context)
        return ModelSpec(
            architecture=shape.architecture,
            vocab_size=shape.vocab_size,
            hidden_size=shape.hidden_size,
            num_layers=len(shape.layers),
            max_position=shape.max_position,
            num_parameters=_num_parameters(shape),
            attention=_attention_spec(shape, dtype),
        )

    def build(self, checkpoint: Checkpoint, context: BuildContext) -> CausalLM:
        shape, module, tied = self._prepare(checkpoint, context)
        if context.quantizer is None:
            module.bind_losses(shape, Kernels(context.bind, context.device.type, context.dtype))
        load_weights(module, checkpoint, context, tied)
        return module.eval()

    def open_layers(self, checkpoint: Checkpoint, context: BuildContext) -> LayeredModel:
        shape, module, tied = self._prepare(checkpoint, context)
        check_names(module, checkpoint, tied)
        check_tied(checkpoint, tied, context.dtype)
        return LayeredDecoder(shape, module.spec, module, checkpoint, context)

    def _prepare(
        self, checkpoint: Checkpoint, context: BuildContext
    ) -> tuple[DecoderConfig, DecoderForCausalLM, dict[str, str]]:
        """The configuration, the module without its weights, and which parameters are tied to which."""
        dtype = str(context.dtype).removeprefix("torch.")
        spec = self.describe(checkpoint.config, dtype)
        shape = read_config(checkpoint.config, long_context=self.config.long_context)
        kernels = Kernels(context.bind, context.device.type, context.dtype)
        module = _on_meta(shape, spec, kernels, context.device)
        return shape, module, {"lm_head.weight": "model.embed_tokens.weight"} if shape.tie_embeddings else {}
