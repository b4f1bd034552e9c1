"""Workloads come from their seed alone and keep to their ranges."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drivetrain.bench.workloads import WORKLOADS, WorkItem, check_fits, make_workload
from drivetrain.errors import ConfigError

SEEDS = st.integers(0, 2**32)
VOCABULARIES = st.integers(2, 300_000)


@pytest.mark.parametrize("name", WORKLOADS)
@given(seed=SEEDS, vocab_size=VOCABULARIES)
def test_a_seed_gives_one_workload(name: str, seed: int, vocab_size: int) -> None:
    made = make_workload(name, 3, vocab_size, seed)
    assert made == make_workload(name, 3, vocab_size, seed)
    assert all(0 <= token < vocab_size for item in made for token in item.prompt)
    if vocab_size > 10_000:
        assert made != make_workload(name, 3, vocab_size, seed + 1)


@given(seed=SEEDS)
def test_fewer_requests_are_the_first_of_more(seed: int) -> None:
    assert make_workload("mixed", 2, 1000, seed) == make_workload("mixed", 4, 1000, seed)[:2]


def test_mixed_lengths_are_uniform_over_their_ranges() -> None:
    items = make_workload("mixed", 4000, 50_000, seed=0)
    prompts, outputs = [len(item.prompt) for item in items], [item.max_tokens for item in items]
    assert (min(prompts), max(prompts)) == (32, 256)
    assert (min(outputs), max(outputs)) == (32, 128)
    assert sum(prompts) / len(prompts) == pytest.approx(144, abs=4)
    assert sum(outputs) / len(outputs) == pytest.approx(80, abs=2)
    assert min(token for item in items for token in item.prompt) >= 256  # special tokens lie low


def test_a_shared_prefix_is_shared_and_what_follows_is_not() -> None:
    items = make_workload("shared-prefix", None, 50_000, seed=0)
    assert len(items) == 32
    assert len({item.prompt[:512] for item in items}) == 1
    assert len({item.prompt[512:] for item in items}) == 32
    assert {(len(item.prompt), item.max_tokens) for item in items} == {(528, 32)}


def test_published_figures_stay_comparable() -> None:
    """Another draw from the same seed would make every figure measured before a figure of something else."""
    items = make_workload("mixed", 64, 49152, seed=0)
    assert sum(len(item.prompt) for item in items) == 9855
    assert sum(item.max_tokens for item in items) == 5480
    assert make_workload("mixed", None, 49152, seed=0) == items


def test_what_is_no_workload_is_refused() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'mixed'"):
        make_workload("mixd", None, 1000, 0)
    for number in (0, -1):
        with pytest.raises(ConfigError, match="at least one request"):
            make_workload("mixed", number, 1000, 0)


def test_a_request_longer_than_the_model_is_refused() -> None:
    items = [WorkItem((1,) * 10, 5), WorkItem((1,) * 3, 20)]
    check_fits(items, 23)
    with pytest.raises(ConfigError, match="found '23 tokens'; allowed: 1 to 22"):
        check_fits(items, 22)
