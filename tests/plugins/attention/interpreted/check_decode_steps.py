"""Run by ``tests/plugins/attention/test_paged_triton.py`` in a process with Triton's interpreter on: how paged-triton
cuts decodes, and that a step of them can be recorded and replayed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from drivetrain.contracts.attention import AttentionBatch, AttentionSpec
from drivetrain.kernels.triton import decode
from drivetrain.pages import read_blocks, write_tokens
from drivetrain.plugins.attention.paged_triton import PagedTritonAttention
from drivetrain.testing.attention_oracle import plain_attention, whole_batch
from drivetrain.testing.suites.attention import TOLERANCES, spec_of
from support.recorded import Recorder, expect_the_same_tokens
from support.tiny_models import save_tiny

torch.set_num_threads(1)

CPU = torch.device("cpu")


# --- how decodes are cut -------------------------------------------------------------------------------------------


def lengths_of(lengths: Sequence[int], contexts: Sequence[int]) -> AttentionBatch:
    kv_lengths = torch.tensor(lengths, dtype=torch.int32) + torch.tensor(contexts, dtype=torch.int32)
    return AttentionBatch(lengths, [], whole_batch(lengths, CPU).query_starts, kv_lengths)


@pytest.mark.parametrize("chunk_size", [1, 3, 128, None])
@pytest.mark.parametrize("window", [None, 1, 7, 10_000])
def test_chunks_cover_every_key_that_is_seen_once(
    chunk_size: int | None, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "num_processors", lambda device: 5)
    lengths, contexts = [1, 4, 1, 1], [0, 9, 600, 33]
    chunks = decode.cut(lengths_of(lengths, contexts), window, 2, 640, chunk_size)
    count = int(chunks.num_items)
    assert count <= len(chunks.items)
    assert not chunks.done.any()
    assert chunks.done.shape == (4, 2)
    seen: dict[int, list[int]] = {}
    items = chunks.items[:count, :6].tolist()
    for index, (row, s, begin, end, first, number) in enumerate(items):
        assert begin < end
        assert first <= index < first + number
        assert row == {0: 0, 2: 5, 3: 6}[s]
        assert [item[1] for item in items[first : first + number]] == [s] * number
        seen.setdefault(s, []).extend(range(begin, end))
    first_key = {s: 0 if window is None else max(0, contexts[s] + 1 - window) for s in (0, 2, 3)}
    assert seen == {s: list(range(first_key[s], contexts[s] + 1)) for s in (0, 2, 3)}


def test_the_list_of_more_sequences_than_a_program_takes() -> None:
    contexts = [(37 * s) % 700 for s in range(600)]
    chunks = decode.cut(lengths_of([1] * 600, contexts), None, 3, 1024, 200)
    items = chunks.items[: int(chunks.num_items)].tolist()
    wanted = [(s, begin) for s, context in enumerate(contexts) for begin in range(0, context + 1, 200)]
    assert [(item[1], item[2]) for item in items] == wanted


@pytest.mark.parametrize(
    "lengths",
    [
        [512],
        [131_072],
        [32_768] * 4,
        [8192] * 4,
        [2048] * 16,
        [8192] * 30,
        [512] * 256,
        [8192] * 64,
        [131_072] + [512] * 63,
        [65_536, 32_768, 64],
    ],
)
@pytest.mark.parametrize("groups", [1, 8])
def test_chunks_give_every_processor_work_and_are_not_too_short(
    groups: int, lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However wide the table is, and whatever was there when the list was last made."""
    monkeypatch.setattr(decode, "num_processors", lambda device: 132)
    batch = lengths_of([1] * len(lengths), [length - 1 for length in lengths])
    chunks = decode.cut(batch, None, groups, 1 << 20)
    items = chunks.items[: int(chunks.num_items)]
    sizes = (items[:, 3] - items[:, 2]).tolist()
    assert all(size % decode.CHUNK_STEP == 0 for size in sizes)
    wanted, most = 132 * decode._PROGRAMS_PER_PROCESSOR, 132 * decode._MOST_PROGRAMS_PER_PROCESSOR
    if sum(lengths) >= decode._MANY_KEYS and len(lengths) * groups < most // 2:
        assert len(items) * groups <= most, "all run at once"
        assert len(items) * groups >= 0.8 * most or max(sizes) < 4 * decode.CHUNK_STEP, "no processor waits"
    assert len(items) * groups >= wanted / 2 or max(sizes) == decode.CHUNK_STEP
    assert len(items) * groups <= max(most, wanted + len(lengths) * groups) + groups
    assert max(sizes) <= max(decode.CHUNK_STEP, 2 * -(-sum(lengths) * groups // wanted))
    assert len(chunks.items) * groups <= max(most, wanted + groups * len(lengths)) + groups, "idle programs cost time"


# --- steps that are recorded ---------------------------------------------------------------------------------------

WIDTH = 60
"""Columns of a block table: a third more than the longest sequence needs. Programs for the rest have nothing to do."""


class RecordedStep:
    """A decode step of as many sequences as there are lengths, over random pages, in tensors that stay where they are.

    Tables are wider than any sequence needs.
    """

    def __init__(self, attention: PagedTritonAttention, spec: AttentionSpec, count: int) -> None:
        self.attention, self.spec, self.count = attention, spec, count
        self.block_size = attention.config.block_size
        self.cache = attention.allocate(spec, [64] * len(spec.groups), CPU)
        layer = spec.layers[0]
        self.q = torch.zeros(count, layer.num_heads, layer.head_size)
        self.k, self.v = torch.zeros(2, count, layer.num_kv_heads, layer.head_size)
        self.kv_lengths = torch.ones(count, dtype=torch.int32)
        self.tables = [torch.zeros(count, WIDTH, dtype=torch.int32) for _ in spec.groups]
        self.slots = [torch.zeros(count, dtype=torch.int64) for _ in spec.groups]
        self.outs: list[torch.Tensor] = []

    def fill(self, lengths: Sequence[int], seed: int) -> None:
        """Other tokens, lengths and blocks, and other pages behind them."""
        torch.manual_seed(seed)
        for x in (self.q, self.k, self.v):
            x.normal_()
        self.kv_lengths.copy_(torch.tensor(lengths))
        for table, slots in zip(self.tables, self.slots, strict=True):
            free = torch.randperm(64).tolist()
            for row, length in enumerate(lengths):
                own = [free.pop() for _ in range(-(-length // self.block_size))]
                table[row] = 0
                table[row, : len(own)] = torch.tensor(own)
                slots[row] = own[-1] * self.block_size + (length - 1) % self.block_size
        used = torch.arange(64 * self.block_size)
        shape = (len(used), *self.k.shape[1:])
        for pages in (*self.cache.keys, *self.cache.values):
            write_tokens(pages, used, torch.randn(shape))

    def run(self) -> None:
        starts = torch.arange(self.count + 1, dtype=torch.int32)
        longest = [WIDTH * self.block_size - 1] * self.count  # as captured steps have it: nobody's real length
        one_each = [1] * self.count
        batch = AttentionBatch(one_each, longest, starts, self.kv_lengths, tuple(self.tables), tuple(self.slots))
        step = self.attention.begin(self.spec, batch, self.cache)
        self.outs[:] = [step.attend(layer, self.q, self.k, self.v) for layer in range(len(self.spec.layers))]

    def expect_plain(self) -> None:
        relative, absolute = TOLERANCES[self.attention.kv_contract(self.spec).dtype]
        for group in self.spec.groups:
            for layer in group.layers:
                for row, length in enumerate(self.kv_lengths.tolist()):
                    blocks = self.tables[group.index][row, : -(-length // self.block_size)].long()
                    stores = (self.cache.keys[layer], self.cache.values[layer])
                    k, v = (read_blocks(pages, blocks, torch.float32)[:length] for pages in stores)
                    wanted = plain_attention(self.spec.layers[layer], self.q[row : row + 1], k, v)
                    found = self.outs[layer][row : row + 1].double()
                    torch.testing.assert_close(found, wanted, rtol=relative, atol=absolute)


@pytest.mark.parametrize(
    ("windows", "cap", "kv", "chunk_size"),
    [
        ((None, None), None, "auto", None),
        ((None, 9), 2.0, "auto", 50),
        ((None, 40), None, "int8", None),
        ((None,), 3.0, "fp8", 64),
    ],
)
def test_a_recorded_step_reads_lengths_blocks_and_tokens_anew(
    windows: tuple[int | None, ...], cap: float | None, kv: str, chunk_size: int | None
) -> None:
    """Nothing of the first step is left in the replays: neither a length, nor a chunk, nor a count of what is done."""
    spec = spec_of(windows, heads=(6, 2, 16), cap=cap, kv=kv)
    attention = PagedTritonAttention(PagedTritonAttention.Config(block_size=16, chunk_size=chunk_size))
    step, recorder = RecordedStep(attention, spec, 4), Recorder()
    step.fill([1, 1, 1, 1], seed=0)
    replay = recorder(step.run)
    step.expect_plain()
    for seed, lengths in enumerate(([300, 1, 77, 2], [1, 513, 1, 130], [16, 17, 15, 400], [700, 1, 1, 1]), start=1):
        step.fill(lengths, seed)
        replay()
        step.expect_plain()


def test_replayed_decodes_of_a_model_give_its_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From embedding to logits, everything in a decode step reads what lies in the buffers, rows of nobody included."""
    save_tiny("llama", tmp_path / "model")
    prompts = ["The quick brown fox", "There is more", "x"]
    recorder = expect_the_same_tokens(tmp_path / "model", prompts, 4, 16, monkeypatch, kernels="triton")
    assert recorder.num_captured == 3 + 1, "decodes of one, two and four, and other steps, all of them ahead"
    assert recorder.num_replayed >= 6
