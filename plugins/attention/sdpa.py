"""The reference attention backend: a paged cache, and torch's scaled_dot_product_attention over it, on any device.

Shapes: T query tokens of one step; S sequences; t query tokens of one sequence; L keys; H query heads; G key/value
heads; R = H / G query heads that share a key/value head; D head size; B blocks of the cache; N tokens in a block; W
blocks gathered for a sequence.

What all layers of a KV group share (which blocks to gather, which rows they belong to, masks) is planned once a step.
Sequences with one new token, the decodes, are attended together; sequences with more are attended one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from drivetrain.contracts.attention import (
    AnyPagedCache,
    AttentionBatch,
    AttentionSpec,
    AttentionStep,
    KVGroup,
    LayerAttention,
    LayerPages,
    PagedCache,
)
from drivetrain.contracts.plugin import Probe, ProbeContext, Tier
from drivetrain.errors import EngineError
from drivetrain.pages import PagedBackend, Pages, read_blocks, write_tokens
from drivetrain.serving.transfer import on_device

_MASK_BYTES = 64 * 2**20
"""Bound on the masks a step keeps, and on the mask or scores of one slice of queries."""

_MAX_BUCKETS = 4
_ROWS_PER_BUCKET = 16
"""Decodes are sorted by length and attended in up to 4 buckets of at least 16 rows, each padded to its own longest.
Measured with 64 sequences of 50 to 350 tokens, 9/3 heads of 64, 30 layers, 2 CPU threads: 110 ms a step with one
bucket, 58 ms with 4, 58 ms with 8, 101 ms one by one; with 16 sequences 1 bucket is as good as 2, better than 4."""


# --- the plan of one step ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DecodeBucket:
    """Sequences of similar length with one new token each (s of them).

    rows_s:    their rows among the step's tokens.
    blocks_sW: blocks to gather, sequence by sequence, flat [s * W].
    mask:      [s, 1, 1, W * N] in the layer's dtype: 0 where the query sees the key, -inf elsewhere.
    """

    rows_s: torch.Tensor
    blocks_sW: torch.Tensor
    mask: torch.Tensor


class QuerySlice:
    """Some queries of one sequence with the keys that they can see at all, numbered from the first gathered key.

    queries: first and one past the last row among the sequence's queries.
    keys:    first and one past the last key.
    offset:  key number of the first query itself.
    """

    def __init__(self, queries: tuple[int, int], keys: tuple[int, int], offset: int, window: int | None) -> None:
        self.queries = slice(*queries)
        self.keys = slice(*keys)
        self._num_queries = queries[1] - queries[0]
        self._num_keys = keys[1] - keys[0]
        self._offset = offset - keys[0]
        self._window = window
        self._mask: torch.Tensor | None = None

    @property
    def is_plain_causal(self) -> bool:
        """True when the n-th query sees exactly the first n keys, so that no mask is needed."""
        return self._offset == 0 and (self._window is None or self._window >= self._num_queries)

    @property
    def size(self) -> int:
        """Entries of the mask."""
        return self._num_queries * self._num_keys

    def mask(self, dtype: torch.dtype, device: torch.device, keep: bool) -> torch.Tensor:
        """[t, L] of 0 where the query sees the key and -inf elsewhere; remembered for the next layer if ``keep``."""
        if self._mask is not None:
            return self._mask
        own_t1 = torch.arange(self._offset, self._offset + self._num_queries, device=device)[:, None]
        keys_1L = torch.arange(self._num_keys, device=device)[None, :]
        hidden = keys_1L > own_t1
        if self._window is not None:
            hidden |= keys_1L <= own_t1 - self._window
        mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))
        if keep:
            self._mask = mask
        return mask


@dataclass(frozen=True)
class PrefillPlan:
    """One sequence with several new tokens, or any sequence when there is no cache.

    rows:    its rows among the step's tokens.
    blocks:  blocks that hold its keys, [W]; None when its new tokens are all that it sees.
    slices:  its queries in pieces whose mask stays small.
    keep:    whether masks may be kept from layer to layer.
    """

    rows: slice
    blocks: torch.Tensor | None
    slices: tuple[QuerySlice, ...]
    keep: bool


@dataclass(frozen=True)
class GroupPlan:
    """All that the layers of one KV group share in a step.

    slots: [T] where keys and values are written; None without a cache.
    """

    slots: torch.Tensor | None
    decodes: tuple[DecodeBucket, ...]
    prefills: tuple[PrefillPlan, ...]


def _query_slices(t: int, offset: int, window: int | None, scores_per_mask: int, itemsize: int) -> list[QuerySlice]:
    """Cut t queries, the first of which is key ``offset``, so that no slice's mask or scores exceed the bound."""
    slices = []
    start = 0
    while start < t:
        first_key = 0 if window is None else max(0, offset + start - window + 1)
        # The widest row of a slice of n queries has (offset + start - first_key) + n keys: n * (base + n) <= limit.
        base = offset + start - first_key
        limit = max(1, _MASK_BYTES // (itemsize * scores_per_mask))
        n = int((-base + (base * base + 4 * limit) ** 0.5) / 2)
        end = min(t, start + max(1, n))
        slices.append(QuerySlice((start, end), (first_key, offset + end), offset + start, window))
        start = end
    return slices


class _Planner:
    """Makes the plan of each KV group for one step."""

    def __init__(self, spec: AttentionSpec, batch: AttentionBatch, block_size: int | None) -> None:
        self.spec = spec
        self.batch = batch
        self.block_size = block_size
        self.dtype: torch.dtype = getattr(torch, spec.dtype)
        self.device = batch.query_starts.device
        self.starts = [0]
        for length in batch.query_lengths:
            self.starts.append(self.starts[-1] + length)

    def plan(self, group: KVGroup) -> GroupPlan:
        sequences = range(self.batch.num_sequences)
        if self.block_size is None:
            return GroupPlan(None, (), self._prefills(group, sequences))
        lengths = self.batch.query_lengths
        decodes = [s for s in sequences if lengths[s] == 1 and self.batch.context_lengths[s] > 0]
        taken = set(decodes)
        prefills = [s for s in sequences if s not in taken]
        return GroupPlan(self.batch.slots[group.index], self._decodes(group, decodes), self._prefills(group, prefills))

    def _decodes(self, group: KVGroup, sequences: list[int]) -> tuple[DecodeBucket, ...]:
        if not sequences:
            return ()
        assert self.block_size is not None
        num_buckets = min(_MAX_BUCKETS, -(-len(sequences) // _ROWS_PER_BUCKET))
        if num_buckets > 1:
            sequences = sorted(sequences, key=lambda s: self.batch.context_lengths[s])
        per_bucket = -(-len(sequences) // num_buckets)
        return tuple(
            self._decode_bucket(group, sequences[i : i + per_bucket]) for i in range(0, len(sequences), per_bucket)
        )

    def _decode_bucket(self, group: KVGroup, sequences: list[int]) -> DecodeBucket:
        size, window = self.block_size, group.window
        assert size is not None
        own = [self.batch.context_lengths[s] for s in sequences]
        first = [0 if window is None else max(0, position - window + 1) // size for position in own]
        widest = max(position // size - start for position, start in zip(own, first, strict=True)) + 1
        index_sc = on_device(np.array([sequences, own, first], dtype=np.int64), self.device)
        sequences_s, own_s1, first_s1 = index_sc[0], index_sc[1, :, None], index_sc[2, :, None]
        table_sM = self.batch.block_tables[group.index].index_select(0, sequences_s)
        if window is None:
            blocks_sW = table_sM[:, :widest]
        else:
            columns_sW = first_s1 + torch.arange(widest, device=self.device)
            blocks_sW = table_sM.gather(1, columns_sW.clamp_(max=table_sM.shape[1] - 1))
        positions_sL = first_s1 * size + torch.arange(widest * size, device=self.device)
        hidden_sL = positions_sL > own_s1
        if window is not None:
            hidden_sL |= positions_sL <= own_s1 - window
        mask = torch.zeros(hidden_sL.shape, dtype=self.dtype, device=self.device)
        mask.masked_fill_(hidden_sL, float("-inf"))
        rows_s = on_device(np.array([self.starts[s] for s in sequences], dtype=np.int64), self.device)
        return DecodeBucket(rows_s, blocks_sW.reshape(-1), mask[:, None, None, :])

    def _prefills(self, group: KVGroup, sequences: Sequence[int]) -> tuple[PrefillPlan, ...]:
        capped = [self.spec.layers[i].num_heads for i in group.layers if self.spec.layers[i].soft_cap is not None]
        # The explicit path of a soft cap holds float32 scores of every head, not only a mask.
        scores_per_mask, itemsize = (max(capped), 4) if capped else (1, self.dtype.itemsize)
        cut: list[tuple[int, int, list[QuerySlice]]] = []
        for s in sequences:
            first_block, offset = self._first_key(group, s)
            length = self.batch.query_lengths[s]
            cut.append((s, first_block, _query_slices(length, offset, group.window, scores_per_mask, itemsize)))
        masked = sum(piece.size for _, _, pieces in cut for piece in pieces if capped or not piece.is_plain_causal)
        keep = masked * self.dtype.itemsize <= _MASK_BYTES
        return tuple(
            PrefillPlan(
                slice(self.starts[s], self.starts[s + 1]), self._blocks(group, s, first_block), tuple(pieces), keep
            )
            for s, first_block, pieces in cut
        )

    def _first_key(self, group: KVGroup, s: int) -> tuple[int, int]:
        """The first block a sequence can see, and the number its first query has when keys count from that block."""
        context = self.batch.context_lengths[s]
        if self.block_size is None or context == 0 or group.window is None:
            return 0, context
        first_block = max(0, context - group.window + 1) // self.block_size
        return first_block, context - first_block * self.block_size

    def _blocks(self, group: KVGroup, s: int, first_block: int) -> torch.Tensor | None:
        context = self.batch.context_lengths[s]
        if self.block_size is None or context == 0:
            return None
        end = -(-(context + self.batch.query_lengths[s]) // self.block_size)
        return self.batch.block_tables[group.index][s, first_block:end]


# --- attention by the plan -----------------------------------------------------------------------------------------


def _attend(
    layer: LayerAttention, q_tHD: torch.Tensor, k_LGD: torch.Tensor, v_LGD: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """Attention of one sequence's queries; ``mask`` None means that the n-th query sees the first n keys."""
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q_tHD, k_LGD, v_LGD))
    is_grouped = layer.num_heads != layer.num_kv_heads
    o = functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=layer.scale, enable_gqa=is_grouped
    )
    return o.squeeze(0).transpose(0, 1)


def _attend_capped(
    layer: LayerAttention, q_AGtD: torch.Tensor, k_AGLD: torch.Tensor, v_AGLD: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Attention with the soft cap ``cap * tanh(scores / cap)`` before the mask, which no fused kernel of torch has.

    A and G are dims of a batch; softmax is in float32 or wider.
    """
    assert layer.soft_cap is not None
    wide = torch.promote_types(q_AGtD.dtype, torch.float32)
    scores = torch.matmul(q_AGtD, k_AGLD.transpose(-1, -2)).to(wide) * layer.scale
    scores = torch.tanh(scores / layer.soft_cap) * layer.soft_cap + mask
    return torch.matmul(scores.softmax(dim=-1).to(v_AGLD.dtype), v_AGLD)


class SdpaStep:
    """Attention of one step by its plan."""

    def __init__(self, spec: AttentionSpec, plans: Sequence[GroupPlan], cache: AnyPagedCache | None) -> None:
        self._layers = spec.layers
        self._cache = cache
        self._plan_of_layer: list[GroupPlan] = [plans[0]] * len(spec.layers)
        for group, plan in zip(spec.groups, plans, strict=True):
            for layer in group.layers:
                self._plan_of_layer[layer] = plan

    def attend(self, layer: int, q_THD: torch.Tensor, k_TGD: torch.Tensor, v_TGD: torch.Tensor) -> torch.Tensor:
        plan, attention = self._plan_of_layer[layer], self._layers[layer]
        keys = values = None
        if self._cache is not None:
            assert plan.slots is not None
            keys, values = self._cache.keys[layer], self._cache.values[layer]
            # A prompt attends to its own keys as they are kept, so that it does not matter where it was cut.
            k_TGD = write_tokens(keys, plan.slots, k_TGD)
            v_TGD = write_tokens(values, plan.slots, v_TGD)
        if plan.prefills and not plan.decodes:
            parts = [self._prefill(attention, part, q_THD, k_TGD, v_TGD, keys, values) for part in plan.prefills]
            return parts[0] if len(parts) == 1 else torch.cat(parts)
        if not plan.prefills:
            return self.attend_written(layer, q_THD)
        o_THD = torch.empty_like(q_THD)
        for part in plan.prefills:
            o_THD[part.rows] = self._prefill(attention, part, q_THD, k_TGD, v_TGD, keys, values)
        for bucket in plan.decodes:
            o_THD.index_copy_(0, bucket.rows_s, self._decode(attention, bucket, q_THD, keys, values))
        return o_THD

    def layer_pages(self, layer: int) -> LayerPages | None:
        """Only a step of decodes: a prompt with nothing before it attends without its pages."""
        plan = self._plan_of_layer[layer]
        if not isinstance(self._cache, PagedCache) or plan.prefills or plan.slots is None:
            return None
        return LayerPages(self._cache.keys[layer], self._cache.values[layer], plan.slots)

    def attend_written(self, layer: int, q_THD: torch.Tensor) -> torch.Tensor:
        assert self._cache is not None
        plan, attention = self._plan_of_layer[layer], self._layers[layer]
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        o_THD = torch.empty_like(q_THD)
        for bucket in plan.decodes:
            o_THD.index_copy_(0, bucket.rows_s, self._decode(attention, bucket, q_THD, keys, values))
        return o_THD

    def _decode(
        self,
        layer: LayerAttention,
        bucket: DecodeBucket,
        q_THD: torch.Tensor,
        keys: Pages | None,
        values: Pages | None,
    ) -> torch.Tensor:
        assert keys is not None
        assert values is not None
        s, groups, size = bucket.rows_s.shape[0], layer.num_kv_heads, layer.head_size
        # Heads of one group become rows of queries, so that keys and values are read once and never repeated.
        q_sGRD = q_THD.index_select(0, bucket.rows_s).view(s, groups, -1, size)
        k_sGLD, v_sGLD = (
            read_blocks(x, bucket.blocks_sW, q_THD.dtype).view(s, -1, groups, size).transpose(1, 2)
            for x in (keys, values)
        )
        if layer.soft_cap is None:
            o = functional.scaled_dot_product_attention(
                q_sGRD, k_sGLD, v_sGLD, attn_mask=bucket.mask, scale=layer.scale
            )
        else:
            o = _attend_capped(layer, q_sGRD, k_sGLD, v_sGLD, bucket.mask)
        return o.reshape(s, layer.num_heads, size)

    def _prefill(
        self,
        layer: LayerAttention,
        part: PrefillPlan,
        q_THD: torch.Tensor,
        k_TGD: torch.Tensor,
        v_TGD: torch.Tensor,
        keys: Pages | None,
        values: Pages | None,
    ) -> torch.Tensor:
        if part.blocks is None:
            k_LGD, v_LGD = k_TGD[part.rows], v_TGD[part.rows]
        else:
            assert keys is not None
            assert values is not None
            k_LGD, v_LGD = (read_blocks(x, part.blocks, q_THD.dtype) for x in (keys, values))
        q_tHD = q_THD[part.rows]
        pieces = [
            self._prefill_slice(layer, piece, part.keep, q_tHD[piece.queries], k_LGD[piece.keys], v_LGD[piece.keys])
            for piece in part.slices
        ]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _prefill_slice(
        self,
        layer: LayerAttention,
        piece: QuerySlice,
        keep: bool,
        q_tHD: torch.Tensor,
        k_LGD: torch.Tensor,
        v_LGD: torch.Tensor,
    ) -> torch.Tensor:
        if layer.soft_cap is None:
            mask = None if piece.is_plain_causal else piece.mask(q_tHD.dtype, q_tHD.device, keep)
            return _attend(layer, q_tHD, k_LGD, v_LGD, mask)
        mask = piece.mask(q_tHD.dtype, q_tHD.device, keep)
        t, _, size = q_tHD.shape
        q_GRtD = q_tHD.view(t, layer.num_kv_heads, -1, size).permute(1, 2, 0, 3)
        k_G1LD, v_G1LD = (x.transpose(0, 1).unsqueeze(1) for x in (k_LGD, v_LGD))
        o_GRtD = _attend_capped(layer, q_GRtD, k_G1LD, v_G1LD, mask)
        return o_GRtD.permute(2, 0, 1, 3).reshape(t, layer.num_heads, size)


# --- the plugin ----------------------------------------------------------------------------------------------------


class SdpaAttention(PagedBackend):
    """Paged attention in plain torch, on any device: the reference that other backends are tested against."""

    contract_version = "1.3"
    tier = Tier.REFERENCE

    @classmethod
    def probe(cls, context: ProbeContext) -> Probe:
        return cls.refuses_kv(context) or Probe.yes("plain torch runs on every device and dtype")

    @classmethod
    def abilities(cls) -> frozenset[str]:
        return frozenset({"training", "windows", "soft_cap", "takes_written", "kv_int8", "kv_fp8"})

    def begin(self, spec: AttentionSpec, batch: AttentionBatch, cache: AnyPagedCache | None) -> AttentionStep:
        if cache is None and any(batch.context_lengths):
            raise EngineError(
                "a sequence has context in a cache, but no cache was given",
                where="attention/sdpa",
                found=list(batch.context_lengths),
                allowed="context_lengths of 0",
            )
        planner = _Planner(spec, batch, None if cache is None else self.config.block_size)
        return SdpaStep(spec, [planner.plan(group) for group in spec.groups], cache)
