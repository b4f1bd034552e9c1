"""Contract of a kernel provider, and the logical operations that providers implement.

A logical operation is a signature, a meaning (the reference provider, in plain torch) and a tolerance. A model asks for
it once, when it is built, and keeps the plain callable that it gets: nothing is looked up while a step runs.

Shapes: ``...`` any leading dims; E features; I, O features of a linear layer; T tokens; S sequences; V vocabulary; H
query heads; G key/value heads; D head size; R rotary dims (R <= D); B blocks of the cache; N tokens in a block. Where a
signature names no dtype, it is that of the activations.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from drivetrain.contracts.plugin import Plugin, Probe

if TYPE_CHECKING:
    import torch

    from drivetrain.contracts.attention import AttentionStep
    from drivetrain.contracts.source import Progress


@dataclass(frozen=True)
class Operation:
    """One logical operation.

    signature:      how the bound callable is called, as Python would print it.
    meaning:        what it computes.
    tolerance:      torch dtype name of the activations -> (relative, absolute) distance from the reference that still
                    passes.
    differentiable: whether gradients flow through it at all.
    constants:      arguments of a differentiable operation that need no gradient.
    writes:         arguments that are written to.
    result_dtype:   torch dtype name of the result where it is not that of the activations.
    takes_modules:  whether it works on modules: it can only be tried and measured with a whole model.
    rounds_inputs:  whether activations are rounded to few bits first; gradients pass that as if it did not happen.
    """

    name: str
    signature: str
    meaning: str
    tolerance: Mapping[str, tuple[float, float]] = field(
        default_factory=lambda: {"float32": (1e-5, 1e-5), "bfloat16": (1.6e-2, 1e-2), "float16": (2e-3, 1e-3)}
    )
    differentiable: bool = True
    constants: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    result_dtype: str | None = None
    takes_modules: bool = False
    rounds_inputs: bool = False

    @property
    def arguments(self) -> Mapping[str, str]:
        """Name -> shape of each argument, as the signature has them."""
        return dict(re.findall(r"(\w+): (?:\w+ )?\[([^\]]*)\]", self.signature.partition("->")[0]))


_PRODUCTS = {"float32": (1e-5, 1e-4), "bfloat16": (1.6e-2, 5e-2), "float16": (2e-3, 1e-2)}
"""Tolerance of what multiplies products with each other, or rounds a weight to the dtype of the activations."""

_OPERATIONS = (
    Operation(
        "rms_norm",
        "(x: [..., E], weight: [E]) -> [..., E]",
        "x / sqrt(mean(x^2) + eps) in float32, times (weight + weight_offset); spec params: eps, weight_offset",
    ),
    Operation(
        "rope",
        "(q: [T, H, D], k: [T, G, D], cos: [T, R], sin: [T, R]) -> (q, k)",
        "rotary embedding of the first R dims, halves paired as (i, i + R/2); the rest passes unchanged; cos and sin "
        "are of any floating dtype",
        constants=("cos", "sin"),
    ),
    Operation("silu_mul", "(gate: [..., E], up: [..., E]) -> [..., E]", "silu(gate) * up"),
    Operation("gelu_tanh_mul", "(gate: [..., E], up: [..., E]) -> [..., E]", "gelu(gate, tanh approximation) * up"),
    Operation("linear", "(x: [..., I], weight: [O, I], bias: [O] | None) -> [..., O]", "x @ weight.T + bias"),
    Operation(
        "add_rms_norm",
        "(x: [..., E], residual: [..., E], weight: [E]) -> (normed: [..., E], summed: [..., E])",
        "summed = residual + x, rounded once; normed = rms_norm(summed, weight); spec params: eps, weight_offset",
    ),
    Operation(
        "rope_write",
        "(q: [T, H, D], k: [T, G, D], v: [T, G, D], cos: [T, R], sin: [T, R], keys: [B, N, G, D], "
        "values: [B, N, G, D], slots: int64 [T]) -> q",
        "rope of q and k; k and v are written into the paged cache at slots (block * N + offset, no two alike) in its "
        "dtype. keys and values have any strides, but for a dense last dim",
        differentiable=False,
        writes=("keys", "values"),
    ),
    Operation(
        "gated_linear",
        "(x: [..., I], gate: [O, I], up: [O, I]) -> [..., O]",
        "act(x @ gate.T) * (x @ up.T); spec params: activation, 0 for silu and 1 for gelu (tanh approximation)",
        tolerance=_PRODUCTS,
    ),
    Operation(
        "linear_cross_entropy",
        "(x: [T, E], weight: [V, E], targets: int64 [T]) -> float32 [T]",
        "logsumexp(logits) - logits[target] for logits = x @ weight.T, in float32 or wider and without a reduction; a "
        "target of -100 gives 0 and no gradient; spec params: soft_cap, for logits = cap * tanh(logits / cap), 0 for "
        "none. A fused implementation never holds all logits",
        tolerance=_PRODUCTS,
        constants=("targets",),
        result_dtype="float32",
    ),
    Operation(
        "sample",
        "(logits: [S, V], temperature: float32 [S], top_k: int64 [S], top_p: float32 [S], min_p: float32 [S], "
        "draws: float64 [S]) -> int64 [S]",
        "the most likely token (the first of equals) where temperature <= 0; elsewhere softmax(logits / temperature), "
        "cut to the top_k most likely tokens and those as likely as the last of them (0: off), then to the most likely "
        "up to the one that brings their sum to top_p (1: off; of equals the first), then to those at least min_p as "
        "likely as the best (0: off), each time renormalized; its cumulative sum over the vocabulary is inverted at "
        "draws, in [0, 1). A row without a finite logit gives any token. Tolerance: how near a draw or top_p may be to "
        "a cumulative probability for the token on the other side to pass too",
        tolerance=dict.fromkeys(("float32", "bfloat16", "float16"), (0.0, 1e-5)),
        differentiable=False,
        result_dtype="int64",
    ),
    Operation(
        "linear_int8",
        "(x: [..., I], weight: int8 [O, I], scales: [O], bias: [O] | None) -> [..., O]",
        "x @ (weight * scales[:, None]).T + bias; scales are of any floating dtype",
        tolerance=_PRODUCTS,
        constants=("weight", "scales", "bias"),
    ),
    Operation(
        "linear_int4",
        "(x: [..., I], weight: uint8 [O, I / 2], scales: [O, I / group], mins: [O, I / group], bias: [O] | None) "
        "-> [..., O]",
        "x @ w.T + bias, where w = nibble * scale + min of its group of inputs; input 2k is in the low nibble of byte "
        "k, 2k + 1 in the high one; scales and mins are of any floating dtype; spec params: group, and zero_points, 1 "
        "where mins are uint8 zero points, 0 .. 15, and min = -zero * scale; 0 or absent otherwise",
        tolerance=_PRODUCTS,
        constants=("weight", "scales", "mins", "bias"),
    ),
    Operation(
        "linear_int4_a8",
        "(x: [..., I], weight: uint8 [O, I / 2], scales: [O, I / group], mins: [O, I / group], bias: [O] | None) "
        "-> [..., O]",
        "linear_int4 of activations that are rounded as linear_w8a8 rounds them, but with one scale for each 32 inputs "
        "of a row; I is a multiple of 32; spec params: group, zero_points",
        tolerance=_PRODUCTS,
        constants=("weight", "scales", "mins", "bias"),
        rounds_inputs=True,
    ),
    Operation(
        "linear_fp8",
        "(x: [..., I], weight: float8_e4m3fn [O, I], scales: [O], bias: [O] | None) -> [..., O]",
        "x @ (weight * scales[:, None]).T + bias; scales are of any floating dtype",
        tolerance=_PRODUCTS,
        constants=("weight", "scales", "bias"),
    ),
    Operation(
        "linear_int3",
        "(x: [..., I], low: uint8 [O, I / 4], high: uint8 [O, I / 8], scales: [O, I / group], mins: [O, I / group], "
        "bias: [O] | None) -> [..., O]",
        "x @ w.T + bias, where w = value * scale + min of its group of inputs; the lower two bits of input 4k + j are "
        "bits 2j and 2j + 1 of byte k of low, the third of input 8k + j is bit j of byte k of high; scales and mins "
        "are of any floating dtype; spec params: group, zero_points (0 .. 7)",
        tolerance=_PRODUCTS,
        constants=("low", "high", "scales", "mins", "bias"),
    ),
    Operation(
        "linear_w8a8",
        "(x: [..., I], weight: int8 [O, I], scales: [O], bias: [O] | None) -> [..., O]",
        "(q @ weight.T) * scale * scales + bias, summed in integers, where a row of x is q * scale: scale = max(|x|) / "
        "127 and q = x / scale in float32 or wider, rounded to the nearest integer, of two as near the even one; a row "
        "of zeros stays one; scales are of any floating dtype",
        tolerance=_PRODUCTS,
        constants=("weight", "scales", "bias"),
        rounds_inputs=True,
    ),
    Operation(
        "linear_fp8a8",
        "(x: [..., I], weight: float8_e4m3fn [O, I], scales: [O], x_scale: [], bias: [O] | None) -> [..., O]",
        "(q @ weight.T) * scale * scales + bias, where a row of x is q * scale: q = x / scale in float32 or wider, cut "
        "at 448 and rounded to float8_e4m3fn; scale is x_scale, or where that is 0, max(|x|) / 448 of the row; a row "
        "of zeros stays one; scales are of any floating dtype",
        tolerance=_PRODUCTS,
        constants=("weight", "scales", "x_scale", "bias"),
        rounds_inputs=True,
    ),
    Operation(
        "linear_gguf",
        "(x: [..., I], blocks: uint8 [O, bytes], bias: [O] | None) -> [..., O]",
        "x @ w.T + bias, where w is what GGUF blocks stand for; spec params: type, ggml's number of it (Q4_0 2, Q4_1 "
        "3, Q5_0 6, Q5_1 7, Q8_0 8, Q4_K 12, Q5_K 13, Q6_K 14)",
        tolerance=_PRODUCTS,
        constants=("blocks", "bias"),
    ),
    Operation(
        "linear_gguf_a8",
        "(x: [..., I], blocks: uint8 [O, bytes], bias: [O] | None) -> [..., O]",
        "linear_gguf of activations that are rounded as linear_w8a8 rounds them, but with one scale for each 32 inputs "
        "of a row",
        tolerance=_PRODUCTS,
        constants=("blocks", "bias"),
        rounds_inputs=True,
    ),
    Operation(
        "decoder_layers",
        "(layers: DecoderLayer each, x: [T, E], angles: (cos, sin) each, ropes: int | None each, step: AttentionStep) "
        "-> [T, E]",
        "x through every layer, each called with the angles that ropes names: a whole step between embedding and last "
        "norm. A coarse implementation reads the layers' parts and runs their attention over the step's open pages "
        "where no gradient is asked for, and calls the layers where it can't; spec sizes: E, I, H, G, D, R; spec "
        "params: eps, weight_offset, residual_scale, activation (as gated_linear), norms_heads (1 where q_norm and "
        "k_norm are of single heads)",
        tolerance={"float32": (1e-4, 1e-4), "bfloat16": (5e-2, 5e-2), "float16": (1e-2, 1e-2)},
        takes_modules=True,
    ),
)

OPERATIONS: dict[str, Operation] = {operation.name: operation for operation in _OPERATIONS}
"""Every logical operation by name."""


@dataclass(frozen=True)
class KernelSpec:
    """One use of an operation, known when the model is built.

    device_type: torch device type.
    dtype:       torch dtype name of the activations.
    sizes:       named fixed sizes: ``{"E": 576}``.
    params:      named constants of the operation: ``{"eps": 1e-5}``.
    """

    operation: str
    device_type: str
    dtype: str
    sizes: Mapping[str, int] = field(default_factory=dict)
    params: Mapping[str, float] = field(default_factory=dict)


Angles = tuple["torch.Tensor", "torch.Tensor"]
"""cos and sin of a step's positions, each [T, R]."""


@dataclass(frozen=True)
class Projection:
    """Outputs ``first`` .. ``first + rows - 1`` of a linear layer, or of what a quantizer has put in its place.

    rows: None for all, where it holds nothing else.
    """

    module: torch.nn.Module
    first: int = 0
    rows: int | None = None


@dataclass(frozen=True)
class DecoderLayerParts:
    """What a coarse kernel needs to run a decoder layer by itself. A norm's weight is None where the layer has none.

    The layer is ``x += scale * after_attention(o(attend(q, k, v)))`` with q, k, v of ``before_attention(x)``, and then
    ``x += scale * after_mlp(down(act(gate) * up))`` of ``before_mlp(x)``.
    """

    before_attention: torch.Tensor | None
    after_attention: torch.Tensor | None
    before_mlp: torch.Tensor | None
    after_mlp: torch.Tensor | None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    q: Projection
    k: Projection
    v: Projection
    o: Projection
    gate: Projection
    up: Projection
    down: Projection


class DecoderLayer(Protocol):
    """A layer that can be called, and that opens itself to coarse kernels."""

    def __call__(self, x_TE: torch.Tensor, angles: Angles | None, step: AttentionStep) -> torch.Tensor:
        """The residual stream behind this layer, [T, E]."""

    def parts(self) -> DecoderLayerParts:
        """Its weights as they are now."""


class KernelProvider(Plugin):
    """Implements some of the logical operations.

    Abilities: ``deterministic``, the same inputs give the same bits in every run; ``batch_invariant``, the bits of a
    row do not depend on the rows beside it; ``operators``, autograd and torch.compile see each callable as an operator
    of ``torch.library`` (``drivetrain.operators``).
    """

    kind = "kernels"

    @abstractmethod
    def operations(self) -> frozenset[str]:
        """Names of the operations this provider has at all. Pure."""

    @abstractmethod
    def supports(self, spec: KernelSpec) -> Probe:
        """Whether this use of an operation is covered. Pure; compiles nothing."""

    @abstractmethod
    def make(self, spec: KernelSpec) -> Callable[..., Any]:
        """The callable for this use, with the operation's signature. May compile. Differentiable where the operation
        is.

        One callable serves any number of rows; what depends on it is decided inside. Raises KernelBuildError where what
        ``supports`` promised can't be made after all: no compiler, a source that does not compile. Under ``auto``
        another provider then serves the use, and the user is told.
        """


LargestOutput = Callable[["torch.Tensor"], tuple["torch.Tensor", "torch.Tensor"]]
"""Rows x [N, I] -> each row's largest output, [N], and the first output that has it, int64 [N]."""


@runtime_checkable
class FindsLargest(Protocol):
    """Optional, of a callable of ``linear``: the largest output of each row in less time than all of them take. It is
    what greedy decoding wants of an output layer."""

    def largest_of(self, weight_OI: torch.Tensor) -> LargestOutput | None:
        """What finds, for any rows x [N, I], the largest outputs of ``x @ weight.T``: those that the callable itself
        gives, but for rounding in its sums; of outputs that are equal once they are rounded to the dtype of x, the
        first. NaN counts as the largest.

        May keep what is made of the weight. Values that are written to it later, by torch's own in-place functions, are
        seen. None where it would be no faster than all outputs.
        """


@runtime_checkable
class BuildsAhead(Protocol):
    """Compiles what its callables need before the first of them is made: all at once, and with progress."""

    def build_ahead(self, progress: Progress) -> None:
        """Called once, when a model is about to be bound to this provider. Raises KernelBuildError."""
