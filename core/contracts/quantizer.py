"""Contract of a quantizer: the formats in which a model's weights, activations and keys and values are kept."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

from pydantic import Field

from drivetrain.contracts.plugin import Plugin, PluginConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    import torch

    from drivetrain.contracts.loader import Checkpoint
    from drivetrain.contracts.packed import PackedWeight

FULL = "full"
"""In ``Declaration.starts_from``: weights of 16 bits or more."""


@dataclass(frozen=True)
class Declaration:
    """What a quantizer does, before any weight is there.

    weights, activations: their formats in words; None where they stay as they are.
    group_size:           how many weights of a row share a scale; None for whole rows, or where there are no scales.
    needs_calibration:    whether it wants inputs of each layer (``drivetrain quantize``), and not the weights alone.
    starts_from:          ``"full"``, and the operations of packed weights that it takes as they are stored.
    operations:           the logical operations that its layers need.
    """

    weights: str | None = None
    activations: str | None = None
    group_size: int | None = None
    needs_calibration: bool = False
    starts_from: frozenset[str] = frozenset({FULL})
    operations: tuple[str, ...] = ()


class QuantizerConfig(PluginConfig):
    """What the core decides for every quantizer; a quantizer's own Config adds to it.

    rules: the first pattern that matches a layer's name decides. A pattern is parts of a dotted name side by side,
           with ``*`` for anything within a part: ``lm_head``, ``layers.0``, ``mlp.down_proj``. Several quantizers may
           take part in one model so; this one has the layers that no pattern matches.
    """

    rules: dict[str, str | dict[str, Any]] = Field(
        default_factory=dict,
        description="layer pattern -> another quantizer for those layers: {lm_head: none, layers.0: int8}",
    )
    kv: Literal["auto", "int8", "fp8"] = Field(
        "auto", description="what keys and values are kept in; auto: the precision's dtype"
    )
    allow_lossy: bool = Field(False, description="quantize weights that are quantized in the files already")


class Quantizer(Plugin):
    """Turns full-precision linear layers into quantized ones while a model is loaded, one module at a time, so that
    never more than one module is held in both forms.

    Optional ability: ``batch_invariant`` (a row's product does not depend on the other rows, to the last bit)."""

    kind = "quantizer"

    Config: ClassVar[type[PluginConfig]] = QuantizerConfig

    @abstractmethod
    def bits_per_weight(self) -> float | None:
        """Bits one quantized weight takes, scales included; None when weights keep the precision's dtype."""

    @abstractmethod
    def convert(self, name: str, linear: torch.nn.Linear) -> torch.nn.Module:
        """The module that replaces ``linear`` (weights loaded, on the device): same call, [..., in] -> [..., out].

        name: dotted path of the layer, so that a quantizer can leave out the ones it must not touch; returning
        ``linear`` itself keeps it as it is. A :class:`drivetrain.packed.PackedLinear` is bound to kernels once the
        model is built, run by the coarse ones, and saved; a module of another kind is called as it is.

        On the meta device it does the same with tensors that have no values: so the core knows the bytes of a model
        before it makes one. The core has checked that the weights are finite, and not quantized in the files already.

        Raises ConfigError that names the layer where its sizes don't fit: a group that does not divide the inputs.
        """

    def declares(self) -> Declaration:
        """What it does to weights and activations. Pure."""
        bits = self.bits_per_weight()
        return Declaration() if bits is None else Declaration(weights=f"{bits:g} bits")


@runtime_checkable
class DecidesTables(Protocol):
    """What the core hands to a model as its quantizer: it knows, too, what becomes of a table of embeddings that is
    tied to an output layer."""

    def packs_table(self, name: str) -> bool:
        """Whether the table ``name`` (``model.embed_tokens``) is looked up in the packed weight of the layer that it is
        tied to, now that there is one. Otherwise it stays as it is, beside the packed weight. Pure."""


@runtime_checkable
class TakesStored(Protocol):
    """A quantizer that uses packed weights as the files hold them."""

    def takes(self, name: str, stored: PackedWeight) -> bool:
        """Whether this layer's weight is used as it is stored. Pure."""

    def convert_stored(self, name: str, stored: PackedWeight, bias: torch.Tensor | None) -> torch.nn.Module:
        """The module for a layer whose weight the files hold in packed form; nothing is decoded.

        Tensors are on the device, and may be views of a mapped file: nobody writes to them.
        """


@dataclass(frozen=True)
class InputStatistics:
    """What calibration tokens tell of an input that one or several linear layers read. float32, on the device.

    num_tokens: that were seen.
    mean_abs_I: mean of ``|x|``.
    max_abs_I:  largest ``|x|``.
    gram_II:    mean of ``x x^T``: with it the squared error of a product is known for any change of the weights,
                ``mean |dW x|^2 = trace(dW gram dW^T)``. None where no quantizer of these layers wants it.
    """

    num_tokens: int
    mean_abs_I: torch.Tensor
    max_abs_I: torch.Tensor
    gram_II: torch.Tensor | None = None

    def divided(self, factors_I: torch.Tensor) -> InputStatistics:
        """The statistics of the same input divided by a positive factor for each channel."""
        gram_II = None if self.gram_II is None else self.gram_II / factors_I / factors_I.unsqueeze(1)
        return InputStatistics(self.num_tokens, self.mean_abs_I / factors_I, self.max_abs_I / factors_I, gram_II)


@runtime_checkable
class Calibrates(Protocol):
    """A quantizer that packs a weight by what its inputs are (``drivetrain quantize``).

    The core runs calibration tokens through the model, one decoder layer at a time. For each input of a layer it asks
    for factors first, folds them into what comes before (a norm, or the linear layer that makes the input), and then
    has the weights packed, in the order in which the layer uses them.
    """

    wants_gram: bool
    """Whether ``gram_II`` is needed."""

    def work_bytes(self, name: str, out_features: int, in_features: int) -> int:
        """Most memory that :meth:`input_factors` or :meth:`pack` takes for a weight of this size, beside the weight,
        the statistics and the packed weight. Pure; asked for every layer before the first is read.

        Raises ConfigError that names the layer where its sizes don't fit: a group that does not divide I.
        """

    def input_factors(self, weights_OI: Mapping[str, torch.Tensor], statistics: InputStatistics) -> torch.Tensor | None:
        """A positive factor for each channel of an input, [I]: the weights are multiplied by it and the input is
        divided by it, so that the product stays what it was. None leaves both alone.

        weights_OI: name of each linear layer that reads the input -> its weight, [O, I] each.
        Where several channels come out of the same outputs of the layer before (heads that share keys and values), they
        get the geometric mean of their factors.
        """

    def pack(self, name: str, weight_OI: torch.Tensor, statistics: InputStatistics) -> PackedWeight:
        """The packed weight of one layer, for the input that ``statistics`` describes.

        Deterministic; ``weight_OI`` (float32) is left as it is. Raises ConfigError that names the layer for a weight
        that can't be packed.
        """


@runtime_checkable
class Saves(Protocol):
    """A quantizer whose packed weights can be written as a model folder."""

    def save(
        self,
        folder: Path,
        source: Checkpoint,
        packed: Iterable[tuple[str, PackedWeight]],
        changed: Mapping[str, torch.Tensor],
        notes: Mapping[str, Any],
        wrote: Callable[[str, int], None],
    ) -> None:
        """Write a model folder, which is not there yet; nothing is left of it when this fails.

        source:  configuration, tokenizer, and every tensor that is not replaced.
        packed:  layer name and packed weight; the next is asked for once the one before is written.
        changed: name -> tensor in place of the source's; read once ``packed`` is at its end.
        notes:   how the weights came to be, for whoever reads ``quantization_config``.
        wrote:   told each layer with its bytes.
        Raises ConfigError for a weight that the format can't hold.
        """
