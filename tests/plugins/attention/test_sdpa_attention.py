"""Rules of the sdpa backend: whatever the batch, each query gets what a plain loop over its own tokens gives it."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drivetrain.contracts.attention import AttentionSpec, LayerAttention
from drivetrain.errors import EngineError
from drivetrain.plugins.attention import sdpa
from drivetrain.plugins.attention.sdpa import SdpaAttention
from support.paging import Pages, whole_batch

torch.set_num_threads(1)

CPU = torch.device("cpu")
QKV = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def backend(block_size: int = 4) -> SdpaAttention:
    return SdpaAttention(SdpaAttention.Config(block_size=block_size))


def spec_of(
    windows: Sequence[int | None],
    heads: tuple[int, int] = (4, 2),
    size: int = 8,
    cap: float | None = None,
    dtype: str = "float64",
) -> AttentionSpec:
    return AttentionSpec(tuple(LayerAttention(*heads, size, 0.3, window, cap) for window in windows), dtype)


def plain_attention(
    layer: LayerAttention, q_THD: torch.Tensor, k_TGD: torch.Tensor, v_TGD: torch.Tensor
) -> torch.Tensor:
    """One whole sequence, token by token and head by head, in float64."""
    out = torch.zeros(q_THD.shape, dtype=torch.float64)
    repeats = layer.num_heads // layer.num_kv_heads
    for token in range(q_THD.shape[0]):
        first = 0 if layer.window is None else max(0, token - layer.window + 1)
        for head in range(layer.num_heads):
            keys = k_TGD[first : token + 1, head // repeats].double()
            values = v_TGD[first : token + 1, head // repeats].double()
            scores = keys @ q_THD[token, head].double() * layer.scale
            if layer.soft_cap is not None:
                scores = layer.soft_cap * torch.tanh(scores / layer.soft_cap)
            out[token, head] = torch.softmax(scores, dim=0) @ values
    return out


def random_qkv(layer: LayerAttention, length: int, dtype: torch.dtype = torch.float64) -> QKV:
    q = torch.randn(length, layer.num_heads, layer.head_size, dtype=dtype)
    k, v = torch.randn(2, length, layer.num_kv_heads, layer.head_size, dtype=dtype)
    return q, k, v


def check_schedule(spec: AttentionSpec, block_size: int, steps: Sequence[dict[int, int]], seed: int = 0) -> None:
    """Run the steps (sequence -> new tokens) over a cache, and compare every query of every layer to the plain loop."""
    torch.manual_seed(seed)
    attention, pages = backend(block_size), Pages(spec, block_size, 160, seed)
    cache = attention.allocate(spec, pages.num_blocks, CPU)
    totals: dict[int, int] = {}
    for step in steps:
        for sequence, new in step.items():
            totals[sequence] = totals.get(sequence, 0) + new
    data = {
        (index, s): random_qkv(layer, total) for index, layer in enumerate(spec.layers) for s, total in totals.items()
    }
    expected = {key: plain_attention(spec.layers[key[0]], *qkv) for key, qkv in data.items()}
    done = dict.fromkeys(totals, 0)
    for new_tokens in steps:
        batch = pages.batch(new_tokens)
        step = attention.begin(spec, batch, cache)
        for index in range(len(spec.layers)):
            ranges = [(s, slice(done[s], done[s] + new)) for s, new in new_tokens.items()]
            q, k, v = (torch.cat([data[index, s][part][rows] for s, rows in ranges]) for part in range(3))
            wanted = torch.cat([expected[index, s][rows] for s, rows in ranges])
            torch.testing.assert_close(step.attend(index, q, k, v), wanted, rtol=1e-9, atol=1e-9)
        for s, new in new_tokens.items():
            done[s] += new


MIXED = (
    {0: 5, 1: 1, 2: 9},
    {0: 1, 1: 1, 2: 1},
    {2: 1, 3: 7, 0: 3},
    {3: 1, 1: 4, 0: 1, 2: 1},
    {0: 1, 1: 1, 2: 1, 3: 1},
)


@pytest.mark.parametrize("heads", [(1, 1), (2, 2), (6, 2), (9, 3), (8, 1), (7, 7)])
@pytest.mark.parametrize("cap", [None, 0.7])
def test_every_head_layout_equals_the_plain_loop(heads: tuple[int, int], cap: float | None) -> None:
    check_schedule(spec_of([None, 3], heads, 6, cap), 4, MIXED)


@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize("windows", [(None,), (1,), (2, 5), (None, 4, 100), (16, None)])
def test_every_window_and_block_size_equals_the_plain_loop(block_size: int, windows: tuple[int | None, ...]) -> None:
    check_schedule(spec_of(windows), block_size, MIXED)


def test_many_decodes_of_different_lengths_equal_the_plain_loop() -> None:
    lengths = random.Random(0)
    prompts = {s: lengths.randint(1, 12) for s in range(40)}
    check_schedule(spec_of([None, 4], (3, 1), 4), 4, (prompts, dict.fromkeys(prompts, 1), dict.fromkeys(prompts, 1)))


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_schedule_equals_the_plain_loop(data: st.DataObject) -> None:
    windows = data.draw(st.lists(st.one_of(st.none(), st.integers(1, 9)), min_size=1, max_size=3))
    groups, repeats = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    cap = data.draw(st.sampled_from([None, 1.5]))
    chunks = st.dictionaries(st.integers(0, 3), st.integers(1, 6), min_size=1, max_size=4)
    steps = data.draw(st.lists(chunks, min_size=1, max_size=5))
    check_schedule(spec_of(windows, (groups * repeats, groups), 4, cap), data.draw(st.integers(1, 5)), steps)


@pytest.mark.parametrize("cap", [None, 0.9])
@pytest.mark.parametrize("window", [None, 1, 3])
def test_packed_sequences_without_a_cache_equal_the_plain_loop(cap: float | None, window: int | None) -> None:
    torch.manual_seed(0)
    spec, lengths = spec_of([window], (6, 3), 4, cap), [5, 1, 8]
    parts = [random_qkv(spec.layers[0], length) for length in lengths]
    q, k, v = (torch.cat([part[i] for part in parts]) for i in range(3))
    found = backend().begin(spec, whole_batch(lengths), None).attend(0, q, k, v)
    torch.testing.assert_close(found, torch.cat([plain_attention(spec.layers[0], *part) for part in parts]))


@pytest.mark.parametrize("cap", [None, 0.9])
@pytest.mark.parametrize("window", [None, 2])
def test_gradients_without_a_cache_are_right(cap: float | None, window: int | None) -> None:
    torch.manual_seed(0)
    spec = spec_of([window], (4, 2), 3, cap)
    q, k, v = (x.requires_grad_() for x in random_qkv(spec.layers[0], 5))
    step = backend().begin(spec, whole_batch([3, 2]), None)
    assert torch.autograd.gradcheck(lambda *qkv: step.attend(0, *qkv), (q, k, v))


def test_long_prefills_are_cut_into_slices_that_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdpa, "_MASK_BYTES", 200)
    for cap in (None, 0.7):
        check_schedule(spec_of([None, 3, 11], (2, 1), 4, cap), 3, ({0: 30}, {0: 17, 1: 9}, {0: 1, 1: 12}))


def test_no_slice_of_queries_needs_more_scores_than_the_bound() -> None:
    for t, offset, window in ((10_000, 0, None), (3_000, 100_000, None), (9_000, 5_000, 4_096), (2, 10**7, None)):
        pieces = sdpa._query_slices(t, offset, window, 1, 4)
        assert [piece.queries.start for piece in pieces[1:]] == [piece.queries.stop for piece in pieces[:-1]]
        assert pieces[-1].queries.stop == t
        assert all(piece.size * 4 <= sdpa._MASK_BYTES for piece in pieces)


def test_keys_and_values_are_written_to_their_slots_and_nowhere_else() -> None:
    torch.manual_seed(0)
    spec = spec_of([None, 3], dtype="float32")
    attention, pages = backend(4), Pages(spec, 4, 8)
    cache = attention.allocate(spec, pages.num_blocks, CPU)
    batch = pages.batch({0: 6, 1: 3})
    step = attention.begin(spec, batch, cache)
    q, k, v = random_qkv(spec.layers[1], 9, torch.float32)
    step.attend(1, q, k, v)
    slots = batch.slots[spec.groups[1].index]
    assert torch.equal(cache.keys[1].flatten(0, 1)[slots], k)
    assert torch.equal(cache.values[1].flatten(0, 1)[slots], v)
    written = torch.zeros(32, dtype=torch.bool).index_fill(0, slots, True)
    assert not cache.keys[1].flatten(0, 1)[~written].any()
    assert not cache.keys[0].any()


def test_blocks_are_copied_in_the_layers_of_their_group_only() -> None:
    spec = spec_of([None, 3, None], dtype="float32")
    attention = backend(4)
    cache = attention.allocate(spec, [6, 6], CPU)
    for store in (*cache.keys, *cache.values):
        store.normal_()
    before = [store.clone() for store in (*cache.keys, *cache.values)]
    attention.copy_blocks(cache, spec.groups[0], [(1, 4), (2, 0)])
    attention.copy_blocks(cache, spec.groups[1], [])
    for index, (store, old) in enumerate(zip((*cache.keys, *cache.values), before, strict=True)):
        expected = old.clone()
        if index % 3 != 1:
            expected[4], expected[0] = old[1], old[2]
        assert torch.equal(store, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bytes_per_block_is_what_the_allocated_cache_takes(dtype: str) -> None:
    spec, attention = spec_of([None, 5, None], dtype=dtype), backend(16)
    cache = attention.allocate(spec, [3, 7], CPU)
    for group, blocks in zip(spec.groups, (3, 7), strict=True):
        stores = [store[layer] for store in (cache.keys, cache.values) for layer in group.layers]
        assert sum(store.nbytes for store in stores) == attention.bytes_per_block(spec, group) * blocks
    contract = attention.kv_contract(spec)
    assert (contract.layout, contract.block_size, contract.dtype) == ("paged-BNGD/1", 16, dtype)


def test_bfloat16_stays_close_to_the_plain_loop() -> None:
    torch.manual_seed(0)
    spec = spec_of([None], (4, 2), 16, dtype="bfloat16")
    attention, pages = backend(4), Pages(spec, 4, 16)
    cache = attention.allocate(spec, pages.num_blocks, CPU)
    q, k, v = random_qkv(spec.layers[0], 20, torch.bfloat16)
    expected = plain_attention(spec.layers[0], q, k, v)
    start = 0
    for new in (11, 1, 7, 1):
        rows = slice(start, start + new)
        found = attention.begin(spec, pages.batch({0: new}), cache).attend(0, q[rows], k[rows], v[rows])
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.double(), expected[rows], rtol=2e-2, atol=2e-2)
        start += new


def test_context_without_a_cache_is_an_error() -> None:
    spec = spec_of([None])
    batch = Pages(spec, 4, 8).batch({0: 3})
    later = type(batch)([1], [3], batch.query_starts, batch.kv_lengths)
    with pytest.raises(EngineError, match="no cache was given"):
        backend().begin(spec, later, None)


def test_scores_that_would_overflow_without_the_maximum_taken_off_stay_finite() -> None:
    spec = spec_of([None], dtype="float32")
    q, k, v = random_qkv(spec.layers[0], 6, torch.float32)
    out = backend().begin(spec, whole_batch([6]), None).attend(0, q * 1e4, k * 1e4, v)
    assert math.isfinite(float(out.sum()))
