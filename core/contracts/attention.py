"""Contract of an attention backend: how keys and values are kept, and attention over them.

Shapes: T query tokens of one step, all sequences packed flat; S sequences; H query heads; G key/value heads (H is a
multiple of G); D head size; B blocks of the cache; N tokens in a block.

One step of serving or training:

    backend.begin(batch, cache) -> AttentionStep         once a step: whatever all layers share is prepared here
    step.attend(layer, q_THD, k_TGD, v_TGD) -> o_THD     once a layer, called by the model

The model sees only ``attend``; whether there is a cache behind it is none of its business.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from drivetrain.contracts.plugin import Plugin, Probe, ProbeContext, Purpose

if TYPE_CHECKING:
    import torch

FULL_KV = "auto"
"""KV format: keys and values are kept in the dtype of the queries."""

SCALED_KV = {"int8": ("int8", 127.0), "fp8": ("float8_e4m3fn", 448.0)}
"""KV formats with scales -> torch name of a stored number, and the number that the largest value of a key becomes."""


@dataclass(frozen=True)
class LayerAttention:
    """The attention of one layer.

    scale:    factor on the scores before the soft cap and softmax.
    window:   how many tokens back a query sees, itself included; None sees all.
    soft_cap: scores become ``cap * tanh(scores / cap)``; None leaves them.
    """

    num_heads: int
    num_kv_heads: int
    head_size: int
    scale: float
    window: int | None = None
    soft_cap: float | None = None


@dataclass(frozen=True)
class KVGroup:
    """Layers that see the same span of tokens and hence share one block table.

    window: the span in tokens; None is everything. Blocks that lie wholly before the span are freed.
    """

    index: int
    layers: tuple[int, ...]
    window: int | None


@dataclass(frozen=True)
class AttentionSpec:
    """All attention layers of a model, in order, and the dtype (torch name) of queries, keys and values.

    kv: the format in which keys and values are kept, as the quantizer has it: ``FULL_KV`` or one of ``SCALED_KV``.
        Without a cache it means nothing.
    """

    layers: tuple[LayerAttention, ...]
    dtype: str
    kv: str = FULL_KV

    @property
    def kv_dtype(self) -> str:
        """Torch name of the type in which a key's numbers are stored."""
        return SCALED_KV[self.kv][0] if self.kv in SCALED_KV else self.dtype

    @cached_property
    def groups(self) -> tuple[KVGroup, ...]:
        """Layers by window: full attention first, then windows from wide to narrow."""
        windows = {layer.window for layer in self.layers}
        ordered = sorted(windows, key=lambda window: (window is not None, -(window or 0)))
        return tuple(
            KVGroup(index, tuple(i for i, layer in enumerate(self.layers) if layer.window == window), window)
            for index, window in enumerate(ordered)
        )


@dataclass(frozen=True)
class KVContract:
    """What two backends must agree on to read each other's cache. Equal contracts keep the cache in a swap.

    layout:     name of the arrangement, versioned by whoever defines it, such as ``PAGED_BNGD``. It stands for the type
                of the cache object too: equal names, equal types.
    block_size: tokens in a block (N).
    dtype:      torch name of the stored type.
    """

    layout: str
    block_size: int
    dtype: str


PAGED_BNGD = "paged-BNGD/1"
"""Name of the layout that :class:`PagedCache` is. A backend that keeps it may take over another's cache in a swap."""


@dataclass(frozen=True)
class PagedCache:
    """Keys and values of every layer, each [B, N, G, D]: the plain paged layout, for any backend to share."""

    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]


PAGED_SCALED = "paged-BNGD+scales/1"
"""Name of the layout that :class:`ScaledCache` is; the contract's dtype tells ``int8`` from ``fp8``."""


@dataclass(frozen=True)
class ScaledPages:
    """Keys or values of one layer as small numbers, with a scale for each token and head beside them.

    codes:  int8 or float8_e4m3fn [B, N, G, D].
    scales: float32 [B, N, G]; a key is its codes times its scale. It comes from that key alone, when it is written: its
            largest absolute value divided by the largest code, and codes are rounded to nearest. Nothing is calibrated,
            and no later token changes an earlier one. A key that is not finite has the scale NaN.

    ``drivetrain.pages`` writes and reads them in plain torch, which is their meaning.
    """

    codes: torch.Tensor
    scales: torch.Tensor


@dataclass(frozen=True)
class ScaledCache:
    """Keys and values of every layer as small numbers. They are no tensors, so that code which takes a
    :class:`PagedCache` for granted fails, and computes nothing with codes."""

    keys: tuple[ScaledPages, ...]
    values: tuple[ScaledPages, ...]


AnyPagedCache = PagedCache | ScaledCache
"""A cache of one of the two layouts that are named here."""


@dataclass(frozen=True)
class AttentionBatch:
    """How one step's tokens lie over sequences. Host lists and device tensors say the same.

    query_lengths:   new tokens of each sequence in this step (S entries, each >= 1; their sum is T).
    context_lengths: tokens of each sequence that are already in the cache (S entries).
    query_starts:    int32 [S + 1] on the device: sequence s owns rows query_starts[s] .. query_starts[s + 1].
    kv_lengths:      int32 [S] on the device: context + query length.
    block_tables:    for each KV group, int32 [S, widest] on the device: row s lists the block of tokens 0..N-1,
                     N..2N-1, ...; unused entries, and those a window has freed, are 0. Empty without a cache.
    slots:           for each KV group, int64 [T] on the device: where token t's key and value are written, as
                     block * N + offset. Empty without a cache.
    is_open:         only the device knows how the T tokens are divided among the S sequences, and a sequence may have
                     none, with a KV length of 0. The two lists on the host tell S and, as a sum, T, and nothing else.
                     Such a batch has a cache, and only backends with ``graph_safe_prompts`` are given one.
    ends_only:       of what the model computes, only the row of each sequence's last token is read: a kernel that runs
                     the last layer may leave the others unfinished. Keys and values of all tokens are written.
    """

    query_lengths: Sequence[int]
    context_lengths: Sequence[int]
    query_starts: torch.Tensor
    kv_lengths: torch.Tensor
    block_tables: tuple[torch.Tensor, ...] = ()
    slots: tuple[torch.Tensor, ...] = ()
    is_open: bool = False
    ends_only: bool = False

    @property
    def num_sequences(self) -> int:
        return len(self.query_lengths)

    @property
    def num_tokens(self) -> int:
        return sum(self.query_lengths)


class AttentionStep(Protocol):
    """Attention of one step, shared by all layers."""

    def attend(self, layer: int, q_THD: torch.Tensor, k_TGD: torch.Tensor, v_TGD: torch.Tensor) -> torch.Tensor:
        """Write this step's keys and values, if there is a cache; return the attended values, [T, H, D] in q's dtype.

        Each query sees its own sequence's tokens up to and including itself, and not farther back than the layer's
        window. Differentiable when there is no cache.
        """


@dataclass(frozen=True)
class LayerPages:
    """Where one layer's keys and values of this step belong.

    keys, values: [B, N, G, D], of any strides but for a dense last dim.
    slots:        int64 [T], block * N + offset.
    """

    keys: torch.Tensor
    values: torch.Tensor
    slots: torch.Tensor


@runtime_checkable
class TakesWritten(Protocol):
    """Ability ``takes_written`` of a backend's steps: the model may write keys and values itself, by an operation that
    rotates them on the way."""

    def layer_pages(self, layer: int) -> LayerPages | None:
        """Where to write; None when this step needs keys and values in :meth:`AttentionStep.attend`, as it does where
        they are kept with scales."""

    def attend_written(self, layer: int, q_THD: torch.Tensor) -> torch.Tensor:
        """As ``attend``, after everything of this step has been written to ``layer_pages(layer)``."""


@dataclass(frozen=True)
class PagedView:
    """What a coarse kernel needs to write into the cache and attend over it by itself. A kernel that does not know
    :class:`ScaledCache` leaves such a step to the layers."""

    spec: AttentionSpec
    batch: AttentionBatch
    cache: AnyPagedCache
    block_size: int


@runtime_checkable
class OpensPages(Protocol):
    """An attention step whose backend claims ``opens_pages``: a kernel that runs whole layers may do their attention
    too, over the pages that the step would use. A backend opens them only where any correct attention may stand in for
    its own."""

    @property
    def pages(self) -> PagedView:
        """The pages of this step."""


KVCache = Any
"""A backend's own store of keys and values; the core only passes it back to the backend that made it."""


class AttentionBackend(Plugin):
    """Keeps keys and values, and attends over them. Stateless between steps but for the cache it was asked to make.

    Optional abilities: ``training`` (``begin`` works with ``cache=None``), ``windows``, ``soft_cap``, ``converts``
    (:class:`ConvertsCache`), ``opens_pages`` (its steps are :class:`OpensPages`), ``takes_written`` (its steps are
    :class:`TakesWritten`), ``batch_invariant`` (a sequence's result does not depend on what else is in the batch, to
    the last bit), ``kv_int8`` and ``kv_fp8`` (keeps keys and values in that format, see ``AttentionSpec.kv``), and
    ``graph_safe``: of a decode step, ``begin`` and ``attend`` read the number of sequences and the
    device tensors only, launch the same work whatever these hold, and wait for nothing, so that a platform may record
    the step and replay it with other values at the same addresses. ``graph_safe_prompts`` says the same of steps with
    prompts, and of the numbers of sequences and tokens; such steps come with ``AttentionBatch.is_open``. A backend that
    does not claim one of the first three refuses, in its probe, a model that needs it, and one that does not claim a KV
    format refuses that (:meth:`refuses_kv`).

    One that compiles has ``build_ahead`` (:class:`drivetrain.contracts.kernels.BuildsAhead`), which is called before
    anything else of it when an engine is built.
    """

    kind = "attention"

    @classmethod
    def refuses_kv(cls, context: ProbeContext) -> Probe | None:
        """The probe's answer where the context asks for a KV format that this backend does not claim; else None."""
        wanted = f"kv_{context.kv}"
        if context.kv == FULL_KV or context.purpose is not Purpose.SERVE or wanted in cls.abilities():
            return None
        own = sorted(name.removeprefix("kv_") for name in cls.abilities() if name.startswith("kv_"))
        return Probe.no(
            "unsupported_kv",
            f"it does not keep keys and values as {context.kv}",
            wanted=context.kv,
            offered=", ".join([FULL_KV, *own]),
        )

    @classmethod
    def probe(cls, context: ProbeContext) -> Probe:
        return cls.refuses_kv(context) or Probe.yes()

    @abstractmethod
    def kv_contract(self, spec: AttentionSpec) -> KVContract:
        """The layout this backend keeps. Pure."""

    @abstractmethod
    def bytes_per_block(self, spec: AttentionSpec, group: KVGroup) -> int:
        """Bytes that one block takes over all layers of ``group``, keys and values together. Pure."""

    @abstractmethod
    def allocate(self, spec: AttentionSpec, num_blocks: Sequence[int], device: torch.device) -> KVCache:
        """Make a cache with ``num_blocks[g]`` blocks for each group g of ``spec.groups``."""

    @abstractmethod
    def begin(self, spec: AttentionSpec, batch: AttentionBatch, cache: KVCache | None) -> AttentionStep:
        """Prepare one step. With ``cache=None`` each sequence's new tokens are all there is (training, scoring)."""

    @abstractmethod
    def copy_blocks(self, cache: KVCache, group: KVGroup, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks (source, destination) in every layer of ``group``. No destination is also a source."""

    @abstractmethod
    def clear_blocks(self, cache: KVCache, group: KVGroup, blocks: Sequence[int]) -> None:
        """Set whole blocks to zero in every layer of ``group``: what was written there may not be finite, and a slot
        that a later request masks still takes part in its products."""


@runtime_checkable
class ConvertsCache(Protocol):
    """Ability ``converts``: a swap to this backend takes over a cache of another layout, with blocks of equal size."""

    def converts_from(self, theirs: KVContract) -> bool:
        """Whether :meth:`convert` knows that layout and dtype. Pure."""

    def convert(
        self,
        spec: AttentionSpec,
        theirs: KVContract,
        cache: KVCache,
        num_blocks: Sequence[int],
        live_blocks: Sequence[Sequence[int]],
        device: torch.device,
    ) -> KVCache:
        """A cache of this backend with ``num_blocks[g]`` blocks for each KV group, where the ``live_blocks`` of each
        hold what ``cache`` holds and the others are zero; ``cache`` stays as it is. The step loop waits meanwhile.
        """
