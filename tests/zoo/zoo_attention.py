"""Attention backends with one fault each, most of them over a plain paged backend that has none.

Shapes: T query tokens of a step; t query tokens and L visible tokens of one sequence; H query heads; G key/value heads;
D head size; B blocks of N tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pydantic import Field

from drivetrain.contracts.attention import (
    FULL_KV,
    PAGED_BNGD,
    AnyPagedCache,
    AttentionBackend,
    AttentionBatch,
    AttentionSpec,
    AttentionStep,
    KVContract,
    KVGroup,
    LayerAttention,
    LayerPages,
)
from drivetrain.contracts.plugin import Plugin, PluginConfig, Probe, ProbeContext
from drivetrain.pages import scale_rows, tensors_of, unscale_rows
from drivetrain.plugins.attention.sdpa import SdpaAttention
from drivetrain.testing.attention_oracle import PlainStep

Stores = list[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values of each layer, both [B, N, G, D]."""


class PlainPaged(AttentionBackend):
    """Paged attention one query at a time; nothing is wrong with it."""

    class Config(PluginConfig):
        block_size: int = Field(4, ge=1, description="tokens in a block of the cache")

    config: Config

    @classmethod
    def abilities(cls) -> frozenset[str]:
        return frozenset({"training", "windows", "soft_cap", "batch_invariant"})

    def kv_contract(self, spec: AttentionSpec) -> KVContract:
        return KVContract("plain-BNGD/1", self.config.block_size, spec.dtype)

    def bytes_per_block(self, spec: AttentionSpec, group: KVGroup) -> int:
        features = sum(spec.layers[i].num_kv_heads * spec.layers[i].head_size for i in group.layers)
        itemsize: int = getattr(torch, spec.dtype).itemsize
        return 2 * self.config.block_size * features * itemsize

    def allocate(self, spec: AttentionSpec, num_blocks: Sequence[int], device: torch.device) -> Stores:
        group_of = {layer: group.index for group in spec.groups for layer in group.layers}
        stores = []
        for index, layer in enumerate(spec.layers):
            shape = (num_blocks[group_of[index]], self.config.block_size, layer.num_kv_heads, layer.head_size)
            keys, values = (torch.zeros(shape, dtype=getattr(torch, spec.dtype), device=device) for _ in range(2))
            stores.append((keys, values))
        return stores

    def begin(self, spec: AttentionSpec, batch: AttentionBatch, cache: Stores | None) -> AttentionStep:
        return PlainPagedStep(self, spec, batch, cache)

    def copy_blocks(self, cache: Stores, group: KVGroup, pairs: Sequence[tuple[int, int]]) -> None:
        for layer in group.layers:
            for store in cache[layer]:
                for source, target in pairs:
                    store[target] = store[source]

    def clear_blocks(self, cache: Stores, group: KVGroup, blocks: Sequence[int]) -> None:
        for layer in group.layers:
            for store in cache[layer]:
                store[list(blocks)] = 0

    # --- where the faults are made -----------------------------------------------------------------------------------

    def layer_as_seen(self, layer: LayerAttention) -> LayerAttention:
        return layer

    def last_key(self, position: int) -> int:
        """The last token that the query at ``position`` sees."""
        return position

    def key_heads(self, layer: LayerAttention) -> list[int]:
        """The key/value head of each query head."""
        return [head * layer.num_kv_heads // layer.num_heads for head in range(layer.num_heads)]

    def result(self, o_THD: torch.Tensor, batch: AttentionBatch) -> torch.Tensor:
        return o_THD


class PlainPagedStep:
    """One step, one query after the other."""

    def __init__(self, backend: PlainPaged, spec: AttentionSpec, batch: AttentionBatch, cache: Stores | None) -> None:
        self._backend, self._batch, self._cache = backend, batch, cache
        self._layers = [backend.layer_as_seen(layer) for layer in spec.layers]
        self._group_of = {layer: group.index for group in spec.groups for layer in group.layers}

    def attend(self, layer: int, q_THD: torch.Tensor, k_TGD: torch.Tensor, v_TGD: torch.Tensor) -> torch.Tensor:
        group, outputs, start = self._group_of[layer], [], 0
        stores = None if self._cache is None else [store.flatten(0, 1) for store in self._cache[layer]]
        if stores is not None:
            for store, new in zip(stores, (k_TGD, v_TGD), strict=True):
                store[self._batch.slots[group]] = new.to(store.dtype)
        for s, (count, context) in enumerate(zip(self._batch.query_lengths, self._batch.context_lengths, strict=True)):
            keys, values = k_TGD[start : start + count], v_TGD[start : start + count]
            if stores is not None:
                size = self._backend.config.block_size
                table = self._batch.block_tables[group][s].long()
                slots = (table[:, None] * size + torch.arange(size, device=table.device)).flatten()
                keys, values = (store[slots] for store in stores)
            for row in range(count):
                outputs.append(self._query(self._layers[layer], q_THD[start + row], context + row, keys, values))
            start += count
        return self._backend.result(torch.stack(outputs), self._batch)

    def _query(
        self, layer: LayerAttention, q_HD: torch.Tensor, position: int, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        first = 0 if layer.window is None else max(0, position - layer.window + 1)
        seen = slice(first, self._backend.last_key(position) + 1)
        heads = self._backend.key_heads(layer)
        k_HLD, v_HLD = (x[seen][:, heads].transpose(0, 1).float() for x in (keys, values))
        scores_HL = (k_HLD @ q_HD.float().unsqueeze(-1)).squeeze(-1) * layer.scale
        if layer.soft_cap is not None:
            scores_HL = layer.soft_cap * torch.tanh(scores_HL / layer.soft_cap)
        return (scores_HL.softmax(-1).unsqueeze(1) @ v_HLD).squeeze(1).to(q_HD.dtype)


class WindowOneTooWide(PlainPaged):
    """Sees one token more than the window."""

    def layer_as_seen(self, layer: LayerAttention) -> LayerAttention:
        return layer if layer.window is None else dataclasses.replace(layer, window=layer.window + 1)


class ScaleFromHeadSize(PlainPaged):
    """Takes the usual scale, not the layer's."""

    def layer_as_seen(self, layer: LayerAttention) -> LayerAttention:
        return dataclasses.replace(layer, scale=layer.head_size**-0.5)


class ReadsWholeBlocks(PlainPaged):
    """Sees the last block to its end, where the past of the block still lies."""

    def last_key(self, position: int) -> int:
        size = self.config.block_size
        return position // size * size + size - 1


class IgnoresSoftCap(PlainPaged):
    """Claims soft caps and does not apply them."""

    def layer_as_seen(self, layer: LayerAttention) -> LayerAttention:
        return dataclasses.replace(layer, soft_cap=None)


class MixesUpHeads(PlainPaged):
    """Deals key/value heads out in turn, not in groups."""

    def key_heads(self, layer: LayerAttention) -> list[int]:
        return [head % layer.num_kv_heads for head in range(layer.num_heads)]


class TrainsWithoutGradients(PlainPaged):
    """Claims training, and cuts the graph."""

    def result(self, o_THD: torch.Tensor, batch: AttentionBatch) -> torch.Tensor:
        return o_THD.detach()


class AnswersInFloat32(PlainPaged):
    """Whatever the queries' dtype, the output is float32."""

    def result(self, o_THD: torch.Tensor, batch: AttentionBatch) -> torch.Tensor:
        return o_THD.float()


class FeelsTheCompany(PlainPaged):
    """Claims batch invariance, and rounds by the size of the batch."""

    def result(self, o_THD: torch.Tensor, batch: AttentionBatch) -> torch.Tensor:
        return o_THD * (1 + 1e-6 * batch.num_sequences)


class CopiesKeysOnly(PlainPaged):
    """Leaves the values behind when blocks are copied."""

    def copy_blocks(self, cache: Stores, group: KVGroup, pairs: Sequence[tuple[int, int]]) -> None:
        for layer in group.layers:
            for source, target in pairs:
                cache[layer][0][target] = cache[layer][0][source]


class ClearsOneLayer(SdpaAttention):
    """Clears blocks in the first layer of the group only, and multiplies masked slots by zero."""

    def clear_blocks(self, cache: AnyPagedCache, group: KVGroup, blocks: Sequence[int]) -> None:
        super().clear_blocks(cache, dataclasses.replace(group, layers=group.layers[:1]), blocks)


class ForgetsValuesInItsBytes(PlainPaged):
    """Counts the keys only: the engine would give it twice the memory that it asks for."""

    def bytes_per_block(self, spec: AttentionSpec, group: KVGroup) -> int:
        return super().bytes_per_block(spec, group) // 2


class TakesWindowsUnclaimed(PlainPaged):
    """Does not claim windows, and its probe takes models that need them all the same."""

    @classmethod
    def abilities(cls) -> frozenset[str]:
        return super().abilities() - {"windows"}


class ClaimsSdpasLayout(PlainPaged):
    """Names its cache as sdpa does, though it is another: a swap would keep it."""

    def kv_contract(self, spec: AttentionSpec) -> KVContract:
        return dataclasses.replace(super().kv_contract(spec), layout=PAGED_BNGD)


class EmptiesWhatItDoesNotKnow(PlainPaged):
    """Empties a cache that it has not seen before: what another instance wrote is lost."""

    def __init__(self, config: PluginConfig) -> None:
        super().__init__(config)
        self._known: list[Stores] = []

    def begin(self, spec: AttentionSpec, batch: AttentionBatch, cache: Stores | None) -> AttentionStep:
        if cache is not None and not any(cache is known for known in self._known):
            self._known.append(cache)
            for store in (store for layer in cache for store in layer):
                store.zero_()
        return super().begin(spec, batch, cache)


class _ScalesInPlaceStep:
    def __init__(self, step: AttentionStep) -> None:
        self._step = step

    def attend(self, layer: int, q_THD: torch.Tensor, k_TGD: torch.Tensor, v_TGD: torch.Tensor) -> torch.Tensor:
        out = self._step.attend(layer, q_THD, k_TGD, v_TGD)
        with torch.no_grad():
            k_TGD.mul_(0.5)
        return out


class WritesToItsInputs(PlainPaged):
    """Scales the caller's keys in place."""

    def begin(self, spec: AttentionSpec, batch: AttentionBatch, cache: Any) -> AttentionStep:
        return _ScalesInPlaceStep(super().begin(spec, batch, cache))


class _CopiedPagesStep:
    def __init__(self, step: Any) -> None:
        self._step = step

    def attend(self, layer: int, q_THD: torch.Tensor, k_TGD: torch.Tensor, v_TGD: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self._step.attend(layer, q_THD, k_TGD, v_TGD)
        return out

    def layer_pages(self, layer: int) -> LayerPages | None:
        pages: LayerPages | None = self._step.layer_pages(layer)
        return None if pages is None else dataclasses.replace(pages, keys=pages.keys.clone())

    def attend_written(self, layer: int, q_THD: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self._step.attend_written(layer, q_THD)
        return out


class HandsOutACopy(SdpaAttention):
    """The pages that it lets the model write are a copy."""

    def begin(self, spec: AttentionSpec, batch: AttentionBatch, cache: AnyPagedCache | None) -> AttentionStep:
        return _CopiedPagesStep(super().begin(spec, batch, cache))


class _AltersKeysStep:
    def __init__(self, step: Any, alter: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._step, self._alter = step, alter

    def attend(self, layer: int, q_THD: torch.Tensor, k_TGD: torch.Tensor, v_TGD: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self._step.attend(layer, q_THD, self._alter(k_TGD), self._alter(v_TGD))
        return out


def _rounded_as_one(x_TGD: torch.Tensor) -> torch.Tensor:
    codes, scales = scale_rows(x_TGD.flatten(1).unsqueeze(1), torch.int8)
    return unscale_rows(codes, scales, x_TGD.dtype).view_as(x_TGD)


class OneScaleForAllHeads(SdpaAttention):
    """A token's heads share one scale, so that a loud head drowns a quiet one."""

    def begin(self, spec: AttentionSpec, batch: AttentionBatch, cache: AnyPagedCache | None) -> AttentionStep:
        step = super().begin(spec, batch, cache)
        return step if spec.kv == FULL_KV else _AltersKeysStep(step, _rounded_as_one)


class RoundsFaultsAway(SdpaAttention):
    """Makes numbers of what is none before it is rounded: a fault of the weights is never seen."""

    def begin(self, spec: AttentionSpec, batch: AttentionBatch, cache: AnyPagedCache | None) -> AttentionStep:
        step = super().begin(spec, batch, cache)
        return step if spec.kv == FULL_KV else _AltersKeysStep(step, torch.nan_to_num)


class LeavesScalesBehind(SdpaAttention):
    """Copies a block's codes and not their scales."""

    def copy_blocks(self, cache: AnyPagedCache, group: KVGroup, pairs: Sequence[tuple[int, int]]) -> None:
        for layer in group.layers:
            for pages in (cache.keys[layer], cache.values[layer]):
                codes = tensors_of(pages)[0]
                for source, target in pairs:
                    codes[target] = codes[source]


class ClearsCodesOnly(SdpaAttention):
    """Clears a block's codes and not their scales, and nothing times NaN is NaN."""

    def clear_blocks(self, cache: AnyPagedCache, group: KVGroup, blocks: Sequence[int]) -> None:
        for layer in group.layers:
            for pages in (cache.keys[layer], cache.values[layer]):
                tensors_of(pages)[0][list(blocks)] = 0


class ForgetsScalesInItsBytes(SdpaAttention):
    """Counts the codes only."""

    def bytes_per_block(self, spec: AttentionSpec, group: KVGroup) -> int:
        layers = [spec.layers[index] for index in group.layers]
        itemsize: int = getattr(torch, spec.kv_dtype).itemsize
        return 2 * self.config.block_size * sum(x.num_kv_heads * x.head_size for x in layers) * itemsize


class TakesFormatsUnclaimed(SdpaAttention):
    """Does not claim a KV format, and its probe takes one all the same."""

    @classmethod
    def abilities(cls) -> frozenset[str]:
        return super().abilities() - {"kv_int8"}

    @classmethod
    def probe(cls, context: ProbeContext) -> Probe:
        return Probe.yes()


class KeepsFullKeys(SdpaAttention):
    """Claims to keep int8, and keeps everything as it is."""

    def kv_contract(self, spec: AttentionSpec) -> KVContract:
        return super().kv_contract(dataclasses.replace(spec, kv=FULL_KV))

    def bytes_per_block(self, spec: AttentionSpec, group: KVGroup) -> int:
        return super().bytes_per_block(dataclasses.replace(spec, kv=FULL_KV), group)

    def allocate(self, spec: AttentionSpec, num_blocks: Sequence[int], device: torch.device) -> AnyPagedCache:
        return super().allocate(dataclasses.replace(spec, kv=FULL_KV), num_blocks, device)


class _OwnKeysStep:
    def __init__(self, spec: AttentionSpec, batch: AttentionBatch, step: AttentionStep) -> None:
        self._step, self._plain = step, PlainStep(spec, batch.query_lengths)

    def attend(self, layer: int, q_THD: torch.Tensor, k_TGD: torch.Tensor, v_TGD: torch.Tensor) -> torch.Tensor:
        self._step.attend(layer, q_THD, k_TGD, v_TGD)
        return self._plain.attend(layer, q_THD, k_TGD, v_TGD)


class SeesItsOwnKeysUnrounded(SdpaAttention):
    """A prompt attends to its own keys before they are rounded: what comes out depends on where it is cut."""

    def begin(self, spec: AttentionSpec, batch: AttentionBatch, cache: AnyPagedCache | None) -> AttentionStep:
        step = super().begin(spec, batch, cache)
        return step if any(batch.context_lengths) else _OwnKeysStep(spec, batch, step)


class CountsOnTheHost(PlainPaged):
    """Claims that its decodes can be recorded, and reads their lengths from the host."""

    @classmethod
    def abilities(cls) -> frozenset[str]:
        return super().abilities() | {"graph_safe"}


class DividesAsTheHostSays(CountsOnTheHost):
    """Reads lengths from the device, but of an open batch not which tokens are whose."""

    @classmethod
    def abilities(cls) -> frozenset[str]:
        return super().abilities() | {"graph_safe_prompts"}

    def begin(self, spec: AttentionSpec, batch: AttentionBatch, cache: Stores | None) -> AttentionStep:
        lengths = zip(batch.kv_lengths.tolist(), batch.query_lengths, strict=True)
        contexts = [max(0, length - own) for length, own in lengths]
        return super().begin(spec, dataclasses.replace(batch, context_lengths=contexts), cache)


SOUND = PlainPaged
"""The backend without a fault: it passes."""

ZOO: dict[type[Plugin], str] = {
    WindowOneTooWide: "test_windows_equal_the_plain_loop",
    ScaleFromHeadSize: "test_each_layers_own_scale_is_used",
    ReadsWholeBlocks: "test_a_reused_block_shows_nothing_of_its_past",
    IgnoresSoftCap: "test_soft_caps_equal_the_plain_loop",
    MixesUpHeads: "test_mixed_batches_equal_the_plain_loop",
    TrainsWithoutGradients: "test_gradients_equal_the_plain_loops",
    AnswersInFloat32: "test_outputs_have_the_queries_form",
    FeelsTheCompany: "test_a_sequence_does_not_feel_its_neighbours",
    CopiesKeysOnly: "test_copied_blocks_live_on_their_own",
    ClearsOneLayer: "test_cleared_blocks_are_clean",
    ForgetsValuesInItsBytes: "test_bytes_per_block_is_what_a_block_takes",
    ClaimsSdpasLayout: "test_equal_contracts_share_a_cache",
    EmptiesWhatItDoesNotKnow: "test_a_fresh_instance_goes_on_with_the_cache",
    TakesWindowsUnclaimed: "test_the_probe_refuses_what_is_not_claimed",
    WritesToItsInputs: "test_inputs_are_left_alone",
    HandsOutACopy: "test_written_pages_are_as_good_as_given_keys",
    OneScaleForAllHeads: "test_each_head_and_token_has_a_scale_of_its_own",
    RoundsFaultsAway: "test_what_is_not_finite_stays_visible",
    LeavesScalesBehind: "test_scales_go_with_copied_blocks",
    ClearsCodesOnly: "test_what_is_not_finite_stays_visible",
    ForgetsScalesInItsBytes: "test_scales_are_counted",
    TakesFormatsUnclaimed: "test_the_probe_refuses_what_is_not_claimed",
    KeepsFullKeys: "test_the_kv_contract_tells_the_format",
    SeesItsOwnKeysUnrounded: "test_a_cut_does_not_change_scaled_keys",
    CountsOnTheHost: "test_decodes_take_their_lengths_from_the_device",
    DividesAsTheHostSays: "test_open_batches_equal_the_plain_loop",
}
"""Broken backend -> the test that has to catch it."""
