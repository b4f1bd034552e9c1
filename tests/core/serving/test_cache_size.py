"""The cache is sized within the memory, beside what steps take, and its blocks are shared out fairly."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drivetrain.assembly import resolve_parts
from drivetrain.config import load_settings
from drivetrain.contracts.attention import KVGroup
from drivetrain.contracts.scheduler import Limits
from drivetrain.errors import ConfigError, MemoryBudgetError
from drivetrain.serving.cache_size import BlockSizes, StepNeeds, share_blocks, size_cache
from support.fake_plugins import serving_registry

# One request of all 256 tokens takes 64 blocks of full attention and 7 of the window of 16 (15 + 8 tokens are 6 blocks,
# and one more as they need not start at a block's edge); a block is 4 tokens and 16 bytes.
LIMITS = Limits(max_batched_tokens=8, max_running=2)
ALL_OF_ONE = (64 + 7) * 16
NEEDS = StepNeeds(LIMITS, step_bytes=1_000_000, graph_bytes=500_000, weight_bytes=3_000_000)


def size(free_bytes: int = 2**22, needs: StepNeeds | None = None, **engine: Any) -> tuple[int, list[int], list[str]]:
    settings = {"model": "tiny-model", "platform": {"free_bytes": free_bytes}, "engine": engine}
    parts = resolve_parts(load_settings(None, settings), registry=serving_registry())
    assert parts.spec is not None
    length, blocks = size_cache(parts, LIMITS, needs)
    return length, blocks, parts.notes


def test_with_memory_to_spare_every_running_request_can_be_as_long_as_the_model_allows() -> None:
    assert size(needs=NEEDS)[:2] == (256, [128, 14])
    assert size(kv_memory="1MiB") == (256, [128, 14], [])


def test_memory_for_one_request_is_enough() -> None:
    assert size(kv_memory=f"{ALL_OF_ONE}B") == (256, [64, 7], [])


def test_too_little_memory_shortens_requests_and_says_so() -> None:
    length, blocks, notes = size(kv_memory="600B")
    assert (length, blocks) == (120, [30, 7])
    assert len(notes) == 1
    assert "max_model_len is 120, not the model's 256" in notes[0]


def test_auto_takes_a_share_of_what_is_free_and_tells_where_nothing_was_measured() -> None:
    length, _, notes = size(free_bytes=700)
    assert length == 128  # 630 bytes are 39 blocks: 32 and 7
    assert "the platform does not measure what a step takes" in notes[0]
    assert size(free_bytes=600, kv_memory="1MiB") == (256, [128, 14], [])


def test_a_length_that_was_asked_for_is_given_or_is_an_error() -> None:
    assert size(max_model_len=100, kv_memory="1MiB") == (100, [50, 14], [])
    with pytest.raises(MemoryBudgetError, match=r"one request of 200 tokens needs .*max_model_len to at most 120"):
        size(max_model_len=200, kv_memory="600B")
    with pytest.raises(ConfigError, match=r"engine.max_model_len: .*found 300; allowed: 1..256"):
        size(max_model_len=300)


def test_memory_for_nothing_at_all_is_an_error_that_asks_for_more() -> None:
    for how in ({"kv_memory": "10B"}, {"kv_memory": "0"}, {"free_bytes": 30}):
        with pytest.raises(MemoryBudgetError, match=r"are there. Give more memory with engine.kv_memory"):
            size(**how)


def test_auto_leaves_what_steps_take_and_says_how_much() -> None:
    room = 1_500_000 + 500_000
    length, blocks, notes = size(free_bytes=room + 700, needs=NEEDS)
    assert (length, blocks) == (136, [34, 7])  # 665 bytes are 41 blocks
    assert notes[0] == (
        "a step of 8 tokens of up to 2 requests takes 1.0 MiB, captured steps 0.5 MiB: "
        "1.9 MiB are kept for them beside the cache"
    )
    assert size(free_bytes=600, needs=NEEDS, kv_memory="1MiB") == (256, [128, 14], [])


def test_memory_for_a_step_alone_is_an_error_that_counts_up_and_advises() -> None:
    with pytest.raises(MemoryBudgetError) as raised:
        size(free_bytes=2_000_000, needs=NEEDS)
    assert str(raised.value) == (
        "engine.kv_memory: the weights take 2.9 MiB, and 1.9 MiB of the device's 3.8 MiB are free; a step of 8 tokens "
        "of up to 2 requests takes 1.0 MiB, captured steps 0.5 MiB: 1.9 MiB are kept for them beside the cache; one "
        "token needs 0.0 MiB of keys and values, but 0.0 MiB are there. Lower scheduler.max_batched_tokens or "
        "scheduler.max_running, or choose a quantizer."
    )
    with pytest.raises(MemoryBudgetError, match=r"at most 136, or lower scheduler\.max_batched_tokens or"):
        size(free_bytes=2_000_700, needs=NEEDS, max_model_len=200)


def test_larger_limits_take_more_in_proportion_and_smaller_ones_no_less() -> None:
    found = [NEEDS.step_bytes_within(Limits(*each)) for each in ((8, 2), (24, 2), (8, 4), (24, 4), (1, 1))]
    assert found == [1_000_000, 3_000_000, 2_000_000, 3_000_000, 1_000_000]


# --- properties of sizing ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Shares:
    """The arguments of share_blocks, with a budget that holds the least."""

    budget: int
    sizes: Sequence[int]
    least: Sequence[int]
    most: Sequence[int]


@st.composite
def shares(draw: st.DrawFn) -> Shares:
    num_groups = draw(st.integers(1, 4))
    sizes = draw(st.lists(st.integers(1, 1000), min_size=num_groups, max_size=num_groups))
    least = draw(st.lists(st.integers(0, 50), min_size=num_groups, max_size=num_groups))
    most = [count + draw(st.integers(0, 200)) for count in least]
    needed = sum(count * size for count, size in zip(least, sizes, strict=True))
    return Shares(needed + draw(st.integers(0, 100_000)), sizes, least, most)


@given(shares())
def test_blocks_are_shared_within_the_budget_fairly_and_to_the_last_useful_one(s: Shares) -> None:
    counts = share_blocks(s.budget, s.sizes, s.least, s.most)
    spent = sum(count * size for count, size in zip(counts, s.sizes, strict=True))
    assert spent <= s.budget
    assert all(low <= count <= high for low, count, high in zip(s.least, counts, s.most, strict=True))
    # Whoever could take more got as many more as every other such group, and at least as many as the content ones.
    wanting = [g for g in range(len(counts)) if counts[g] < s.most[g]]
    extra = [count - low for count, low in zip(counts, s.least, strict=True)]
    assert len({extra[g] for g in wanting}) <= 1
    assert all(extra[g] >= max(extra) for g in wanting)
    # One more block for each of them would not fit.
    assert not wanting or s.budget - spent < sum(s.sizes[g] for g in wanting)


@given(shares(), st.integers(0, 10_000))
def test_more_memory_never_means_fewer_blocks_for_anyone(s: Shares, more: int) -> None:
    before = share_blocks(s.budget, s.sizes, s.least, s.most)
    after = share_blocks(s.budget + more, s.sizes, s.least, s.most)
    assert all(b <= a for b, a in zip(before, after, strict=True))


@st.composite
def groups(draw: st.DrawFn) -> list[KVGroup]:
    windows = draw(st.lists(st.none() | st.integers(1, 300), min_size=1, max_size=3, unique=True))
    return [KVGroup(index, (index,), window) for index, window in enumerate(windows)]


@given(groups(), st.integers(1, 64), st.integers(1, 512), st.integers(0, 2000), st.integers(0, 200_000), st.data())
def test_the_longest_request_fits_and_one_token_more_would_not(
    groups: list[KVGroup], block_size: int, chunk: int, wanted: int, budget: int, data: st.DataObject
) -> None:
    sizes = data.draw(st.lists(st.integers(1, 4096), min_size=len(groups), max_size=len(groups)))
    blocks = BlockSizes(groups, sizes, block_size, chunk)
    length = blocks.longest_that_fits(wanted, budget)
    assert 0 <= length <= wanted
    assert blocks.bytes_of_one(length) <= budget
    assert length == wanted or blocks.bytes_of_one(length + 1) > budget
