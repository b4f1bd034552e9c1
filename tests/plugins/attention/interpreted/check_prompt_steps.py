"""Run by ``tests/plugins/attention/test_paged_triton.py`` in a process with Triton's interpreter on: how paged-triton
lists the tiles of prompts on the device, and that a step with prompts can be recorded and replayed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drivetrain.contracts.attention import AttentionBatch, AttentionSpec
from drivetrain.kernels.triton import flash
from drivetrain.pages import read_blocks, write_tokens
from drivetrain.plugins.attention.paged_triton import PagedTritonAttention, StepPlan
from drivetrain.testing.attention_oracle import plain_attention
from drivetrain.testing.suites.attention import TOLERANCES, spec_of
from support.recorded import Recorder, expect_the_same_tokens
from support.tiny_models import save_tiny

torch.set_num_threads(1)

Sequences = Sequence[tuple[int, int]]
"""(tokens, context) of each sequence."""


def open_batch(sequences: Sequences, **tensors: Any) -> AttentionBatch:
    """Of which the host says how many sequences and tokens there are."""
    tokens = torch.tensor([count for count, _ in sequences], dtype=torch.int32)
    contexts = torch.tensor([context for _, context in sequences], dtype=torch.int32)
    starts = torch.cat((torch.zeros(1, dtype=torch.int32), tokens.cumsum(0, dtype=torch.int32)))
    total = [int(tokens.sum()), *[0] * (len(sequences) - 1)]
    return AttentionBatch(total, [0] * len(sequences), starts, tokens + contexts, is_open=True, **tensors)


# --- how prompts are cut -------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([0, 1, 2, 3, 17, 64, 65]), st.integers(0, 300)), min_size=1, max_size=90),
    st.sampled_from([(1, 64), (4, 64), (3, 16)]),
)
def test_tiles_cover_every_row_of_every_prompt_once_and_the_longest_come_first(
    sequences: list[tuple[int, int]], rows: tuple[int, int]
) -> None:
    sequences = [(count, context if count else 0) for count, context in sequences]
    of_token, of_tile = rows
    tiles = flash.list_tiles(open_batch(sequences), *rows).tolist()
    lengths = [count + context for count, context in sequences]
    listed = [(s, row) for s, row in tiles if s >= 0]
    order = sorted(range(len(sequences)), key=lambda s: -lengths[s])
    assert listed == [
        (s, row)
        for s in order
        if sequences[s][0] > 1
        for row in reversed(range(0, sequences[s][0] * of_token, of_tile))
    ]
    assert tiles[len(listed) :] == [[-1, -1]] * (len(tiles) - len(listed))


def test_a_batch_that_is_not_open_is_cut_by_the_host_and_has_no_idle_tiles() -> None:
    sequences = [(70, 0), (1, 30), (2, 400), (33, 9)]
    closed = AttentionBatch(*map(list, zip(*sequences, strict=True)), *_lengths(sequences))
    by_host = StepPlan(closed, has_cache=True, chunk_size=None).tiles(2, 32).tolist()
    by_device = flash.list_tiles(open_batch(sequences), 2, 32).tolist()
    assert sorted(by_host) == sorted(tile for tile in by_device if tile[0] >= 0)
    assert by_host[0] == by_device[0] == [2, 0]


def _lengths(sequences: Sequences) -> tuple[torch.Tensor, torch.Tensor]:
    batch = open_batch(sequences)
    return batch.query_starts, batch.kv_lengths


# --- steps that are recorded ---------------------------------------------------------------------------------------


class RecordedStep:
    """A step of so many tokens and sequences over random pages, in tensors that stay where they are."""

    def __init__(self, attention: PagedTritonAttention, spec: AttentionSpec, tokens: int, sequences: int) -> None:
        self.attention, self.spec = attention, spec
        self.block_size = attention.config.block_size
        self.cache = attention.allocate(spec, [64] * len(spec.groups), torch.device("cpu"))
        layer = spec.layers[0]
        self.q = torch.zeros(tokens, layer.num_heads, layer.head_size)
        self.k, self.v = torch.zeros(2, tokens, layer.num_kv_heads, layer.head_size)
        self.sequences: Sequences = ()
        tables = [torch.zeros(sequences, 60, dtype=torch.int32) for _ in spec.groups]
        slots = [torch.zeros(tokens, dtype=torch.int64) for _ in spec.groups]
        nothing = [(tokens, 0), *[(0, 0)] * (sequences - 1)]
        self.batch = open_batch(nothing, block_tables=tuple(tables), slots=tuple(slots))
        self.outs: list[torch.Tensor] = []

    def fill(self, sequences: Sequences, seed: int) -> None:
        """Other tokens, another division of them, other blocks, and other pages behind them."""
        torch.manual_seed(seed)
        self.sequences, batch = sequences, open_batch(sequences)
        for x in (self.q, self.k, self.v):
            x.normal_()
        self.batch.query_starts.copy_(batch.query_starts)
        self.batch.kv_lengths.copy_(batch.kv_lengths)
        for table, slots in zip(self.batch.block_tables, self.batch.slots, strict=True):
            free, places = torch.randperm(64).tolist(), []
            for row, (count, context) in enumerate(sequences):
                own = [free.pop() for _ in range(-(-(count + context) // self.block_size))]
                table[row] = 63  # of anybody: nothing may be read there
                table[row, : len(own)] = torch.tensor(own, dtype=torch.int32)
                for position in range(context, context + count):
                    places.append(own[position // self.block_size] * self.block_size + position % self.block_size)
            slots.copy_(torch.tensor(places))
        used = torch.arange(64 * self.block_size)
        shape = (len(used), *self.k.shape[1:])
        for pages in (*self.cache.keys, *self.cache.values):
            write_tokens(pages, used, torch.randn(shape))

    def run(self) -> None:
        step = self.attention.begin(self.spec, self.batch, self.cache)
        self.outs[:] = [step.attend(layer, self.q, self.k, self.v) for layer in range(len(self.spec.layers))]

    def expect_plain(self) -> None:
        relative, absolute = TOLERANCES[self.attention.kv_contract(self.spec).dtype]
        for group in self.spec.groups:
            for layer in group.layers:
                wanted, stores = [], (self.cache.keys[layer], self.cache.values[layer])
                queries = self.q.split([count for count, _ in self.sequences])
                for row, (q, (count, context)) in enumerate(zip(queries, self.sequences, strict=True)):
                    blocks = self.batch.block_tables[group.index][row, : -(-(count + context) // self.block_size)]
                    k, v = (read_blocks(x, blocks.long(), torch.float32)[: count + context] for x in stores)
                    if count:
                        wanted.append(plain_attention(self.spec.layers[layer], q, k, v))
                torch.testing.assert_close(self.outs[layer].double(), torch.cat(wanted), rtol=relative, atol=absolute)


DIVISIONS: tuple[Sequences, ...] = (
    [(1, 0), (1, 130), (1, 17), (1, 1), (1, 64), (35, 0)],
    [(9, 300), (0, 0), (1, 77), (0, 0), (0, 0), (30, 5)],
    [(0, 0), (0, 0), (0, 0), (2, 0), (38, 100), (0, 0)],
    [(8, 3), (7, 0), (1, 200), (5, 40), (18, 7), (1, 0)],
)
"""Forty tokens of six sequences: prompts, chunks behind a context, decodes, and sequences of no tokens."""


@pytest.mark.parametrize(
    ("windows", "cap", "kv", "chunk_size"),
    [((None,), None, "auto", None), ((None, 9), 2.0, "auto", 50), ((None,), None, "int8", None)],
)
def test_a_recorded_step_reads_its_division_anew(
    windows: tuple[int | None, ...], cap: float | None, kv: str, chunk_size: int | None
) -> None:
    """Nothing of the step that was recorded, one prompt of all tokens, is left in the replays."""
    spec = spec_of(windows, heads=(6, 2, 16), cap=cap, kv=kv)
    attention = PagedTritonAttention(PagedTritonAttention.Config(block_size=16, chunk_size=chunk_size))
    step, recorder = RecordedStep(attention, spec, 40, 6), Recorder()
    step.fill([(40, 0), *[(0, 0)] * 5], seed=0)
    replay = recorder(step.run)
    step.expect_plain()
    for seed, sequences in enumerate(DIVISIONS, start=1):
        step.fill(sequences, seed)
        replay()
        step.expect_plain()


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_replayed_steps_of_a_model_give_its_tokens(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts whole and in chunks beside decodes, from embedding to the last norm; with windows in some layers."""
    save_tiny(architecture, tmp_path / "model")
    prompts = [[5 + n for n in range(count)] for count in (3, 33, 9, 17)]
    recorder = expect_the_same_tokens(tmp_path / "model", prompts, 4, 20, monkeypatch, kernels="reference")
    assert recorder.num_captured == 3 + 2, "decodes of one, two and four; steps of 16 and 20 tokens"
    assert recorder.num_replayed >= 9
