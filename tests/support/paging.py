"""Plain bookkeeping of a paged cache for tests: shuffled blocks, ragged batches, windows that give blocks back."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import torch

from drivetrain.contracts.attention import AttentionBatch, AttentionSpec


def whole_batch(lengths: Sequence[int]) -> AttentionBatch:
    """Sequences packed flat with no cache behind them."""
    starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return AttentionBatch(list(lengths), [0] * len(lengths), starts, torch.tensor(lengths, dtype=torch.int32))


class Pages:
    """Block tables of some sequences, one for each KV group, over blocks handed out in random order, or one after
    another where there is no seed."""

    def __init__(self, spec: AttentionSpec, block_size: int, num_blocks: int, seed: int | None = 0) -> None:
        self.spec = spec
        self.block_size = block_size
        self.num_blocks = [num_blocks] * len(spec.groups)
        self.free = [list(reversed(range(num_blocks))) for _ in spec.groups]
        for order in self.free:
            if seed is not None:
                random.Random(seed).shuffle(order)
        self.tables: list[dict[int, list[int]]] = [{} for _ in spec.groups]
        self.lengths: dict[int, int] = {}

    def batch(self, new_tokens: Mapping[int, int]) -> AttentionBatch:
        """One step that adds ``new_tokens[s]`` tokens to each sequence s."""
        sequences = list(new_tokens)
        contexts = [self.lengths.get(s, 0) for s in sequences]
        tables, slots = [], []
        for group in self.spec.groups:
            rows, group_slots = [], []
            for s, context in zip(sequences, contexts, strict=True):
                table = self._grow(group.index, s, context + new_tokens[s])
                self._shrink(group.index, table, context, group.window)
                rows.append(table)
                group_slots += [
                    table[p // self.block_size] * self.block_size + p % self.block_size
                    for p in range(context, context + new_tokens[s])
                ]
            widest = max(len(row) for row in rows)
            tables.append(torch.tensor([row + [0] * (widest - len(row)) for row in rows], dtype=torch.int32))
            slots.append(torch.tensor(group_slots))
        for s in sequences:
            self.lengths[s] = self.lengths.get(s, 0) + new_tokens[s]
        queries = list(new_tokens.values())
        kv = torch.tensor([c + q for c, q in zip(contexts, queries, strict=True)], dtype=torch.int32)
        starts = torch.tensor([0, *queries]).cumsum(0).to(torch.int32)
        return AttentionBatch(queries, contexts, starts, kv, tuple(tables), tuple(slots))

    def fork(self, parent: int, child: int, num_tokens: int) -> None:
        """Begin ``child`` with the parent's whole blocks of ``num_tokens`` tokens, which no window passed."""
        assert num_tokens % self.block_size == 0
        assert num_tokens <= self.lengths[parent]
        for tables in self.tables:
            tables[child] = tables[parent][: num_tokens // self.block_size]
        self.lengths[child] = num_tokens

    def positions(self, batch: AttentionBatch) -> torch.Tensor:
        """Positions of a batch's tokens, flat."""
        pairs = zip(batch.context_lengths, batch.query_lengths, strict=True)
        return torch.cat([torch.arange(context, context + query) for context, query in pairs])

    def _grow(self, group: int, s: int, length: int) -> list[int]:
        table = self.tables[group].setdefault(s, [])
        while len(table) * self.block_size < length:
            table.append(self.free[group].pop())
        return table

    def _shrink(self, group: int, table: list[int], context: int, window: int | None) -> None:
        """Give back the blocks that no query from ``context`` on can see; their entries become 0."""
        if window is None:
            return
        for index in range(max(0, context - window + 1) // self.block_size):
            if table[index] != 0:
                self.free[group].insert(0, table[index])
                table[index] = 0
