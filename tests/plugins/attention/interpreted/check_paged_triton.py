"""Run by ``tests/plugins/attention/test_paged_triton.py`` in a process with Triton's interpreter on."""

from __future__ import annotations

import math

import pytest
import torch

from drivetrain.plugins.attention.paged_triton import PagedTritonAttention
from drivetrain.plugins.attention.sdpa import SdpaAttention
from drivetrain.testing.attention_oracle import PlainStep, Trial, whole_batch
from drivetrain.testing.suites.attention import MIXED, assert_as_plain, spec_of

torch.set_num_threads(1)

CPU = torch.device("cpu")


def backend(**options: int) -> PagedTritonAttention:
    return PagedTritonAttention(PagedTritonAttention.Config.model_validate(options))


@pytest.mark.parametrize(("chunk_size", "window", "cap"), [(1, 5, None), (3, None, None), (7, None, 2.0)])
def test_chunks_of_any_size_merge_to_the_whole(chunk_size: int, window: int | None, cap: float | None) -> None:
    spec = spec_of((window,), heads=(4, 2, 16), cap=cap)
    trial = Trial(backend(block_size=4, chunk_size=chunk_size), spec, CPU)
    for new_tokens in MIXED:
        assert_as_plain(trial.backend, spec, trial.step(new_tokens))


def test_more_chunks_than_are_merged_at_once() -> None:
    spec = spec_of((None,), heads=(2, 1, 8))
    trial = Trial(backend(block_size=16, chunk_size=2), spec, CPU)
    for new_tokens in ({0: 90, 1: 3}, {0: 1, 1: 1}):
        assert_as_plain(trial.backend, spec, trial.step(new_tokens))


@pytest.mark.parametrize("heads", [(20, 1, 8), (17, 1, 16)])
def test_more_query_heads_than_the_smallest_product(heads: tuple[int, int, int]) -> None:
    spec = spec_of((None,), heads=heads)
    trial = Trial(backend(block_size=4), spec, CPU)
    for new_tokens in ({0: 5, 1: 2}, {0: 1, 1: 1}):
        assert_as_plain(trial.backend, spec, trial.step(new_tokens))


@pytest.mark.parametrize("window", [None, 40])
def test_gradients_over_several_tiles_of_queries_and_of_keys(window: int | None) -> None:
    torch.manual_seed(0)
    spec, lengths = spec_of((window,), heads=(6, 2, 12)), [130, 1, 66]
    qkv = [torch.randn(sum(lengths), count, 12) for count in (6, 2, 2)]
    weight = torch.randn(sum(lengths), 6, 12)
    found = []
    for step in (backend().begin(spec, whole_batch(lengths, CPU), None), PlainStep(spec, lengths)):
        own = [x.clone().requires_grad_() for x in qkv]
        (step.attend(0, *own) * weight).sum().backward()
        found.append([x.grad for x in own])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_what_lies_in_hidden_places_may_be_no_number() -> None:
    """The rest of a block, the blocks of others, and blocks that a window has left."""
    spec = spec_of((6,), heads=(2, 1, 8))
    trial = Trial(backend(block_size=4), spec, CPU)
    for store in (*trial.cache.keys, *trial.cache.values):
        store.fill_(math.nan)
    for new_tokens in ({0: 9, 1: 2}, {0: 1, 1: 1}, {0: 3, 1: 7}, {0: 1}):
        assert_as_plain(trial.backend, spec, trial.step(new_tokens))


def test_a_cache_that_is_a_part_of_a_wider_one_is_written_and_read_in_place() -> None:
    spec = spec_of((None,), heads=(4, 2, 8))
    trial = Trial(backend(block_size=4), spec, CPU)
    wide = torch.zeros(*trial.cache.keys[0].shape[:2], 4, 8)
    trial.cache = type(trial.cache)((wide[:, :, :2],), (wide[:, :, 2:],))
    for new_tokens in ({0: 6, 1: 1}, {0: 1, 1: 3}):
        assert_as_plain(trial.backend, spec, trial.step(new_tokens))


@pytest.mark.parametrize("kv", ["int8", "fp8"])
@pytest.mark.parametrize(("window", "cap"), [(None, None), (5, 2.0)])
def test_scaled_keys_in_chunks_and_the_codes_of_sdpa(window: int | None, cap: float | None, kv: str) -> None:
    spec = spec_of((window,), heads=(4, 2, 19), cap=cap, kv=kv)
    native = Trial(backend(block_size=4, chunk_size=3), spec, CPU)
    plain = Trial(SdpaAttention(SdpaAttention.Config(block_size=4)), spec, CPU)
    for new_tokens in MIXED:
        for one, other in zip(native.step(new_tokens), plain.step(new_tokens), strict=True):
            torch.testing.assert_close(one.found, other.found, rtol=1e-3, atol=1e-3)
    for one, other in ((native.cache.keys[0], plain.cache.keys[0]), (native.cache.values[0], plain.cache.values[0])):
        assert torch.equal(one.scales, other.scales)
        differ = (one.codes.view(torch.uint8).int() - other.codes.view(torch.uint8).int()).abs()
        assert differ.max() <= 1
        assert (differ > 0).float().mean() < 0.01


@pytest.mark.parametrize("kv", ["int8", "fp8"])
def test_every_number_is_written_as_sdpa_writes_it(kv: str) -> None:
    """All numbers of fp8, the middles between two, zeros, the largest float and what is no number."""
    spec = spec_of((None,), heads=(1, 1, 127), kv=kv)
    exact = torch.arange(0x7E).to(torch.uint8).view(torch.float8_e4m3fn).float()
    rows = [torch.cat((exact, torch.tensor([448.0])))]
    rows += [torch.cat(((exact[:-1] + exact[1:]) / 2, torch.tensor([448.0, -448.0])))]
    rows += [torch.zeros(127), torch.full((127,), 3e38), torch.full((127,), math.nan), torch.full((127,), -math.inf)]
    k = torch.stack(rows).unsqueeze(1)
    stores = []
    for attention in (backend(block_size=4), SdpaAttention(SdpaAttention.Config(block_size=4))):
        trial = Trial(attention, spec, CPU)
        # Queries of zeros: what is asked for is what was written, and products of such keys overflow.
        q = torch.zeros_like(k)
        attention.begin(spec, trial.book.batch({0: len(rows)}, CPU), trial.cache).attend(0, q, k, k)
        stores.append(trial.cache.keys[0])
    finite = stores[1].scales.isfinite()
    assert torch.equal(stores[0].scales.isfinite(), finite)
    assert torch.equal(stores[0].scales[finite], stores[1].scales[finite])
    assert torch.equal(*(x.codes.view(torch.uint8)[finite] for x in stores))


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("chunk_size", [None, 16])
def test_what_is_not_finite_is_seen_in_whole_tiles_and_merged_chunks(chunk_size: int | None, bad: float) -> None:
    spec = spec_of((None,), heads=(2, 1, 8), kv="int8")
    trial = Trial(backend(block_size=16, chunk_size=chunk_size), spec, CPU)
    trial.loudness[0] = bad
    for new_tokens in ({0: 150, 1: 70}, {0: 1, 1: 1}):
        ill, well = trial.step(new_tokens)
        assert not torch.isfinite(ill.found).any()
        assert_as_plain(trial.backend, spec, [well])
