"""The attention backend ``acme``: a paged cache whose heads lie before its tokens.

Shapes: T query tokens of one step; t query tokens of one sequence; L keys that they can see; H query heads; G key/value
heads; R = H / G query heads that share a key/value head; D head size; B blocks of the cache; N tokens in a block.

The Acme One reads one head at a time, so a block keeps the tokens of a head together: [B, G, N, D]. No other backend
reads that layout, and a swap to another one has to convert or recompute.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from drivetrain.contracts.attention import (
    AttentionBackend,
    AttentionBatch,
    AttentionSpec,
    AttentionStep,
    KVContract,
    KVGroup,
    LayerAttention,
)
from drivetrain.contracts.plugin import PluginConfig, Probe, ProbeContext, Tier
from drivetrain.errors import EngineError
from pydantic import Field

from acme_accelerator.card import zeros

LAYOUT = "acme-BGND/1"


@dataclass(frozen=True)
class AcmeCache:
    """Keys and values of every layer, each [B, G, N, D], on the card."""

    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]


def attend(
    layer: LayerAttention, q_tHD: torch.Tensor, k_GLD: torch.Tensor, v_GLD: torch.Tensor, offset: int
) -> torch.Tensor:
    """Attention of one sequence, [t, H, D]; the first query is key number ``offset``. Softmax in float32 or wider."""
    t, _, size = q_tHD.shape
    wide = torch.promote_types(q_tHD.dtype, torch.float32)
    q_GRtD = q_tHD.to(wide).view(t, layer.num_kv_heads, -1, size).permute(1, 2, 0, 3)
    scores_GRtL = q_GRtD @ k_GLD.to(wide)[:, None].transpose(-1, -2) * layer.scale
    if layer.soft_cap is not None:
        scores_GRtL = layer.soft_cap * torch.tanh(scores_GRtL / layer.soft_cap)
    query_t1 = torch.arange(offset, offset + t, device=q_tHD.device)[:, None]
    key_1L = torch.arange(k_GLD.shape[1], device=q_tHD.device)[None, :]
    hidden_tL = key_1L > query_t1
    if layer.window is not None:
        hidden_tL |= key_1L <= query_t1 - layer.window
    weights_GRtL = scores_GRtL.masked_fill(hidden_tL, float("-inf")).softmax(dim=-1)
    out_GRtD = weights_GRtL @ v_GLD.to(wide)[:, None]
    return out_GRtD.permute(2, 0, 1, 3).reshape(t, layer.num_heads, size).to(q_tHD.dtype)


class AcmeStep:
    """Attention of one step, shared by all layers."""

    def __init__(self, spec: AttentionSpec, batch: AttentionBatch, cache: AcmeCache | None, block_size: int) -> None:
        self._spec = spec
        self._batch = batch
        self._cache = cache
        self._block_size = block_size
        self._group_of = {layer: group.index for group in spec.groups for layer in group.layers}

    def attend(self, layer: int, q_THD: torch.Tensor, k_TGD: torch.Tensor, v_TGD: torch.Tensor) -> torch.Tensor:
        attention, outputs, row = self._spec.layers[layer], [], 0
        self._write(layer, k_TGD, v_TGD)
        for sequence, count in enumerate(self._batch.query_lengths):
            rows = slice(row, row + count)
            context = self._batch.context_lengths[sequence]
            if self._cache is None:
                k_GLD, v_GLD = (x[rows].transpose(0, 1) for x in (k_TGD, v_TGD))
                outputs.append(attend(attention, q_THD[rows], k_GLD, v_GLD, 0))
            else:
                # Blocks before the window may have been given away, so nothing before it is read.
                first = 0 if attention.window is None else max(0, context - attention.window + 1)
                k_GLD, v_GLD = self._read(layer, sequence, first, context + count)
                outputs.append(attend(attention, q_THD[rows], k_GLD, v_GLD, context - first))
            row += count
        return torch.cat(outputs) if outputs else torch.empty_like(q_THD)

    def _write(self, layer: int, k_TGD: torch.Tensor, v_TGD: torch.Tensor) -> None:
        if self._cache is None:
            return
        slots_T = self._batch.slots[self._group_of[layer]]
        blocks_T, offsets_T = slots_T // self._block_size, slots_T % self._block_size
        for store_BGND, new_TGD in ((self._cache.keys[layer], k_TGD), (self._cache.values[layer], v_TGD)):
            store_BGND[blocks_T, :, offsets_T] = new_TGD.to(store_BGND.dtype)

    def _read(self, layer: int, sequence: int, first: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the tokens first .. end of a sequence, each [G, L, D]."""
        assert self._cache is not None
        table = self._batch.block_tables[self._group_of[layer]][sequence].long()
        positions_L = torch.arange(first, end, device=table.device)
        blocks_L, offsets_L = table[positions_L // self._block_size], positions_L % self._block_size
        stores = (self._cache.keys[layer], self._cache.values[layer])
        k_GLD, v_GLD = (store_BGND[blocks_L, :, offsets_L].transpose(0, 1) for store_BGND in stores)
        return k_GLD, v_GLD


class AcmeAttention(AttentionBackend):
    """Attends over a paged cache whose heads lie before its tokens, kept on the card."""

    contract_version = "1.0"
    tier = Tier.REFERENCE

    class Config(PluginConfig):
        block_size: int = Field(32, ge=1, description="Tokens in a block of the cache.")

    config: Config

    @classmethod
    def abilities(cls) -> frozenset[str]:
        return frozenset({"training", "windows", "soft_cap"})

    @classmethod
    def probe(cls, context: ProbeContext) -> Probe:
        platform = context.platform
        if platform is None or platform.device_type == "cpu":
            return Probe.yes("the Acme One computes on the processor")
        return Probe.no(
            "wrong_device",
            "tensors of the Acme One are the processor's",
            wanted="a device of type cpu",
            offered=platform.device_type,
        )

    def kv_contract(self, spec: AttentionSpec) -> KVContract:
        return KVContract(LAYOUT, self.config.block_size, spec.dtype)

    def bytes_per_block(self, spec: AttentionSpec, group: KVGroup) -> int:
        dtype: torch.dtype = getattr(torch, spec.dtype)
        features = sum(spec.layers[i].num_kv_heads * spec.layers[i].head_size for i in group.layers)
        return 2 * self.config.block_size * features * dtype.itemsize

    def allocate(self, spec: AttentionSpec, num_blocks: Sequence[int], device: torch.device) -> AcmeCache:
        """As in the contract. Raises MemoryBudgetError when the card is full."""
        blocks_of = {layer: num_blocks[group.index] for group in spec.groups for layer in group.layers}

        def make(index: int) -> torch.Tensor:
            layer = spec.layers[index]
            shape = (blocks_of[index], layer.num_kv_heads, self.config.block_size, layer.head_size)
            return zeros(shape, getattr(torch, spec.dtype), device)

        layers = range(len(spec.layers))
        return AcmeCache(tuple(make(i) for i in layers), tuple(make(i) for i in layers))

    def begin(self, spec: AttentionSpec, batch: AttentionBatch, cache: AcmeCache | None) -> AttentionStep:
        """As in the contract. Raises EngineError for a batch whose context is in a cache that was not given."""
        if cache is None and any(batch.context_lengths):
            raise EngineError("sequences have context, but no cache was given", where="attention/acme")
        return AcmeStep(spec, batch, cache, self.config.block_size)

    def copy_blocks(self, cache: AcmeCache, group: KVGroup, pairs: Sequence[tuple[int, int]]) -> None:
        sources, destinations = [source for source, _ in pairs], [destination for _, destination in pairs]
        for layer in group.layers:
            for store in (cache.keys[layer], cache.values[layer]):
                store[destinations] = store[sources]

    def clear_blocks(self, cache: AcmeCache, group: KVGroup, blocks: Sequence[int]) -> None:
        for layer in group.layers:
            for store in (cache.keys[layer], cache.values[layer]):
                store[list(blocks)] = 0
