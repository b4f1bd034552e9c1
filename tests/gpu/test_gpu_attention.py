"""paged-triton on a GPU: the whole conformance suite, and shapes of real models against torch's attention."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from drivetrain.backends.cuda import CudaPlatform
from drivetrain.contracts.attention import (
    FULL_KV,
    SCALED_KV,
    AttentionBatch,
    AttentionSpec,
    LayerAttention,
    PagedCache,
)
from drivetrain.kernels.triton import decode
from drivetrain.plugins.attention.paged_triton import PagedTritonAttention
from drivetrain.testing.attention_oracle import whole_batch
from drivetrain.testing.suites.attention import TOLERANCES, AttentionSuite

HEADS = ((32, 8, 128), (9, 3, 64), (32, 32, 128), (8, 1, 256), (40, 8, 80))
BLOCK = 16


class TestSuite(AttentionSuite):
    """Every test of the suite, on the GPU."""

    plugin = "paged-triton"
    platform = "cuda"


def backend() -> PagedTritonAttention:
    return PagedTritonAttention(PagedTritonAttention.Config(block_size=BLOCK))


def spec_of(heads: tuple[int, int, int], dtype: str, window: int | None = None) -> AttentionSpec:
    return AttentionSpec((LayerAttention(*heads, heads[2] ** -0.5, window),), dtype)


def filled_cache(spec: AttentionSpec, lengths: list[int]) -> tuple[PagedCache, torch.Tensor]:
    """Random keys and values in shuffled blocks, and the sequences' table of blocks."""
    counts = [math.ceil(length / BLOCK) for length in lengths]
    cache = backend().allocate(spec, [sum(counts) + 1], torch.device("cuda"))
    for store in (*cache.keys, *cache.values):
        store.normal_()
    order = torch.randperm(sum(counts), device="cuda", dtype=torch.int32) + 1
    table = torch.zeros(len(lengths), max(counts), dtype=torch.int32, device="cuda")
    for row, blocks in enumerate(order.split(counts)):
        table[row, : counts[row]] = blocks
    return cache, table


def batch_of(news: list[int], contexts: list[int], table: torch.Tensor) -> AttentionBatch:
    plain = whole_batch(news, torch.device("cuda"))
    kv_lengths = torch.tensor(news, device="cuda", dtype=torch.int32) + torch.tensor(
        contexts, device="cuda", dtype=torch.int32
    )
    places = [torch.arange(c, c + n, device="cuda") for n, c in zip(news, contexts, strict=True)]
    slots = torch.cat([table[row].long()[p // BLOCK] * BLOCK + p % BLOCK for row, p in enumerate(places)])
    return AttentionBatch(news, contexts, plain.query_starts, kv_lengths, (table,), (slots,))


def expect_as_torch(spec: AttentionSpec, news: list[int], contexts: list[int]) -> None:
    """One step over a filled cache equals torch's attention of each sequence in float32."""
    torch.manual_seed(0)
    layer, dtype = spec.layers[0], getattr(torch, spec.dtype)
    lengths = [n + c for n, c in zip(news, contexts, strict=True)]
    cache, table = filled_cache(spec, lengths)
    q, k, v = (
        torch.randn(sum(news), heads, layer.head_size, device="cuda", dtype=dtype)
        for heads in (layer.num_heads, layer.num_kv_heads, layer.num_kv_heads)
    )
    out = backend().begin(spec, batch_of(news, contexts, table), cache).attend(0, q, k, v)
    relative, absolute = TOLERANCES[spec.dtype]
    for row, (found, queries) in enumerate(zip(out.split(news), q.split(news), strict=True)):
        stores, blocks = (cache.keys[0], cache.values[0]), table[row].long()
        keys, values = (store[blocks].flatten(0, 1)[: lengths[row]] for store in stores)
        positions = torch.arange(contexts[row], lengths[row], device="cuda")[:, None]
        others = torch.arange(lengths[row], device="cuda")[None, :]
        is_seen = others <= positions
        if layer.window is not None:
            is_seen &= others > positions - layer.window
        wanted = functional.scaled_dot_product_attention(
            *(x.transpose(0, 1)[None].float() for x in (queries, keys, values)),
            attn_mask=is_seen,
            scale=layer.scale,
            enable_gqa=layer.num_heads != layer.num_kv_heads,
        )[0].transpose(0, 1)
        torch.testing.assert_close(found.float(), wanted, rtol=relative, atol=absolute)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("heads", HEADS, ids=lambda heads: "x".join(map(str, heads)))
def test_decodes_of_very_different_lengths(heads: tuple[int, int, int], dtype: str) -> None:
    expect_as_torch(spec_of(heads, dtype), [1] * 6, [0, 1, 511, 5000, 17, 20_000])


@pytest.mark.parametrize("count", [1, 16, 256])
def test_decodes_of_many_sequences(count: int) -> None:
    expect_as_torch(spec_of((32, 8, 128), "bfloat16"), [1] * count, [700 + 3 * n for n in range(count)])


def test_a_decode_behind_128_thousand_tokens() -> None:
    expect_as_torch(spec_of((32, 8, 128), "bfloat16"), [1], [131_071])


@pytest.mark.parametrize("heads", HEADS, ids=lambda heads: "x".join(map(str, heads)))
def test_what_many_programs_merge_is_the_same_every_time(heads: tuple[int, int, int]) -> None:
    """The last of a sequence's programs reads what the others wrote: a difference between two runs would be a race."""
    torch.manual_seed(2)
    spec, contexts = spec_of(heads, "bfloat16"), [16_383, 9000, 700, 5, 30_000]
    cache, table = filled_cache(spec, [context + 1 for context in contexts])
    step = backend().begin(spec, batch_of([1] * 5, contexts, table), cache)
    q, k, v = (torch.randn(5, count, heads[2], device="cuda", dtype=torch.bfloat16) for count in (*heads[:2], heads[1]))
    first = step.attend(0, q, k, v)
    assert all(torch.equal(step.attend(0, q, k, v), first) for _ in range(300))


@pytest.mark.parametrize("kv", [FULL_KV, *SCALED_KV])
@pytest.mark.parametrize("count", [1, 6, 64])
def test_a_replayed_step_gives_what_a_plain_one_gives(count: int, kv: str) -> None:
    """With other lengths, blocks and tokens than those that it was captured with, and a table far wider than needed."""
    torch.manual_seed(3)
    layers = tuple(LayerAttention(32, 8, 128, 0.09, window) for window in (None, 1000))
    spec = AttentionSpec(layers, "bfloat16", kv)
    attention, width, num_blocks = backend(), 4096, 8192
    cache = attention.allocate(spec, [num_blocks, num_blocks], torch.device("cuda"))
    q, k, v = (torch.empty(count, heads, 128, device="cuda", dtype=torch.bfloat16) for heads in (32, 8, 8))
    starts = torch.arange(count + 1, device="cuda", dtype=torch.int32)
    kv_lengths = torch.ones(count, device="cuda", dtype=torch.int32)
    tables = torch.zeros(2, count, width, device="cuda", dtype=torch.int32)
    slots = torch.zeros(2, count, device="cuda", dtype=torch.int64)
    outs: list[torch.Tensor] = []

    def attend(batch: AttentionBatch) -> list[torch.Tensor]:
        step = attention.begin(spec, batch, cache)
        return [step.attend(layer, q, k, v) for layer in range(2)]

    def captured() -> None:
        longest = [width * BLOCK - 1] * count
        batch = AttentionBatch([1] * count, longest, starts, kv_lengths, tuple(tables), tuple(slots))
        outs[:] = attend(batch)

    captured()
    replay = CudaPlatform(CudaPlatform.Config()).capture(captured)
    for most in (1, 300, 2000, 60_000):
        most = min(most, num_blocks * BLOCK // count - BLOCK)
        lengths = torch.randint(1, most + 1, (count,)).tolist()
        for x in (q, k, v):
            x.normal_()
        for keys, values in zip(cache.keys, cache.values, strict=True):
            decode.write(keys, values, *torch.randn(2, 65_536, 8, 128, device="cuda").bfloat16(), random_slots())
        for group in range(2):
            order = torch.randperm(num_blocks, device="cuda")
            for s, length in enumerate(lengths):
                used, order = order[: math.ceil(length / BLOCK)], order[math.ceil(length / BLOCK) :]
                tables[group, s, : len(used)] = used
                slots[group, s] = used[-1] * BLOCK + (length - 1) % BLOCK
        kv_lengths.copy_(torch.tensor(lengths))
        replay()
        found = [out.clone() for out in outs]
        narrow = math.ceil(max(lengths) / BLOCK)
        plain = AttentionBatch(
            [1] * count,
            [length - 1 for length in lengths],
            starts,
            kv_lengths,
            tuple(table[:, :narrow].contiguous() for table in tables),
            tuple(slots),
        )
        for one, other in zip(found, attend(plain), strict=True):
            assert torch.equal(one, other)


def random_slots() -> torch.Tensor:
    return torch.randperm(8192 * BLOCK, device="cuda")[:65_536]


@pytest.mark.parametrize("window", [None, 1000])
@pytest.mark.parametrize("heads", HEADS, ids=lambda heads: "x".join(map(str, heads)))
def test_prompts_chunks_and_decodes_in_one_step(heads: tuple[int, int, int], window: int | None) -> None:
    expect_as_torch(spec_of(heads, "bfloat16", window), [1500, 1, 300, 1, 2], [0, 900, 2000, 33, 4096])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("window", [None, 500])
@pytest.mark.parametrize("heads", HEADS, ids=lambda heads: "x".join(map(str, heads)))
def test_training_equals_torch_forward_and_backward(
    heads: tuple[int, int, int], window: int | None, dtype: str
) -> None:
    torch.manual_seed(1)
    spec, lengths = spec_of(heads, dtype, window), [1030, 1, 257]
    layer = spec.layers[0]
    inputs = [
        torch.randn(sum(lengths), count, heads[2], device="cuda", dtype=getattr(torch, dtype))
        for count in (heads[0], heads[1], heads[1])
    ]
    weight = torch.randn(sum(lengths), heads[0], heads[2], device="cuda")
    own = [x.clone().requires_grad_() for x in inputs]
    out = backend().begin(spec, whole_batch(lengths, torch.device("cuda")), None).attend(0, *own)
    (out.float() * weight).sum().backward()
    wide = [x.float().requires_grad_() for x in inputs]
    parts = []
    for q, k, v in zip(*(x.split(lengths) for x in wide), strict=True):
        ages = torch.arange(len(q), device="cuda")[:, None] - torch.arange(len(q), device="cuda")[None, :]
        mask = (ages >= 0) & (ages < (window or len(q)))
        parts.append(
            functional.scaled_dot_product_attention(
                *(x.transpose(0, 1)[None] for x in (q, k, v)),
                attn_mask=mask,
                scale=layer.scale,
                enable_gqa=heads[0] != heads[1],
            )[0].transpose(0, 1)
        )
    wanted = torch.cat(parts)
    (wanted * weight).sum().backward()
    relative, absolute = TOLERANCES[dtype]
    torch.testing.assert_close(out.float(), wanted, rtol=relative, atol=absolute)
    for mine, right in zip(own, wide, strict=True):
        assert mine.grad is not None
        assert right.grad is not None
        scale = float(right.grad.abs().max())
        torch.testing.assert_close(mine.grad.float(), right.grad, rtol=4 * relative, atol=absolute * max(1.0, scale))
