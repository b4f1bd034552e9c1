"""Rules of the block pool and its index: conserved, least recently used first out, and copies in a safe order."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drivetrain.contracts.attention import KVGroup
from drivetrain.errors import BlockAccountingError
from drivetrain.serving.blocks import BlockPool, KVManager, SequenceBlocks, _split_runs, hash_block, most_blocks


def filled(contents: list[bytes]) -> BlockPool:
    """A pool whose blocks all hold something that is findable, given back in order."""
    pool = BlockPool(len(contents))
    blocks = [pool.take() for _ in contents]
    for block, content in zip(blocks, contents, strict=True):
        pool.index(block, content)
    for block in blocks:
        pool.give_back(block)
    return pool


def test_the_least_recently_used_prefix_goes_first() -> None:
    pool = filled([b"a", b"b", b"c", b"d"])
    found = pool.find(b"a")
    assert found is not None
    pool.share(found)
    pool.give_back(found)  # used again: now the last to go
    gone = []
    for _ in range(4):
        pool.take()
        gone.append([content for content in (b"a", b"b", b"c", b"d") if pool.find(content) is None][-1])
        pool.check()
    assert gone == [b"b", b"c", b"d", b"d"]
    assert pool.find(b"a") is None


def test_blank_blocks_go_before_any_prefix() -> None:
    pool = BlockPool(3)
    kept = pool.take()
    pool.index(kept, b"a")
    pool.give_back(kept)
    assert {pool.take(), pool.take()} == {0, 1, 2} - {kept}
    assert pool.find(b"a") == kept


def test_free_and_used_always_make_up_the_whole() -> None:
    pool = BlockPool(4)
    first, second = pool.take(), pool.take()
    pool.share(first)
    assert (pool.num_used, pool.num_free) == (2, 2)
    pool.give_back(first)
    assert pool.num_used == 2
    pool.give_back(first)
    pool.give_back(second)
    assert (pool.num_used, pool.num_free) == (0, 4)
    pool.check()


def test_a_block_freed_twice_and_an_empty_pool_are_errors() -> None:
    pool = BlockPool(1)
    block = pool.take()
    with pytest.raises(BlockAccountingError, match="empty pool"):
        pool.take()
    pool.give_back(block)
    with pytest.raises(BlockAccountingError, match="freed twice"):
        pool.give_back(block)


def test_check_finds_books_that_do_not_balance() -> None:
    pool = BlockPool(2)
    pool._blank.pop()
    with pytest.raises(BlockAccountingError, match="free \\+ used == total"):
        pool.check()
    pool = BlockPool(2)
    pool._blank = [0, 0]
    with pytest.raises(BlockAccountingError, match="listed twice"):
        pool.check()


def test_one_content_has_one_block_and_a_forgotten_one_none() -> None:
    pool = BlockPool(3)
    first, second = pool.take(), pool.take()
    pool.index(first, b"a")
    pool.index(second, b"a")
    assert pool.find(b"a") == first
    assert not pool.is_indexed(second)
    pool.forget(first)
    pool.forget(first)
    assert pool.find(b"a") is None
    pool.index(second, b"a")
    pool.give_back(second)
    pool.forget_all()
    assert (pool.num_indexed, pool.num_free) == (0, 2)
    pool.give_back(first)
    pool.check()


def test_a_hash_names_the_tokens_and_all_before_them() -> None:
    root = b"\0" * 16
    assert hash_block(root, [1, 2]) == hash_block(root, [1, 2])
    different = {hash_block(root, [1, 2]), hash_block(root, [2, 1]), hash_block(hash_block(root, [1, 2]), [1, 2])}
    assert len({*different, hash_block(root, [1, 2, 0])}) == 4


@settings(max_examples=150, deadline=None)
@given(pairs=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)).filter(lambda p: p[0] != p[1]), max_size=12))
def test_runs_of_copies_do_what_the_copies_do_one_by_one(pairs: list[tuple[int, int]]) -> None:
    one_by_one, in_runs = list(range(7)), list(range(7))
    for source, destination in pairs:
        one_by_one[destination] = one_by_one[source]
    for run in _split_runs(pairs):
        sources, destinations = {s for s, _ in run}, [d for _, d in run]
        assert not sources & set(destinations)
        assert len(set(destinations)) == len(destinations)
        before = list(in_runs)  # a backend may copy all of a run at once
        for source, destination in run:
            in_runs[destination] = before[source]
    assert in_runs == one_by_one


@settings(max_examples=150, deadline=None)
@given(
    window=st.one_of(st.none(), st.integers(1, 20)),
    block_size=st.integers(1, 7),
    chunks=st.lists(st.integers(1, 9), min_size=1, max_size=12),
)
def test_no_request_holds_more_than_most_blocks(window: int | None, block_size: int, chunks: list[int]) -> None:
    """Whatever its chunks are, a request alone in a pool of ``most_blocks`` blocks finds room for each."""
    group, length = KVGroup(0, (0,), window), sum(chunks)
    size = most_blocks(group, length, max(chunks), block_size)
    kv = KVManager([group], [size], block_size, max_running=1, max_tokens=length, prefix_cache=False, salt="")
    assert kv.fits(length, max(chunks))
    sequence: SequenceBlocks = kv.open()
    computed = 0
    for chunk in chunks:
        assert kv.extend(sequence, computed, chunk)
        kv.computed(sequence, [0] * length, [], computed, computed + chunk)
        computed += chunk
        kv.check()
    kv.close(sequence)
    assert kv.pools[0].num_used == 0


def test_extending_without_room_changes_nothing() -> None:
    kv = KVManager(
        [KVGroup(0, (0,), None), KVGroup(1, (1,), 4)],
        [8, 2],
        2,
        max_running=2,
        max_tokens=16,
        prefix_cache=True,
        salt="",
    )
    sequence = kv.open()
    assert kv.extend(sequence, 0, 4)
    before = [list(blocks) for blocks in sequence.blocks]
    assert not kv.extend(sequence, 4, 4)  # the second group has no block left
    assert sequence.blocks == before
    assert [pool.num_used for pool in kv.pools] == [2, 2]
    assert kv.usage == 1.0


def test_of_a_cached_prefix_the_tail_goes_first() -> None:
    kv = KVManager([KVGroup(0, (0,), None)], [4], 2, max_running=2, max_tokens=8, prefix_cache=True, salt="")
    tokens = [1, 2, 3, 4, 5, 6, 7, 8]
    hashes: list[bytes] = []
    first = kv.open()
    assert kv.extend(first, 0, 8)
    kv.computed(first, tokens, hashes, 0, 8)
    kv.close(first)
    other = kv.open()
    assert kv.extend(other, 0, 2)  # takes one of the four
    assert kv.num_cached([*tokens, 9], []) == 6


def test_rows_are_made_when_requests_need_them() -> None:
    """A scheduler that allows any number of requests takes no memory for those that never come."""
    group = KVGroup(0, (0,), None)
    kv = KVManager([group], [200], 2, max_running=2, max_tokens=4, prefix_cache=False, salt="")
    assert len(kv.tables[0]) == 2
    kv.allow(10**12)
    opened = [kv.open() for _ in range(100)]
    for sequence in opened:
        assert kv.extend(sequence, 0, 2)
    assert sorted(sequence.row for sequence in opened) == list(range(100))
    assert [kv.tables[0][own.row, 0] for own in opened] == [own.blocks[0][0] for own in opened]
    assert len(kv.tables[0]) < 1000
    for sequence in opened:
        kv.close(sequence)
    kv.check()
    assert not kv.tables[0].any()
