"""Contract of a model plugin: architectures as torch modules that training and serving share.

Shapes: T tokens of a step, packed flat over sequences; E hidden size; V vocabulary; N rows whose logits are wanted.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from drivetrain.contracts.plugin import Plugin, Probe, ProbeContext

if TYPE_CHECKING:
    import torch
    from torch import nn

    from drivetrain.contracts.attention import AttentionSpec, AttentionStep
    from drivetrain.contracts.kernels import KernelSpec
    from drivetrain.contracts.loader import Checkpoint
    from drivetrain.contracts.quantizer import Quantizer
    from drivetrain.contracts.source import Progress


@dataclass(frozen=True)
class ModelSpec:
    """The shape of a model: all that other parts may know of it before it is built.

    architecture:     its Hugging Face class name: ``"LlamaForCausalLM"``.
    max_position:     tokens of context that the model was made for.
    num_parameters:   of the whole model, tied weights counted once.
    attention:        every attention layer; its dtype is the run's parameter dtype.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    max_position: int
    num_parameters: int
    attention: AttentionSpec


class CausalLM(Protocol):
    """What a built model can do. It is also a ``torch.nn.Module``; nothing in it depends on there being a cache."""

    spec: ModelSpec

    def forward(self, ids_T: torch.Tensor, positions_T: torch.Tensor, step: AttentionStep) -> torch.Tensor:
        """Final hidden states after the last norm, [T, E]. ids and positions are int64 [T]; ``step`` attends."""

    def logits(self, hidden_NE: torch.Tensor) -> torch.Tensor:
        """Scores over the vocabulary for some rows of the hidden states, [N, V] in the parameter dtype, any final soft
        cap or scale applied."""


@runtime_checkable
class ScoresTargets(Protocol):
    """A built model that scores targets without holding all logits."""

    def token_losses(self, hidden_TE: torch.Tensor, targets_T: torch.Tensor) -> torch.Tensor:
        """Cross entropy of each row's target, float32 [T]; 0 and no gradient where the target is -100. The same as from
        ``logits``, but for rounding."""


@runtime_checkable
class FindsMostLikely(Protocol):
    """A built model that finds greedy tokens without all scores."""

    def prepare_most_likely(self) -> None:
        """Make what :meth:`most_likely` needs beside the weights, which are all there. Called once, for serving; until
        then and without it there is only ``logits``."""

    def most_likely(self, hidden_NE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The best score of each row [N], in the parameter dtype, and its token, int64 [N], as ``logits`` has them; of
        equals the first. None where that would be no faster."""


@dataclass(frozen=True)
class BuildContext:
    """What a model needs to be built.

    device:    where parameters live.
    dtype:     torch dtype of parameters and computing.
    bind:      ``bind(KernelSpec) -> callable``: the chosen implementation of a logical operation.
    quantizer: converts each linear layer once its weights are loaded; None builds plain trainable layers.
    progress:  told how many tensors are loaded.
    """

    device: torch.device
    dtype: torch.dtype
    bind: Callable[[KernelSpec], Callable[..., Any]]
    quantizer: Quantizer | None
    progress: Progress


class Model(Plugin):
    """A family of architectures.

    Optional abilities: ``meta`` (``build`` on the meta device makes a module without values, quantized layers included,
    in no time and without reading a tensor: so the core knows a model's bytes before it makes one); ``layerwise``
    (layers are read and converted one by one, and the whole model is never there in full).
    """

    kind = "model"

    architectures: ClassVar[frozenset[str]] = frozenset()
    """Hugging Face class names this plugin builds."""

    @abstractmethod
    def describe(self, config: Mapping[str, Any], dtype: str) -> ModelSpec:
        """The shape of the model that ``config`` (keys of ``config.json``) describes. Pure; allocates nothing large.

        Raises UnknownArchitectureError, or LoaderError for a configuration that contradicts itself.
        """

    @abstractmethod
    def build(self, checkpoint: Checkpoint, context: BuildContext) -> CausalLM:
        """Build the module in eval mode and load its weights.

        The quantizer is told the checkpoint's names. Raises MissingTensorError that names each absent tensor, and
        LoaderError for a shape that does not fit or a tensor that the model has no place for.
        """

    @classmethod
    def probe(cls, context: ProbeContext) -> Probe:
        if context.checkpoint is None:
            return Probe.yes("no weights opened yet")
        architecture = context.checkpoint.architecture
        if architecture in cls.architectures:
            return Probe.yes(f"builds {architecture}")
        return Probe.no(
            "unsupported_architecture",
            f"does not build {architecture}",
            wanted=architecture,
            offered=", ".join(sorted(cls.architectures)),
        )


class LayeredModel(Protocol):
    """A model whose decoder layers are read and run one at a time, so that it may be larger than memory.

    spec:        the whole model.
    norm_offset: what a norm adds to its weight before it multiplies by it: 1 for Gemma, 0 for most.
    """

    spec: ModelSpec
    norm_offset: float

    def layer_name(self, layer: int) -> str:
        """Dotted name of a decoder layer: ``"model.layers.0"``."""

    def outer_linears(self) -> Mapping[str, tuple[int, int]]:
        """Linear layers outside of the decoder layers by name, with their O and I: ``{"lm_head": (49152, 576)}``."""

    def embedding_bytes(self) -> int:
        """Most memory that :meth:`embed` takes beside its result."""

    def embed(self, ids: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        """The residual stream before the first layer, [T, E], for each int64 [T]. Nothing is kept afterwards."""

    def describe_layer(self, layer: int) -> nn.Module:
        """A decoder layer (:class:`drivetrain.contracts.kernels.DecoderLayer`) on the meta device, to be counted."""

    def load_layer(self, layer: int) -> nn.Module:
        """A decoder layer with its weights, in full precision, on the device. Nothing of it is kept here."""

    def load_linear(self, name: str) -> nn.Linear:
        """One of :meth:`outer_linears` with its weights."""

    def run_layer(
        self, module: nn.Module, layer: int, x_TE: torch.Tensor, positions_T: torch.Tensor, step: AttentionStep
    ) -> torch.Tensor:
        """The residual stream behind a layer, [T, E]."""


@runtime_checkable
class OpensLayers(Protocol):
    """Ability of a model plugin: a model layer by layer."""

    def open_layers(self, checkpoint: Checkpoint, context: BuildContext) -> LayeredModel:
        """Compares names and shapes with the files, as ``build`` does, and reads no tensor. ``context.quantizer`` is
        not used. Raises MissingTensorError and LoaderError."""
