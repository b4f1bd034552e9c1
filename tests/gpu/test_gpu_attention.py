"""paged-triton on a GPU: the whole conformance suite, and shapes of real models against torch's attention."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from drivetrain.contracts.attention import AttentionBatch, AttentionSpec, LayerAttention, PagedCache
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
