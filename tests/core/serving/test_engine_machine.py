"""Rule: whatever comes in whatever order, blocks are conserved, states are legal, and every output is exact or cut."""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from drivetrain.serving.blocks import GONE
from drivetrain.serving.engine import Engine
from drivetrain.serving.request import Request, RequestState
from drivetrain.serving.types import Chunk, FinishReason, GenerationRequest, SamplingParams
from support.fake_model import FakeClock, expected_output, fake_lm, make_engine

torch.set_num_threads(1)

MAX_MODEL_LEN = 40
SHARED = [(i * i * 5 + 3) % 64 for i in range(20)]
CUT_SHORT = (FinishReason.CANCELLED, FinishReason.TIMEOUT, FinishReason.ERROR)

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "fcfs, windows, cache": {"scheduler": "fcfs", "num_blocks": [11, 9], "windows": (None, 5)},
    "fcfs, no cache": {"scheduler": "fcfs", "num_blocks": 12, "windows": (None, 5), "prefix_cache": False},
    "fcfs, three groups, large steps": {
        "scheduler": "fcfs",
        "num_blocks": [14, 11, 10],
        "windows": (None, 9, None, 3),
        "max_batched_tokens": 32,
        "max_running": 3,
    },
    "fcfs, windows only, blocks of one": {"scheduler": "fcfs", "num_blocks": 20, "windows": (6,), "block_size": 1},
    "priority, windows, cache": {"scheduler": "priority", "num_blocks": [11, 9], "max_running": 3},
    "priority, no displacing": {"scheduler": "priority", "num_blocks": 12, "windows": (None,), "displace": False},
    "priority, fewer tokens than places": {
        "scheduler": "priority",
        "num_blocks": [13, 9],
        "max_batched_tokens": 3,
        "prefix_cache": False,
    },
}

params_of = st.builds(
    SamplingParams,
    temperature=st.just(0.0),
    n=st.sampled_from([1, 1, 2, 3]),
    max_tokens=st.sampled_from([None, 1, 2, 6, 12]),
    min_tokens=st.sampled_from([0, 0, 1]),
    stop_token_ids=st.sampled_from([(), (), (8, 27), (2,)]),
    stop=st.sampled_from([(), (), ("cb",), ("bd", "w")]),
    include_stop=st.booleans(),
    ignore_eos=st.booleans(),
    frequency_penalty=st.just(0.0),
)


@dataclass
class Followed:
    """One request as its client sees it."""

    prompt: list[int]
    params: SamplingParams
    sequences: list[Request]
    chunks: dict[int, list[Chunk]] = field(default_factory=dict)

    def tokens(self, index: int) -> list[int]:
        return [token for chunk in self.chunks.get(index, []) for token in chunk.token_ids]

    def text(self, index: int) -> str:
        return "".join(chunk.text for chunk in self.chunks.get(index, []))


class EngineMachine(RuleBasedStateMachine):
    options: dict[str, Any] = {}

    def __init__(self) -> None:
        super().__init__()
        self.clock = FakeClock()
        options = {"max_running": 6, "max_batched_tokens": 8, **self.options}
        self.engine = make_engine(**options, max_model_len=MAX_MODEL_LEN, clock=self.clock)
        self.max_running, self.max_batched = options["max_running"], options["max_batched_tokens"]
        self.followed: dict[str, Followed] = {}
        self.numbers = itertools.count()

    @initialize()
    def nothing_is_held_at_first(self) -> None:
        assert not self.engine.has_work

    @rule(
        shared=st.integers(0, len(SHARED)),
        own=st.lists(st.integers(0, 63), max_size=8),
        params=params_of,
        priority=st.integers(-2, 2),
        timeout=st.sampled_from([None, None, 0.5, 3.0]),
        is_streamed=st.booleans(),
    )
    def add(
        self,
        shared: int,
        own: list[int],
        params: SamplingParams,
        priority: int,
        timeout: float | None,
        is_streamed: bool,
    ) -> None:
        prompt = [*SHARED[:shared], *own] or [1]
        request_id = f"r{next(self.numbers)}"
        request = GenerationRequest(prompt, params, priority, timeout, is_streamed=is_streamed)
        sequences = self.engine.add(request_id, request, prompt)
        for sequence in sequences:
            sequence.chunk_tokens = min(sequence.chunk_tokens, 3)  # answers here are shorter than usual chunks
        self.followed[request_id] = Followed(prompt, params, sequences)

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(["unknown", *self.followed]))
        chunks = self.engine.cancel(request_id)
        assert all(chunk.finish_reason in (FinishReason.CANCELLED, None) for chunk in chunks)
        self.receive(chunks)
        if request_id in self.followed:
            assert all(sequence.is_finished for sequence in self.followed[request_id].sequences)

    @rule(count=st.integers(1, 6))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.sound_step(0.01)

    def sound_step(self, seconds: float) -> None:
        self.clock.advance(seconds)
        chunks = self.engine.step()
        assert [chunk.error for chunk in chunks if chunk.finish_reason is FinishReason.ERROR] == []
        self.receive(chunks)

    @rule(seconds=st.sampled_from([0.1, 1.0, 40.0]))
    def time_passes(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule()
    def a_step_breaks(self) -> None:
        lm = fake_lm(self.engine)
        lm.faults.error = RuntimeError("injected")
        waiting = {id(r) for r in self.engine.roster.waiting}
        chunks = self.engine.step()
        was_reached, lm.faults.error = lm.faults.error is None, None
        self.receive(chunks)
        ended = [chunk for chunk in chunks if chunk.finish_reason is FinishReason.ERROR]
        assert was_reached == bool(ended)
        assert all("RuntimeError: injected" in (chunk.error or "") for chunk in ended)
        # At least the first that waited and was not admitted waits on; whoever still waits kept its tokens.
        assert all(r.state is not RequestState.FINISHED for r in self.engine.roster.waiting if id(r) in waiting)

    @rule(row=st.integers(0, 7))
    def a_row_is_nan(self, row: int) -> None:
        before = self.num_output_tokens
        fake_lm(self.engine).faults.nan_row = row
        chunks = self.engine.step()
        fake_lm(self.engine).faults.nan_row = None
        wrong = [chunk for chunk in chunks if chunk.finish_reason is FinishReason.ERROR]
        assert len(wrong) == min(1, len(wrong) + self.num_output_tokens - before)
        assert all("not finite" in (chunk.error or "") for chunk in wrong)
        self.receive(chunks)

    @property
    def num_output_tokens(self) -> int:
        return sum(s.num_output_tokens for request in self.followed.values() for s in request.sequences)

    def receive(self, chunks: list[Chunk]) -> None:
        for chunk in chunks:
            own = self.followed[chunk.request_id].chunks.setdefault(chunk.index, [])
            assert not own or own[-1].finish_reason is None, "a chunk after the last one"
            own.append(chunk)

    @invariant()
    def books_balance(self) -> None:
        check_books(self.engine)

    @invariant()
    def limits_are_kept(self) -> None:
        assert self.engine.num_running <= self.max_running
        assert max(fake_lm(self.engine).tokens_per_step, default=0) <= self.max_batched

    @precondition(lambda self: self.followed)
    @invariant()
    def what_came_so_far_is_right(self) -> None:
        request = self.followed[f"r{len(self.followed) - 1}"]
        for sequence in request.sequences:
            untold = sequence.untold.token_ids if sequence.untold else []
            assert list(sequence.output_tokens) == [*request.tokens(sequence.index), *untold]

    def teardown(self) -> None:
        # Each step computes at least one token of the first in order, or takes one place from the last.
        work = sum(len(f.prompt) + s.max_tokens + 2 for f in self.followed.values() for s in f.sequences)
        for _ in range(3 * work + 10):
            if not self.engine.has_work:
                break
            self.sound_step(0.001)
            check_books(self.engine)
        assert not self.engine.has_work, "requests are stuck"
        for request in self.followed.values():
            self.check_output(request)
        assert [pool.num_used for pool in self.engine.kv.pools] == [0] * len(self.engine.kv.pools)
        assert (self.engine.num_running, self.engine.num_waiting) == (0, 0)
        assert self.engine._sampler.num_tracked == 0

    def check_output(self, request: Followed) -> None:
        windows = self.options.get("windows", (None, 5))
        expected = expected_output(request.prompt, request.params, max_model_len=MAX_MODEL_LEN, windows=windows)
        for index in range(request.params.n):
            last = request.chunks[index][-1]
            assert last.finish_reason is not None
            tokens, text = request.tokens(index), request.text(index)
            if last.finish_reason in CUT_SHORT:
                assert tokens == expected.tokens[: len(tokens)]
                assert expected.text.startswith(text) or request.params.stop
            else:
                assert (tokens, text) == (expected.tokens, expected.text)
                assert (last.finish_reason, last.stop_reason) == (expected.reason, expected.stop_reason)


def check_books(engine: Engine) -> None:
    """Every place that knows of a sequence or a block agrees with every other."""
    kv = engine.kv
    kv.check()
    live = {s.name: s for s in engine.roster if not s.is_finished}
    held = {s.name for sequences in engine.roster.held.values() for s in sequences}
    waiting = {s.name: s for s in engine.roster.waiting}
    assert engine.roster.running.keys() | waiting.keys() | held == live.keys()
    assert len(engine.roster.running) + len(waiting) + len(held) == len(live)
    assert engine.num_waiting == len(waiting) + len(held)
    assert {s.state for s in engine.roster.running.values()} <= {RequestState.RUNNING}
    assert {s.state for s in waiting.values()} <= {RequestState.WAITING, RequestState.PREEMPTED}
    assert all(live[name].state is RequestState.HELD for name in held)
    assert all(s.blocks is None and s.num_computed == 0 for s in live.values() if s.name not in engine.roster.running)
    rows = [s.blocks.row for s in engine.roster.running.values() if s.blocks]
    assert sorted([*rows, *kv._rows]) == list(range(len(kv.tables[0])))
    for index, pool in enumerate(kv.pools):
        listed: Counter[int] = Counter()
        for sequence in engine.roster.running.values():
            assert sequence.blocks is not None
            blocks = sequence.blocks.blocks[index]
            listed.update(block for block in blocks if block != GONE)
            assert kv.tables[index][sequence.blocks.row].tolist() == [max(b, 0) for b in blocks] + [0] * (
                kv.tables[index].shape[1] - len(blocks)
            )
            begin, end = sequence.blocks.writable
            for position in range(max(begin, sequence.num_computed), end):
                block = blocks[position // kv.block_size]
                assert pool.references(block) == 1, "what may be written belongs to somebody else, too"
                assert not pool.is_indexed(block), "what may be written can be found as something else"
        assert {block: pool.references(block) for block in range(pool.total) if pool.references(block)} == listed
        assert pool.num_used == len(listed)
        assert pool._block_of == {content: block for block, content in pool._hash_of.items()}
        assert all(pool._hash_of[block] == content for block, content in pool._cached.items())


@pytest.fixture(autouse=True)
def no_log_of_injected_faults(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "drivetrain")


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_any_mix_of_events_keeps_the_books_and_the_outputs(name: str) -> None:
    machine = type("Machine", (EngineMachine,), {"options": CONFIGURATIONS[name]})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=25,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
