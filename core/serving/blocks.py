"""Paged keys and values: which block belongs to whom, and which prefixes are in the cache already.

One :class:`BlockPool` for each KV group. A block is *used* while a request refers to it; otherwise it is *free*, and a
free block that holds an indexed prefix stays findable until its room is needed (least recently used first). Always:
free + used == total.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from drivetrain.contracts.attention import KVGroup
from drivetrain.errors import BlockAccountingError

GONE = -1
"""Entry of a block table whose tokens no layer of the group can see any more."""
_FIRST_ROWS = 64

BlockHash = bytes


class BlockPool:
    """The blocks of one KV group, with the index of prefixes they hold. Every operation is O(1)."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._references = [0] * total
        # Last in, first out: memory that was never touched stays untouched for as long as it can.
        self._blank = list(range(total - 1, -1, -1))
        self._cached: OrderedDict[int, BlockHash] = OrderedDict()
        self._block_of: dict[BlockHash, int] = {}
        self._hash_of: dict[int, BlockHash] = {}

    @property
    def num_free(self) -> int:
        return len(self._blank) + len(self._cached)

    @property
    def num_used(self) -> int:
        return self.total - self.num_free

    @property
    def num_indexed(self) -> int:
        """Blocks whose content can be found by its hash, whether used or free."""
        return len(self._block_of)

    def live_blocks(self) -> list[int]:
        """Blocks whose content may be read again: used ones, and free ones that hold an indexed prefix. O(total)."""
        return [*(block for block, count in enumerate(self._references) if count > 0), *self._cached]

    def references(self, block: int) -> int:
        return self._references[block]

    def take(self) -> int:
        """A free block, now used once; evicts the least recently used prefix when no blank one is left."""
        if self._blank:
            block = self._blank.pop()
        elif self._cached:
            block, _ = self._cached.popitem(last=False)
            self.forget(block)
        else:
            raise BlockAccountingError("a block was taken from an empty pool", found=f"{self.total} used")
        self._references[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more request refers to ``block``, which may be a free one that the index knows."""
        if self._references[block] == 0:
            del self._cached[block]
        self._references[block] += 1

    def give_back(self, block: int) -> None:
        """One request fewer refers to ``block``."""
        if self._references[block] <= 0:
            raise BlockAccountingError("a block was freed twice", found=block)
        self._references[block] -= 1
        if self._references[block] == 0:
            content = self._hash_of.get(block)
            if content is None:
                self._blank.append(block)
            else:
                self._cached[block] = content

    def find(self, content: BlockHash) -> int | None:
        """The block that holds this content."""
        return self._block_of.get(content)

    def is_indexed(self, block: int) -> bool:
        return block in self._hash_of

    def index(self, block: int, content: BlockHash) -> None:
        """Make a used block findable. The first block with a content keeps it; a second one stays private."""
        if content not in self._block_of and block not in self._hash_of:
            self._block_of[content] = block
            self._hash_of[block] = content

    def forget(self, block: int) -> None:
        """Take a block out of the index, because its content is about to change."""
        content = self._hash_of.pop(block, None)
        if content is not None:
            del self._block_of[content]

    def forget_all(self) -> None:
        """Empty the index; free blocks become blank."""
        self._blank.extend(self._cached)
        self._cached.clear()
        self._block_of.clear()
        self._hash_of.clear()

    def check(self) -> None:
        """Raise BlockAccountingError unless the books balance. For tests; O(total)."""
        used = sum(1 for count in self._references if count > 0)
        if used + self.num_free != self.total or any(count < 0 for count in self._references):
            raise BlockAccountingError(
                "free + used == total does not hold",
                found=f"{self.num_free} free, {used} used",
                allowed=str(self.total),
            )
        free = [*self._blank, *self._cached]
        if len(set(free)) != len(free) or any(self._references[block] for block in free):
            raise BlockAccountingError("a free block is listed twice or still in use")


def hash_block(parent: BlockHash, tokens: Sequence[int]) -> BlockHash:
    """Name of a full block's content: its tokens and everything before them. 16 bytes of BLAKE2b."""
    return hashlib.blake2b(parent + array("q", tokens).tobytes(), digest_size=16).digest()


def most_blocks(group: KVGroup, num_tokens: int, chunk: int, block_size: int) -> int:
    """Most blocks that a request of ``num_tokens`` ever holds in ``group``, computing ``chunk`` tokens at once."""
    needed = -(-num_tokens // block_size)
    if group.window is None:
        return needed
    return min(needed, -(-(group.window - 1 + chunk) // block_size) + 1)


class SequenceBlocks:
    """One running request's blocks.

    row:      its row in the manager's tables.
    blocks:   for each KV group, the block of tokens 0..N-1, N..2N-1, ...; GONE where a window has moved on.
    gone:     for each KV group, how many leading entries are GONE.
    writable: first token and end of what may be written without another look: in blocks that were private when last
              looked at, and that nobody can have got hold of since, as only full ones are found by their content.
    """

    def __init__(self, row: int, num_groups: int) -> None:
        self.row = row
        self.blocks: list[list[int]] = [[] for _ in range(num_groups)]
        self.gone = [0] * num_groups
        self.writable = (0, 0)


class KVManager:
    """Gives blocks to requests, shares prefixes, and takes back what a window has passed.

    tables: for each KV group, int32 [rows, blocks of the longest request]; a request's row mirrors its blocks, with 0
            where there is none, so that a step gathers tables without a loop over tokens. Rows are made when they are
            needed: a scheduler may allow any number of requests, and far fewer ever run.
    """

    def __init__(
        self,
        groups: Sequence[KVGroup],
        num_blocks: Sequence[int],
        block_size: int,
        *,
        max_running: int,
        max_tokens: int,
        prefix_cache: bool,
        salt: str,
    ) -> None:
        self.groups = tuple(groups)
        self._has_windows = any(group.window is not None for group in self.groups)
        self.block_size = block_size
        self.pools = tuple(BlockPool(count) for count in num_blocks)
        self.prefix_cache = prefix_cache
        self.tables = tuple(np.zeros((0, -(-max_tokens // block_size)), dtype=np.int32) for _ in self.groups)
        self._max_running = max_running
        self._rows: list[int] = []
        self._make_rows(_FIRST_ROWS)
        self._root = hashlib.blake2b(salt.encode(), digest_size=16).digest()
        self.pending_copies: list[list[tuple[int, int]]] = [[] for _ in self.groups]

    def fits(self, num_tokens: int, chunk: int) -> bool:
        """Whether a request of this length could run, were it alone."""
        return all(
            most_blocks(group, num_tokens, chunk, self.block_size) <= pool.total
            for group, pool in zip(self.groups, self.pools, strict=True)
        )

    # --- life of a sequence ----------------------------------------------------------------------------------------

    def open(self) -> SequenceBlocks:
        """Books for a request that starts to run."""
        if not self._rows:
            self._make_rows(2 * len(self.tables[0]))
        return SequenceBlocks(self._rows.pop(), len(self.groups))

    def close(self, sequence: SequenceBlocks) -> None:
        """Give back all that the request holds."""
        for index, pool in enumerate(self.pools):
            # Last blocks first: of a cached prefix, the tail is the least likely to be asked for again.
            for block in reversed(sequence.blocks[index]):
                if block != GONE:
                    pool.give_back(block)
            self.tables[index][sequence.row, : len(sequence.blocks[index])] = 0
            sequence.blocks[index] = []
        self._rows.append(sequence.row)

    def adopt_prefix(self, sequence: SequenceBlocks, tokens: Sequence[int], hashes: list[BlockHash]) -> int:
        """Share the longest cached prefix of ``tokens``; return how many tokens need no computing.

        At least one token is always left to compute, since its logits are wanted.
        """
        computed = self.num_cached(tokens, hashes)
        count = -(-computed // self.block_size)
        for index, (group, pool) in enumerate(zip(self.groups, self.pools, strict=True)):
            first = self._first_visible(group, computed)
            for position in range(count):
                block = pool.find(hashes[position]) if position >= first else None
                if block is not None:
                    pool.share(block)
                self._append(sequence, index, GONE if block is None else block)
            sequence.gone[index] = min(first, count)
        return computed

    def num_cached(self, tokens: Sequence[int], hashes: list[BlockHash]) -> int:
        """What :meth:`adopt_prefix` would return. Changes nothing but ``hashes``, which it extends."""
        if not self.prefix_cache:
            return 0
        self.extend_hashes(hashes, tokens, len(tokens) // self.block_size)
        return min(self._longest_prefix(hashes, len(tokens)) * self.block_size, len(tokens) - 1)

    def distrust(self, sequence: SequenceBlocks) -> list[list[int]]:
        """Take what the sequence holds out of the index: its keys and values may not be numbers.

        Returns the blocks of each KV group that nobody else holds.
        """
        own: list[list[int]] = []
        for pool, blocks in zip(self.pools, sequence.blocks, strict=True):
            held = [block for block in blocks if block != GONE]
            for block in held:
                pool.forget(block)
            own.append([block for block in held if pool.references(block) == 1])
        return own

    def forget_prefixes(self) -> None:
        """Empty the index of every pool."""
        for pool in self.pools:
            pool.forget_all()

    def allow(self, max_running: int) -> None:
        """Let so many requests run at once at least."""
        self._max_running = max(self._max_running, max_running)

    def fork(self, parent: SequenceBlocks, child: SequenceBlocks, num_tokens: int) -> None:
        """Let ``child`` share the parent's blocks of the first ``num_tokens`` tokens."""
        count = -(-num_tokens // self.block_size)
        parent.writable = (0, 0)
        for index, pool in enumerate(self.pools):
            for block in parent.blocks[index][:count]:
                if block != GONE:
                    pool.share(block)
                self._append(child, index, block)
            child.gone[index] = min(parent.gone[index], count)

    def can_fork(self, parent: SequenceBlocks, computed: int) -> bool:
        """Whether the parent still holds every block that a sequence at ``computed`` tokens has to see."""
        return all(
            parent.gone[index] <= self._first_visible(group, computed) for index, group in enumerate(self.groups)
        )

    def extend(self, sequence: SequenceBlocks, computed: int, num_tokens: int) -> bool:
        """Make room to write tokens ``computed .. computed + num_tokens``; False and nothing changed if none is left.

        A block that others share is copied before it is written (``pending_copies``); one that only the index knows is
        taken out of the index instead.
        """
        begin, until = sequence.writable
        if begin <= computed and computed + num_tokens <= until:
            return True  # a decode inside its last block, which is what most steps are made of
        first, end = computed // self.block_size, -(-(computed + num_tokens) // self.block_size)
        for index, pool in enumerate(self.pools):
            if self._num_new(sequence, index, first, end) > pool.num_free:
                return False
        for index, pool in enumerate(self.pools):
            held = sequence.blocks[index]
            if first < len(held):
                self._make_private(sequence, index, first)
            while len(held) < end:
                self._append(sequence, index, pool.take())
        sequence.writable = first * self.block_size, min(map(len, sequence.blocks)) * self.block_size
        return True

    def computed(
        self, sequence: SequenceBlocks, tokens: Sequence[int], hashes: list[BlockHash] | None, old: int, new: int
    ) -> None:
        """Note that tokens ``old .. new`` are written: index the blocks they filled, drop what windows have passed.

        hashes: of the sequence's full blocks; None keeps its blocks out of the index.
        """
        full = new // self.block_size
        if full == old // self.block_size and not self._has_windows:
            return
        if self.prefix_cache and hashes is not None:
            self.extend_hashes(hashes, tokens, full)
        for index, (group, pool) in enumerate(zip(self.groups, self.pools, strict=True)):
            blocks = sequence.blocks[index]
            if self.prefix_cache and hashes is not None:
                for position in range(old // self.block_size, full):
                    pool.index(blocks[position], hashes[position])
            passed = min(self._first_visible(group, new), len(blocks))
            for position in range(sequence.gone[index], passed):
                pool.give_back(blocks[position])
                blocks[position] = GONE
                self.tables[index][sequence.row, position] = 0
            sequence.gone[index] = max(sequence.gone[index], passed)

    def extend_hashes(self, hashes: list[BlockHash], tokens: Sequence[int], count: int) -> None:
        """Extend ``hashes`` to the first ``count`` full blocks of ``tokens``."""
        size = self.block_size
        while len(hashes) < count:
            position = len(hashes)
            parent = hashes[-1] if hashes else self._root
            hashes.append(hash_block(parent, tokens[position * size : (position + 1) * size]))

    def take_copies(self) -> list[list[list[tuple[int, int]]]]:
        """Pending block copies for each group, as runs in which no destination is a source or is named twice."""
        batches = [_split_runs(pairs) for pairs in self.pending_copies]
        self.pending_copies = [[] for _ in self.groups]
        return batches

    @property
    def usage(self) -> float:
        """Share of the scarcest group's blocks that are in use, 0 to 1."""
        return max(pool.num_used / pool.total for pool in self.pools)

    def check(self) -> None:
        """Raise BlockAccountingError unless every pool's books balance."""
        for pool in self.pools:
            pool.check()

    # --- inside ----------------------------------------------------------------------------------------------------

    def _make_rows(self, wanted: int) -> None:
        """Have ``wanted`` rows, but no more than may run."""
        have, wanted = len(self.tables[0]), min(wanted, self._max_running)
        assert wanted > have, f"more than {self._max_running} requests would run"
        self.tables = tuple(np.pad(table, ((0, wanted - have), (0, 0))) for table in self.tables)
        self._rows = [*range(wanted - 1, have - 1, -1), *self._rows]

    def _append(self, sequence: SequenceBlocks, index: int, block: int) -> None:
        position = len(sequence.blocks[index])
        sequence.blocks[index].append(block)
        self.tables[index][sequence.row, position] = max(block, 0)

    def _num_new(self, sequence: SequenceBlocks, index: int, first: int, end: int) -> int:
        held = sequence.blocks[index]
        shared = first < len(held) and self.pools[index].references(held[first]) > 1
        return max(0, end - len(held)) + shared

    def _make_private(self, sequence: SequenceBlocks, index: int, position: int) -> None:
        pool, block = self.pools[index], sequence.blocks[index][position]
        if pool.references(block) > 1:
            copy = pool.take()
            self.pending_copies[index].append((block, copy))
            pool.give_back(block)
            sequence.blocks[index][position] = copy
            self.tables[index][sequence.row, position] = copy
        else:
            pool.forget(block)

    def _first_visible(self, group: KVGroup, position: int) -> int:
        """First block that a query at ``position`` or later sees."""
        if group.window is None:
            return 0
        return max(0, position - group.window + 1) // self.block_size

    def _longest_prefix(self, hashes: Sequence[BlockHash], num_tokens: int) -> int:
        """Most leading blocks that every group can serve: all of them, or those a window still sees."""
        count = len(hashes)
        for group, pool in zip(self.groups, self.pools, strict=True):
            if group.window is None:
                count = next((i for i in range(count) if pool.find(hashes[i]) is None), count)
        while count > 0:
            missing = max(self._last_missing(index, hashes, count, num_tokens) for index in range(len(self.groups)))
            if missing < 0:
                break
            # Every prefix that ends after a missing block and still sees it misses it too.
            count = missing
        return count

    def _last_missing(self, index: int, hashes: Sequence[BlockHash], count: int, num_tokens: int) -> int:
        """The last of ``count`` leading blocks that a window still sees and the group's index lacks; -1 if none."""
        group, pool = self.groups[index], self.pools[index]
        if group.window is None:
            return -1
        first = self._first_visible(group, min(count * self.block_size, num_tokens - 1))
        return next((i for i in range(count - 1, first - 1, -1) if pool.find(hashes[i]) is None), -1)


def _split_runs(pairs: Sequence[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    runs: list[list[tuple[int, int]]] = []
    touched: set[int] = set()
    for source, destination in pairs:
        if not runs or destination in touched or source in {d for _, d in runs[-1]}:
            runs.append([])
            touched = set()
        runs[-1].append((source, destination))
        touched |= {source, destination}
    return runs
