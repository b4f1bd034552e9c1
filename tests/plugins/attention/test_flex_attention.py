"""Rules of the flex backend: masks beyond causality and windows, one program for all steps, and clear refusals.

That it attends as every backend must is the conformance suite's to say.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from pydantic import ValidationError

from drivetrain.contracts.attention import PAGED_BNGD, AttentionBatch, AttentionSpec, LayerAttention, PagedCache
from drivetrain.contracts.platform import PlatformFacts
from drivetrain.contracts.plugin import ProbeContext, Purpose
from drivetrain.errors import ConfigError, EngineError, KernelBuildError
from drivetrain.plugins.attention.flex import FlexAttention
from drivetrain.plugins.attention.sdpa import SdpaAttention
from support.paging import Pages, whole_batch

torch.set_num_threads(1)

CPU = torch.device("cpu")
LAYER = LayerAttention(4, 2, 16, 0.3)
SPEC = AttentionSpec((LAYER, dataclasses.replace(LAYER, window=21, scale=0.2)), "float32")
STEPS = ({0: 37, 1: 5}, {1: 30, 0: 1}, {0: 1, 1: 1})
FACTS = PlatformFacts("cpu", "cpu", "a processor", 1, frozenset({"float32"}), "avx2", "gloo")


def backend(**options: object) -> FlexAttention:
    return FlexAttention(FlexAttention.Config.model_validate(options))


def even_keys_or_itself(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """A mask of a user's own."""
    return (key % 2 == 0) | (key == query)


def plain(layer: LayerAttention, q_THD: torch.Tensor, k_TGD: torch.Tensor, v_TGD: torch.Tensor, sees: object):
    """One whole sequence with an explicit mask; ``sees`` narrows it by positions."""
    repeats = layer.num_heads // layer.num_kv_heads
    k, v = (x.double().repeat_interleave(repeats, dim=1) for x in (k_TGD, v_TGD))
    query, key = torch.arange(q_THD.shape[0])[:, None], torch.arange(q_THD.shape[0])[None, :]
    visible = key <= query
    if layer.window is not None:
        visible &= key > query - layer.window
    if callable(sees):
        visible = visible & sees(query, key)
    scores = torch.einsum("thd,khd->htk", q_THD.double(), k) * layer.scale
    weights = scores.masked_fill(~visible, -math.inf).softmax(-1)
    return torch.einsum("htk,khd->thd", weights, v).float()


def check(attention: FlexAttention, sees: object) -> None:
    """Every query of a few mixed steps equals the explicit mask's."""
    torch.manual_seed(0)
    totals = {s: sum(step.get(s, 0) for step in STEPS) for s in (0, 1)}
    data = {(i, s): (torch.randn(n, 4, 16), *torch.randn(2, n, 2, 16)) for i in range(2) for s, n in totals.items()}
    size = attention.config.block_size
    pages, done = Pages(SPEC, size, 12), dict.fromkeys(totals, 0)
    cache = attention.allocate(SPEC, pages.num_blocks, CPU)
    for new_tokens in STEPS:
        step = attention.begin(SPEC, pages.batch(new_tokens), cache)
        for index, layer in enumerate(SPEC.layers):
            ranges = [(s, slice(done[s], done[s] + new)) for s, new in new_tokens.items()]
            q, k, v = (torch.cat([data[index, s][part][rows] for s, rows in ranges]) for part in range(3))
            wanted = torch.cat([plain(layer, *data[index, s], sees)[rows] for s, rows in ranges])
            torch.testing.assert_close(step.attend(index, q, k, v), wanted, rtol=1e-4, atol=1e-5)
        for s, new in new_tokens.items():
            done[s] += new


def test_a_chunk_hides_what_is_before_it() -> None:
    check(backend(chunk=7, block_size=32), lambda query, key: key >= query // 7 * 7)


def test_a_mask_of_ones_own_narrows_what_is_seen() -> None:
    check(backend(mask=f"{__name__}:even_keys_or_itself"), even_keys_or_itself)


def test_packed_sequences_without_a_cache_use_the_same_masks() -> None:
    torch.manual_seed(0)
    lengths, spec = [130, 1, 9], AttentionSpec((SPEC.layers[1],), "float32")
    q, (k, v) = torch.randn(140, 4, 16), torch.randn(2, 140, 2, 16)
    step = backend(chunk=7, mask=f"{__name__}:even_keys_or_itself").begin(spec, whole_batch(lengths), None)
    parts = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    both = lambda query, key: even_keys_or_itself(query, key) & (key >= query // 7 * 7)  # noqa: E731
    wanted = torch.cat([plain(spec.layers[0], *part, both) for part in parts])
    torch.testing.assert_close(step.attend(0, q, k, v), wanted, rtol=1e-4, atol=1e-5)


def test_a_block_that_two_sequences_share_counts_once() -> None:
    """As the prefix cache shares them: the first block of both is the same."""
    torch.manual_seed(0)
    spec = AttentionSpec((LAYER,), "float32")
    attention = backend()
    cache = attention.allocate(spec, [4], CPU)
    assert isinstance(cache, PagedCache)
    q, (k, v) = torch.randn(18, 4, 16), torch.randn(2, 18, 2, 16)
    cache.keys[0][2], cache.values[0][2] = k[:16], v[:16]
    batch = AttentionBatch(
        [1, 1],
        [16, 16],
        torch.tensor([0, 1, 2], dtype=torch.int32),
        torch.tensor([17, 17], dtype=torch.int32),
        (torch.tensor([[2, 1], [2, 3]], dtype=torch.int32),),
        (torch.tensor([16, 48]),),
    )
    found = attention.begin(spec, batch, cache).attend(0, q[16:], k[16:], v[16:])
    for row in (16, 17):
        rows = [*range(16), row]
        wanted = plain(LAYER, q[rows], k[rows], v[rows], None)[-1]
        torch.testing.assert_close(found[row - 16], wanted, rtol=1e-4, atol=1e-5)


def test_one_program_serves_steps_of_every_shape() -> None:
    """Prefills, decodes, windows, other scales, other numbers of blocks and of tiles: nothing is compiled again."""
    from torch._dynamo.utils import counters

    attention = backend()
    spec = AttentionSpec((LayerAttention(3, 1, 16, 0.3), LayerAttention(3, 1, 16, 0.7, 5)), "float32")
    for num_blocks, steps in ((40, ({0: 3}, {0: 1}, {0: 1, 1: 300})), (21, ({0: 129, 1: 2}, {0: 1, 1: 1}))):
        pages = Pages(spec, 16, num_blocks)
        cache = attention.allocate(spec, pages.num_blocks, CPU)
        for new_tokens in steps:
            batch = pages.batch(new_tokens)
            step = attention.begin(spec, batch, cache)
            q, kv = torch.randn(batch.num_tokens, 3, 16), torch.randn(batch.num_tokens, 1, 16)
            for layer in (0, 1):
                step.attend(layer, q, kv, kv)
            if "first" not in locals():
                first = counters["stats"]["unique_graphs"]
    assert counters["stats"]["unique_graphs"] == first


def test_only_the_plain_mask_shares_a_cache_with_sdpa() -> None:
    plain_contract = backend().kv_contract(SPEC)
    assert plain_contract == SdpaAttention(SdpaAttention.Config()).kv_contract(SPEC)
    others = {backend(**options).kv_contract(SPEC).layout for options in ({"chunk": 7}, {"chunk": 8})}
    assert len(others) == 2
    assert PAGED_BNGD not in others


def test_a_mask_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ValidationError, match="MODULE:FUNCTION"):
        backend(mask="no function")
    with pytest.raises(ConfigError, match="can't be imported"):
        backend(mask="surely_no_such_module:mask")
    with pytest.raises(ConfigError, match="is no function"):
        backend(mask=f"{__name__}:SPEC")


def test_the_probe_refuses_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def code(**facts: object) -> str:
        return FlexAttention.probe(ProbeContext(**{"platform": FACTS, "dtype": "float32", **facts})).code  # type: ignore[arg-type]

    assert code() == "ok"
    assert code(purpose=Purpose.TRAIN) == "no_backward"
    assert code(dtype="float64") == "unsupported_dtype"
    monkeypatch.setenv("CXX", "surely-no-such-compiler")
    assert code() == "no_compiler"


def test_gradients_on_a_processor_are_refused() -> None:
    spec = AttentionSpec((LAYER,), "float32")
    q, (k, v) = torch.randn(5, 4, 16, requires_grad=True), torch.randn(2, 5, 2, 16)
    step = backend().begin(spec, whole_batch([5]), None)
    with pytest.raises(EngineError, match="no backward on CPUs"):
        step.attend(0, q, k, v)


def test_a_compiler_that_fails_is_told_with_its_output() -> None:
    from torch._inductor import config

    spec = AttentionSpec((LayerAttention(7, 7, 24, 0.3),), "float32")
    q, k, v = torch.randn(3, 5, 7, 24)
    step = backend().begin(spec, whole_batch([5]), None)
    without = config.patch({"cpp.cxx": ("surely-no-such-compiler",), "fx_graph_cache": False})
    with without, pytest.raises(KernelBuildError, match="could not compile FlexAttention") as caught:
        step.attend(0, q, k, v)
    assert "compiler" in caught.value.output
    assert "attention=sdpa" in str(caught.value)
