"""What attention should give: a plain loop over one sequence's tokens, and the bookkeeping of a paged cache around it.

Shapes: T query tokens of a step; t new tokens of one sequence; L all its tokens; H query heads; G key/value heads; D
head size.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from drivetrain.contracts.attention import (
    AttentionBackend,
    AttentionBatch,
    AttentionSpec,
    AttentionStep,
    KVGroup,
    LayerAttention,
    TakesWritten,
)


def plain_attention(
    layer: LayerAttention, q_tHD: torch.Tensor, k_LGD: torch.Tensor, v_LGD: torch.Tensor
) -> torch.Tensor:
    """The last t tokens of one sequence attend over all its L tokens, one by one, in float64: [t, H, D].

    Differentiable.
    """
    repeats = layer.num_heads // layer.num_kv_heads
    q, k, v = q_tHD.double(), k_LGD.double(), v_LGD.double()
    context = k.shape[0] - q.shape[0]
    rows = []
    for token in range(q.shape[0]):
        last = context + token
        first = 0 if layer.window is None else max(0, last - layer.window + 1)
        k_lHD = k[first : last + 1].repeat_interleave(repeats, dim=1)
        v_lHD = v[first : last + 1].repeat_interleave(repeats, dim=1)
        scores_lH = (k_lHD * q[token]).sum(-1) * layer.scale
        if layer.soft_cap is not None:
            scores_lH = layer.soft_cap * torch.tanh(scores_lH / layer.soft_cap)
        rows.append((scores_lH.softmax(0).unsqueeze(-1) * v_lHD).sum(0))
    return torch.stack(rows)


def whole_batch(lengths: Sequence[int], device: torch.device) -> AttentionBatch:
    """Sequences packed flat with no cache behind them."""
    starts = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    return AttentionBatch(list(lengths), [0] * len(lengths), starts, starts.diff())


def recorded_decodes(batch: AttentionBatch, block_size: int) -> AttentionBatch:
    """The same decodes as a step that is recorded gives them: the host names the longest contexts there could be."""
    longest = batch.block_tables[0].shape[1] * block_size - 1
    return replace(batch, context_lengths=[longest] * batch.num_sequences)


def opened(batch: AttentionBatch) -> AttentionBatch:
    """The same step as an open batch (``AttentionBatch.is_open``), with three sequences of no tokens: one before the
    others and two behind them."""
    starts, kv_lengths, num_tokens = batch.query_starts, batch.kv_lengths, batch.num_tokens
    return AttentionBatch(
        query_lengths=[num_tokens, *[0] * (batch.num_sequences + 2)],
        context_lengths=[0] * (batch.num_sequences + 3),
        query_starts=torch.cat((starts[:1], starts, starts[-1:], starts[-1:])),
        kv_lengths=torch.nn.functional.pad(kv_lengths, (1, 2)),
        block_tables=tuple(torch.nn.functional.pad(table, (0, 0, 1, 2)) for table in batch.block_tables),
        slots=batch.slots,
        is_open=True,
    )


class PlainStep:
    """Attention of packed sequences without a cache, by the plain loop."""

    def __init__(self, spec: AttentionSpec, lengths: Sequence[int]) -> None:
        self._layers = spec.layers
        self._lengths = list(lengths)

    def attend(self, layer: int, q_THD: torch.Tensor, k_TGD: torch.Tensor, v_TGD: torch.Tensor) -> torch.Tensor:
        parts = zip(*(x.split(self._lengths) for x in (q_THD, k_TGD, v_TGD)), strict=True)
        return torch.cat([plain_attention(self._layers[layer], *part) for part in parts]).to(q_THD.dtype)


class BlockBook:
    """Which blocks each sequence holds, in each KV group.

    Blocks are handed out in a shuffled order, block 0 first of all, and a block that is given back is the next to be
    handed out: whatever a backend reads beyond what it should is somebody else's, or somebody's past.
    """

    def __init__(self, spec: AttentionSpec, block_size: int, num_blocks: int, seed: int = 0) -> None:
        self.groups = spec.groups
        self.block_size = block_size
        self.num_blocks = [num_blocks] * len(spec.groups)
        self._free: list[list[int]] = []
        for group in spec.groups:
            order = list(range(1, num_blocks))
            random.Random(seed + group.index).shuffle(order)
            self._free.append([*order, 0])
        self.tables: list[dict[int, list[int | None]]] = [{} for _ in spec.groups]
        self.lengths: dict[int, int] = {}

    def batch(self, new_tokens: Mapping[int, int], device: torch.device) -> AttentionBatch:
        """One step that adds ``new_tokens[s]`` tokens to each sequence s."""
        contexts = [self.lengths.get(s, 0) for s in new_tokens]
        tables, slots = [], []
        for group in self.groups:
            rows: list[list[int]] = []
            places: list[int] = []
            for (s, count), context in zip(new_tokens.items(), contexts, strict=True):
                table = self._prepare(group, s, context, count)
                rows.append([0 if block is None else block for block in table])
                size = self.block_size
                places += [rows[-1][p // size] * size + p % size for p in range(context, context + count)]
            widest = max(len(row) for row in rows)
            tables.append(torch.tensor([row + [0] * (widest - len(row)) for row in rows], dtype=torch.int32))
            slots.append(torch.tensor(places, dtype=torch.int64))
        for s, count in new_tokens.items():
            self.lengths[s] = self.lengths.get(s, 0) + count
        plain = whole_batch(list(new_tokens.values()), device)
        kv_lengths = torch.tensor([self.lengths[s] for s in new_tokens], dtype=torch.int32)
        return AttentionBatch(
            plain.query_lengths,
            contexts,
            plain.query_starts,
            kv_lengths.to(device),
            tuple(table.to(device) for table in tables),
            tuple(slot.to(device) for slot in slots),
        )

    def release(self, s: int) -> list[list[int]]:
        """Give back all that sequence ``s`` holds; returns its blocks for each group."""
        del self.lengths[s]
        given = []
        for group in self.groups:
            blocks = [block for block in self.tables[group.index].pop(s) if block is not None]
            self._free[group.index] += reversed(blocks)
            given.append(blocks)
        return given

    def fork(self, source: int, target: int) -> list[list[tuple[int, int]]]:
        """Give ``target`` as many blocks of its own as ``source`` holds; returns the copies to make for each group."""
        self.lengths[target] = self.lengths[source]
        pairs = []
        for group in self.groups:
            held = self.tables[group.index][source]
            own = [None if block is None else self._free[group.index].pop() for block in held]
            self.tables[group.index][target] = own
            both = zip(held, own, strict=True)
            pairs.append([(old, new) for old, new in both if old is not None and new is not None])
        return pairs

    def _prepare(self, group: KVGroup, s: int, context: int, count: int) -> list[int | None]:
        """The table of ``s`` with room for ``count`` more tokens, and without blocks that its window has left."""
        table = self.tables[group.index].setdefault(s, [])
        if group.window is not None:
            for index in range(max(0, context - group.window + 1) // self.block_size):
                block = table[index]
                if block is not None:
                    self._free[group.index].append(block)
                    table[index] = None
        while len(table) * self.block_size < context + count:
            table.append(self._free[group.index].pop())
        return table


@dataclass(frozen=True)
class Attended:
    """What one layer gave in one step for one sequence's new tokens, and what it should have given (float64, CPU)."""

    layer: int
    sequence: int
    found: torch.Tensor
    wanted: torch.Tensor


class Trial:
    """A backend with a cache of its own, fed with random sequences; every output comes with the plain loop's.

    The values of token p of sequence s in a layer depend on the seed alone, not on how steps are cut or mixed. Keys and
    values are multiplied by ``loudness`` of their sequence, values by ``head_loudness`` of their head too.
    """

    def __init__(
        self, backend: AttentionBackend, spec: AttentionSpec, device: torch.device, *, tokens: int = 192, seed: int = 0
    ) -> None:
        self.backend, self.spec, self.device, self.seed = backend, spec, device, seed
        self.dtype: torch.dtype = getattr(torch, spec.dtype)
        block_size = backend.kv_contract(spec).block_size
        # Each sequence may leave part of a block unused: 48 of them at most.
        self.book = BlockBook(spec, block_size, tokens // block_size + 48, seed)
        self.cache = backend.allocate(spec, self.book.num_blocks, device)
        self.loudness: dict[int, float] = {}
        self.head_loudness: Sequence[float] | None = None
        self.num_written = 0
        self._draws: dict[tuple[int, int], torch.Generator] = {}
        self._kept: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def step(
        self,
        new_tokens: Mapping[int, int],
        *,
        write: bool = False,
        told: Callable[[AttentionBatch], AttentionBatch] = lambda batch: batch,
    ) -> list[Attended]:
        """Add ``new_tokens[s]`` tokens to each sequence s, in one step.

        write: write keys and values here, in place of the backend, in steps that offer their pages.
        told:  how the backend is told of the step.
        """
        batch = told(self.book.batch(new_tokens, self.device))
        step = self.backend.begin(self.spec, batch, self.cache)
        results = []
        for index, layer in enumerate(self.spec.layers):
            queries, news = [], []
            for s, count in new_tokens.items():
                q, k, v = self._draw(index, s, count)
                old = self._kept.get((index, s))
                self._kept[index, s] = (k, v) if old is None else (torch.cat((old[0], k)), torch.cat((old[1], v)))
                queries.append(q)
                news.append((k, v))
            q_THD = torch.cat(queries).to(self.device)
            k_TGD, v_TGD = (torch.cat(parts).to(self.device) for parts in zip(*news, strict=True))
            found_THD = self._attend(step, index, q_THD, k_TGD, v_TGD, write)
            split = found_THD.split(list(new_tokens.values()))
            for s, q, found in zip(new_tokens, queries, split, strict=True):
                results.append(Attended(index, s, found, plain_attention(layer, q, *self._kept[index, s])))
        return results

    def _attend(
        self, step: AttentionStep, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, write: bool
    ) -> torch.Tensor:
        pages = step.layer_pages(layer) if write and isinstance(step, TakesWritten) else None
        if pages is None or not isinstance(step, TakesWritten):
            return step.attend(layer, q, k, v)
        blocks, places = pages.slots // pages.keys.shape[1], pages.slots % pages.keys.shape[1]
        for store, new in ((pages.keys, k), (pages.values, v)):
            store[blocks, places] = new.to(store.dtype)
        self.num_written += 1
        return step.attend_written(layer, q)

    def release(self, s: int) -> list[list[int]]:
        """End a sequence; its blocks are the next to be used again. Returns them for each group."""
        for key in [key for key in self._kept if key[1] == s]:
            del self._kept[key]
        return self.book.release(s)

    def fork(self, source: int, target: int) -> None:
        """Start ``target`` as a copy of ``source`` in blocks of its own, by ``copy_blocks``."""
        for group, pairs in zip(self.spec.groups, self.book.fork(source, target), strict=True):
            self.backend.copy_blocks(self.cache, group, pairs)
        for layer in range(len(self.spec.layers)):
            self._kept[layer, target] = self._kept[layer, source]

    def _draw(self, layer: int, s: int, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        shape = self.spec.layers[layer]
        generator = self._draws.get((layer, s))
        if generator is None:
            number = (self.seed * 1009 + layer) * 1009 + s
            generator = self._draws[layer, s] = torch.Generator().manual_seed(number)
        heads = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
        # Token by token, so that a sequence is the same however it is cut.
        rows = [torch.randn(sum(heads), shape.head_size, generator=generator) for _ in range(count)]
        q, k, v = torch.stack(rows).to(self.dtype).split(heads, dim=1)
        loudness = self.loudness.get(s, 1.0)
        v = v * loudness
        if self.head_loudness is not None:
            v = v * torch.tensor(self.head_loudness, dtype=v.dtype).unsqueeze(-1)
        return q.contiguous(), k * loudness, v
