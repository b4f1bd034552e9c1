"""The decoder, one layer at a time: each is read from the files when it is wanted, and nothing of it is kept.

Shapes: T tokens of a step, packed flat; E hidden size; V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn
from torch.nn import functional

from drivetrain.contracts.attention import AttentionStep
from drivetrain.contracts.loader import Checkpoint
from drivetrain.contracts.model import BuildContext, ModelSpec
from drivetrain.plugins.model.decoder.config import DecoderConfig
from drivetrain.plugins.model.decoder.layers import LAYERS, Kernels
from drivetrain.plugins.model.decoder.module import DecoderForCausalLM
from drivetrain.plugins.model.decoder.weights import read_parameters

_EMBEDDINGS, _HEAD = "model.embed_tokens", "lm_head"


class LayeredDecoder:
    """A decoder whose layers stay in the files.

    skeleton: the whole module on the meta device, its names checked against the files; only the frequencies of its
              rotations have values.
    """

    def __init__(
        self,
        config: DecoderConfig,
        spec: ModelSpec,
        skeleton: DecoderForCausalLM,
        checkpoint: Checkpoint,
        context: BuildContext,
    ) -> None:
        self.spec = spec
        self.norm_offset = config.norm_offset
        self._config, self._skeleton, self._checkpoint, self._context = config, skeleton, checkpoint, context
        self._kernels = Kernels(context.bind, context.device.type, context.dtype)

    def layer_name(self, layer: int) -> str:
        return f"model.layers.{layer}"

    def outer_linears(self) -> Mapping[str, tuple[int, int]]:
        return {_HEAD: (self._config.vocab_size, self._config.hidden_size)}

    def embedding_bytes(self) -> int:
        # The table as the files give it, which may be a copy, and the one that is read into.
        return 2 * self._config.vocab_size * self._config.hidden_size * self._context.dtype.itemsize

    def embed(self, ids: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        table_VE = self._checkpoint.tensor(f"{_EMBEDDINGS}.weight", self._context.dtype).to(self._context.device)
        scale = self._skeleton.model.embed_tokens.scale
        for ids_T in ids:
            x_TE = functional.embedding(ids_T.to(table_VE.device), table_VE)
            yield x_TE if scale == 1.0 else x_TE * scale

    def describe_layer(self, layer: int) -> nn.Module:
        return self._skeleton.model.layers[layer]

    def load_layer(self, layer: int) -> nn.Module:
        with torch.device("meta"):
            module = LAYERS[self._config.norms](self._config, layer, self._kernels)
        read_parameters(module, self.layer_name(layer), self._checkpoint, self._context)
        return module.eval()

    def load_linear(self, name: str) -> nn.Linear:
        own = f"{name}.weight"
        source = own if own in self._checkpoint else f"{_EMBEDDINGS}.weight"
        rows, width = self.outer_linears()[name]
        linear = nn.Linear(width, rows, bias=False, device="meta")
        linear.weight = nn.Parameter(
            self._checkpoint.tensor(source, self._context.dtype).to(self._context.device), requires_grad=False
        )
        return linear

    def run_layer(
        self, module: nn.Module, layer: int, x_TE: torch.Tensor, positions_T: torch.Tensor, step: AttentionStep
    ) -> torch.Tensor:
        rope = self._config.layers[layer].rope
        angles = None if rope is None else self._skeleton.model.ropes[rope](positions_T)
        out: torch.Tensor = module(x_TE, angles, step)
        return out
