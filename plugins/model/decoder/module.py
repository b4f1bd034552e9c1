"""The decoder as a torch module: embeddings, layers, last norm, and the scores over the vocabulary.

Shapes: T tokens of a step, packed flat over sequences; E hidden size; V vocabulary; N rows whose logits are wanted.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from drivetrain.contracts.attention import AttentionStep
from drivetrain.contracts.kernels import LargestOutput
from drivetrain.contracts.model import ModelSpec
from drivetrain.contracts.packed import PackedWeight
from drivetrain.fusion import is_plain_linear
from drivetrain.packed import PackedEmbedding
from drivetrain.plugins.model.decoder.config import DecoderConfig
from drivetrain.plugins.model.decoder.layers import LAYERS, Kernels, Linear, RMSNorm
from drivetrain.plugins.model.decoder.rope import RotaryEmbedding


class Embedding(nn.Module):
    """Token ids to vectors, scaled where the architecture says so."""

    def __init__(self, config: DecoderConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size, dtype=dtype))
        self.scale = config.embedding_scale
        if config.rounds_embedding_scale:
            self.scale = torch.tensor(self.scale, dtype=dtype, device="cpu").item()

    def forward(self, ids_T: torch.Tensor) -> torch.Tensor:
        x_TE = functional.embedding(ids_T, self.weight)
        return x_TE if self.scale == 1.0 else x_TE * self.scale

    def packed_with(self, packed: PackedWeight, dtype: torch.dtype) -> PackedEmbedding:
        """The same table, looked up in the packed weight of the output layer that is tied to it."""
        return PackedEmbedding(packed, dtype, self.scale)


def _bind_layers(config: DecoderConfig, kernels: Kernels) -> Callable[..., torch.Tensor]:
    sizes = {
        "E": config.hidden_size,
        "I": config.intermediate_size,
        "H": config.num_heads,
        "G": config.num_kv_heads,
        "D": config.head_size,
        "R": config.ropes[0].rotary_size,
    }
    params = {
        "eps": config.norm_eps,
        "weight_offset": config.norm_offset,
        "residual_scale": config.residual_scale,
        "activation": float(config.activation == "gelu_tanh_mul"),
        "norms_heads": float(config.qk_norm == "head"),
    }
    return kernels("decoder_layers", sizes, params)


class Decoder(nn.Module):
    """Everything up to the last norm."""

    def __init__(self, config: DecoderConfig, kernels: Kernels, device: torch.device) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config, kernels.dtype)
        self.layers = nn.ModuleList(LAYERS[config.norms](config, i, kernels) for i in range(len(config.layers)))
        self.norm = RMSNorm(config.hidden_size, config, kernels)
        self._rope_of_layer = [layer.rope for layer in config.layers]
        angle_dtype = torch.float32 if config.rope_in_float32 else kernels.dtype
        self.ropes = nn.ModuleList(RotaryEmbedding(rope, angle_dtype, device) for rope in config.ropes)
        self._run_layers = _bind_layers(config, kernels)

    def forward(self, ids_T: torch.Tensor, positions_T: torch.Tensor, step: AttentionStep) -> torch.Tensor:
        x_TE = self.embed_tokens(ids_T)
        angles = [rope(positions_T) for rope in self.ropes]
        x_TE = self._run_layers(self.layers, x_TE, angles, self._rope_of_layer, step)
        out: torch.Tensor = self.norm(x_TE)
        return out


class DecoderForCausalLM(nn.Module):
    """A language model of one of the decoder's architectures, the same for training and serving.

    Built under the meta device it allocates nothing but the rope frequencies, which go to ``device``.
    """

    def __init__(self, config: DecoderConfig, spec: ModelSpec | None, kernels: Kernels, device: torch.device) -> None:
        super().__init__()
        self.model = Decoder(config, kernels, device)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, False, kernels)
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.logits_divisor = config.logits_divisor
        self.logits_soft_cap = config.logits_soft_cap
        if spec is not None:
            self.spec = spec
        self._token_losses: Callable[..., torch.Tensor] | None = None
        self._find_most_likely: LargestOutput | None = None

    def bind_losses(self, config: DecoderConfig, kernels: Kernels) -> None:
        """Bind what only training needs."""
        sizes = {"E": config.hidden_size, "V": config.vocab_size}
        self._token_losses = kernels("linear_cross_entropy", sizes, {"soft_cap": config.logits_soft_cap or 0.0})

    def forward(self, ids_T: torch.Tensor, positions_T: torch.Tensor, step: AttentionStep) -> torch.Tensor:
        """Final hidden states after the last norm, [T, E]. ids and positions are int64 [T]; ``step`` attends."""
        out: torch.Tensor = self.model(ids_T, positions_T, step)
        return out

    def logits(self, hidden_NE: torch.Tensor) -> torch.Tensor:
        """Scores over the vocabulary, [N, V], scaled and capped as the architecture says."""
        scores_NV: torch.Tensor = self.lm_head(hidden_NE)
        if self.logits_divisor != 1.0:
            scores_NV = scores_NV / self.logits_divisor
        if self.logits_soft_cap is not None:
            scores_NV = torch.tanh(scores_NV / self.logits_soft_cap) * self.logits_soft_cap
        return scores_NV

    def prepare_most_likely(self) -> None:
        """Have the kernel of the output layer get ready to find the largest of its outputs, where it can."""
        changes_scores = self.logits_divisor != 1.0 or self.logits_soft_cap is not None  # and makes some of them equal
        head = self.lm_head
        if isinstance(head, Linear) and is_plain_linear(head) and head.bias is None and not changes_scores:
            self._find_most_likely = head.find_largest()

    def most_likely(self, hidden_NE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The best score of each row [N] and its token [N]; None where kernels know nothing better than all scores."""
        return None if self._find_most_likely is None else self._find_most_likely(hidden_NE)

    def token_losses(self, hidden_TE: torch.Tensor, targets_T: torch.Tensor) -> torch.Tensor:
        """Cross entropy of each row's target, float32 [T]; 0 where the target is -100."""
        if self.logits_divisor != 1.0:
            hidden_TE = hidden_TE / self.logits_divisor
        assert self._token_losses is not None, "the model was built for serving"
        return self._token_losses(hidden_TE, self.lm_head.weight, targets_T)
