"""Rules of keys and values in the engine: chunks, prefixes, forks, windows and preemptions change no token."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from drivetrain.contracts.plugin import PluginConfig
from drivetrain.contracts.scheduler import Grant, Limits, OrderKey, RequestFacts, Scheduler, StepPlan, View
from drivetrain.serving.engine import Engine
from drivetrain.serving.types import FinishReason, SamplingParams
from support.fake_model import (
    VOCAB_SIZE,
    PlainModel,
    Run,
    add,
    expected_tokens,
    fake_lm,
    finish,
    greedy,
    make_engine,
    prompts,
)

torch.set_num_threads(1)

PROMPT = [5, 9, 12, 3, 3, 44, 60, 1, 17, 30]
LONG = [(i * i * 11 + i) % VOCAB_SIZE for i in range(33)]


class Splitter(Scheduler):
    """Gives the prompt of the one request in given portions, then a token a step."""

    def __init__(self, portions: list[int]) -> None:
        super().__init__(PluginConfig())
        self.portions = list(portions)

    def limits(self) -> Limits:
        return Limits(64, 4)

    def key(self, request: RequestFacts) -> OrderKey:
        return (request.sequence_number,)

    def plan(self, view: View) -> StepPlan:
        candidate = view.running[0] if view.running else next(view.waiting)
        return StepPlan([Grant(candidate.request_id, self.portions.pop(0) if self.portions else 1)])


# --- chunked prefill -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("windows", [(None,), (None, 5), (3, None, 7)])
def test_every_split_of_a_prompt_gives_the_same_tokens(windows: tuple[int | None, ...]) -> None:
    prompt = PROMPT[:7]
    expected = expected_tokens(prompt, 6, windows)
    for cuts in itertools.chain.from_iterable(itertools.combinations(range(1, 7), k) for k in range(7)):
        portions = [b - a for a, b in itertools.pairwise([0, *cuts, 7])]
        engine = make_engine(Splitter(portions), windows=windows, max_batched_tokens=64, block_size=3)
        add(engine, "a", prompt, greedy(6))
        assert finish(engine).tokens["a", 0] == expected, portions


def test_prefill_chunks_and_decodes_share_a_step() -> None:
    engine = make_engine(max_batched_tokens=6)
    first, second = list(prompts(2, 9))
    add(engine, "a", first, greedy(10))
    run = Run()
    while ("a", 0) not in run.tokens:
        run.add(engine.step())
    add(engine, "b", second, greedy(4))
    for _ in range(2):
        assert [chunk.request_id for chunk in engine.step()] in (["a"], ["a", "b"])
    assert fake_lm(engine).tokens_per_step[-2:] == [6, 5]


# --- prefix cache ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [7, 8, 9, 12])
@pytest.mark.parametrize("windows", [(None,), (None, 5), (5,)])
def test_the_same_prompt_again_computes_only_what_no_full_block_holds(
    length: int, windows: tuple[int | None, ...]
) -> None:
    engine = make_engine(windows=windows)
    prompt = LONG[:length]
    add(engine, "a", prompt, greedy(1))
    finish(engine)
    before = fake_lm(engine).num_tokens_computed
    sequences = add(engine, "b", prompt, greedy(5))
    run = finish(engine)
    # At least the last token is always computed: its scores are wanted.
    assert fake_lm(engine).num_tokens_computed - before - 4 == max(1, length % 4)
    assert engine.prompt_info(sequences).cached_tokens == length - max(1, length % 4)
    assert run.tokens["b", 0] == expected_tokens(prompt, 5, windows)


def test_without_the_prefix_cache_everything_is_computed() -> None:
    engine = make_engine(prefix_cache=False)
    for name in "ab":
        add(engine, name, PROMPT, greedy(1))
        finish(engine)
    assert fake_lm(engine).num_tokens_computed == 2 * len(PROMPT)
    assert engine.kv.pools[0].num_indexed == 0


def test_a_running_request_shares_its_blocks_with_one_that_comes_later() -> None:
    engine = make_engine()
    add(engine, "a", LONG[:12], greedy(20))
    run = Run()
    run.add(engine.step())
    used = engine.kv.pools[0].num_used
    add(engine, "b", [*LONG[:8], 1, 2], greedy(20))
    run.add(engine.step())
    assert engine.kv.pools[0].num_used - used == 2  # its own third block, and the first's fourth
    run = finish(engine, run)
    assert run.tokens["a", 0] == expected_tokens(LONG[:12], 20)
    assert run.tokens["b", 0] == expected_tokens([*LONG[:8], 1, 2], 20)


def test_output_is_found_as_the_prefix_of_the_next_turn() -> None:
    engine = make_engine()
    add(engine, "a", PROMPT, greedy(10))
    answer = finish(engine).tokens["a", 0]
    second_turn = [*PROMPT, *answer, 4, 4, 4]
    sequences = add(engine, "b", second_turn, greedy(5))
    assert finish(engine).tokens["b", 0] == expected_tokens(second_turn, 5)
    # 19 tokens have keys and values: the last token of an answer was never run through the model.
    assert engine.prompt_info(sequences).cached_tokens == 16


def test_what_the_cache_holds_costs_none_of_the_step() -> None:
    """A cached prompt takes as many of the step's tokens as have to be computed, so that many start at once."""
    engine = make_engine(max_batched_tokens=16)
    add(engine, "first", LONG[:13], greedy(1))
    finish(engine)
    for number in range(6):
        add(engine, f"r{number}", LONG[:13], greedy(1))
    assert len(engine.step()) == 6
    assert fake_lm(engine).tokens_per_step[-1] == 6


def test_a_request_whose_scores_were_no_numbers_leaves_nothing_in_the_cache() -> None:
    engine = make_engine()
    fake_lm(engine).faults.nan_row = 0
    add(engine, "a", LONG[:12], greedy(5))
    assert finish(engine).last["a", 0].finish_reason is FinishReason.ERROR
    sequences = add(engine, "b", LONG[:12], greedy(5))
    assert finish(engine).tokens["b", 0] == expected_tokens(LONG[:12], 5)
    assert engine.prompt_info(sequences).cached_tokens == 0


# --- n > 1 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [7, 8])
def test_siblings_share_the_prompt_and_differ_in_what_follows(length: int) -> None:
    engine = make_engine(num_blocks=80)
    params = SamplingParams(n=3, temperature=1.5, seed=5, max_tokens=12, ignore_eos=True)
    add(engine, "a", LONG[:length], params)
    run = finish(engine)
    outputs = [run.tokens["a", index] for index in range(3)]
    assert len({tuple(output) for output in outputs}) == 3
    assert fake_lm(engine).num_tokens_computed == length + 2 + 3 * 11
    for index, output in enumerate(outputs):
        alone = make_engine(num_blocks=80, prefix_cache=False)
        alone_sequences = add(alone, "b", LONG[:length], SamplingParams(**{**vars(params), "n": 1}))
        alone_sequences[0].seed = engine_seed(5, index)
        assert finish(alone).tokens["b", 0] == output


def engine_seed(seed: int, index: int) -> int:
    from drivetrain.serving.sampler import sequence_seed

    return sequence_seed(seed, index)


def test_a_shared_block_is_copied_before_it_is_written() -> None:
    engine = make_engine(windows=(None,), prefix_cache=False)
    sequences = add(engine, "a", PROMPT, greedy(20, n=2))
    run = Run()
    run.add(engine.step())  # the prompt
    parent = sequences[0]
    assert parent.blocks is not None
    blocks = list(parent.blocks.blocks[0])
    # Slots of the prompt: the third block's last two slots belong to what follows.
    prompt_slots = [blocks[position // 4] * 4 + position % 4 for position in range(len(PROMPT))]
    before = engine.runner.cache[0].view(-1)[prompt_slots].clone()
    run.add(engine.step())
    child = sequences[1]
    assert child.blocks is not None
    assert child.blocks.blocks[0][:2] == parent.blocks.blocks[0][:2]
    assert child.blocks.blocks[0][2] != parent.blocks.blocks[0][2]
    assert torch.equal(engine.runner.cache[0].view(-1)[prompt_slots], before)
    run = finish(engine, run)
    assert run.tokens["a", 0] == run.tokens["a", 1] == expected_tokens(PROMPT, 20, (None,))


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_siblings_go_on_after_the_first_has_ended(prefix_cache: bool) -> None:
    engine = make_engine(max_running=1, prefix_cache=prefix_cache)
    add(engine, "a", PROMPT, greedy(1, n=3))
    run = finish(engine)
    assert [run.tokens["a", index] for index in range(3)] == [expected_tokens(PROMPT, 1)] * 3


def test_cancelling_the_prompt_of_siblings_ends_them_all() -> None:
    engine = make_engine(max_batched_tokens=4)
    add(engine, "a", PROMPT, greedy(5, n=3))
    engine.step()
    chunks = engine.cancel("a")
    assert sorted(chunk.index for chunk in chunks) == [0, 1, 2]
    assert {chunk.finish_reason for chunk in chunks} == {FinishReason.CANCELLED}
    finish(engine)


# --- windows ---------------------------------------------------------------------------------------------------------


def test_a_window_holds_no_more_blocks_than_it_sees() -> None:
    engine = make_engine(windows=(None, 9), num_blocks=[40, 5], max_model_len=150, max_batched_tokens=8)
    add(engine, "a", LONG, greedy(110))
    run, most = Run(), 0
    while engine.has_work:
        run.add(engine.step())
        most = max(most, engine.kv.pools[1].num_used)
    assert run.tokens["a", 0] == expected_tokens(LONG, 110, (None, 9))
    # Between steps it keeps the 8 tokens that the next one sees, in at most 3 blocks; a step of 8 takes 2 more.
    assert most == 3
    assert engine.metrics.snapshot()["preemptions"] == 0


def test_a_prefix_whose_window_blocks_are_gone_is_used_as_far_as_they_are_there() -> None:
    engine = make_engine(windows=(None, 5), num_blocks=[40, 6], max_batched_tokens=8)
    add(engine, "a", LONG[:24], greedy(1))
    finish(engine)
    # Others take every block of the window's small pool, and none of what the full layers remember.
    for number, prompt in enumerate(prompts(3, 12)):
        add(engine, f"o{number}", prompt, greedy(1))
        finish(engine)
    sequences = add(engine, "b", LONG[:24], greedy(6))
    assert finish(engine).tokens["b", 0] == expected_tokens(LONG[:24], 6)
    assert engine.prompt_info(sequences).cached_tokens == 0


# --- preemption ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", ["fcfs", "priority"])
@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_a_preempted_request_goes_on_as_if_it_had_not_been(
    scheduler: str, prefix_cache: bool, temperature: float
) -> None:
    def run_all(num_blocks: int) -> tuple[Run, Engine]:
        engine = make_engine(scheduler, num_blocks=num_blocks, prefix_cache=prefix_cache)
        for number, prompt in enumerate(prompts(5, 14)):
            params = SamplingParams(
                temperature=temperature,
                seed=number,
                max_tokens=24,
                ignore_eos=True,
                repetition_penalty=1.2,
                frequency_penalty=0.3,
                logprobs=2,
            )
            add(engine, f"r{number}", prompt, params)
        return finish(engine), engine

    undisturbed, roomy = run_all(200)
    crowded, tight = run_all(18)
    assert roomy.metrics.snapshot()["preemptions"] == 0
    assert tight.metrics.snapshot()["preemptions"] > 0
    assert crowded.tokens == undisturbed.tokens
    assert tight._sampler.num_tracked == 0
    for key, chunk in undisturbed.last.items():
        assert crowded.last[key].logprobs == chunk.logprobs


def test_the_last_in_order_gives_way() -> None:
    engine = make_engine(num_blocks=18, windows=(None,), max_batched_tokens=32)
    for number, prompt in enumerate(prompts(3, 16)):
        add(engine, f"r{number}", prompt, greedy(40))
    preempted: list[str] = []
    move = engine.roster.preempt
    engine.roster.preempt = lambda request: (preempted.append(request.name), move(request))  # type: ignore[assignment]
    finish(engine)
    assert preempted[0] == "r2[0]"
    assert "r0[0]" not in preempted


def test_no_newcomer_takes_the_blocks_that_another_gave_up() -> None:
    def crowded() -> Engine:
        engine = make_engine(num_blocks=18, windows=(None,), max_batched_tokens=32, prefix_cache=False)
        for number, prompt in enumerate(prompts(2, 30)):
            add(engine, f"r{number}", prompt, greedy(30))
        return engine

    engine, num_steps = crowded(), 0
    while not engine.metrics.snapshot()["preemptions"]:
        engine.step()
        num_steps += 1
    engine, run = crowded(), Run()
    for _ in range(num_steps - 1):
        run.add(engine.step())
    add(engine, "late", [1, 2], greedy(3))
    run.add(engine.step())
    assert set(engine.roster.running) == {"r0[0]"}
    finish(engine, run)


def test_nobody_overtakes_a_request_that_waits_for_blocks() -> None:
    engine = make_engine(num_blocks=16, windows=(None,), prefix_cache=False, max_batched_tokens=64)
    large, next_large, small = [3] * 40, [4] * 40, [5, 6]
    add(engine, "large", large, greedy(5))
    add(engine, "next", next_large, greedy(1))
    add(engine, "small", small, greedy(1))
    run = finish(engine)
    assert list(run.last) == [("large", 0), ("next", 0), ("small", 0)]


def test_a_prompt_may_take_the_blocks_of_a_decode_that_has_its_share_of_the_step_already() -> None:
    """Decodes are granted first, but the prompt comes first in order: the decode gives way within the same plan."""

    class PromptLast(Splitter):
        def key(self, request: RequestFacts) -> OrderKey:
            return (-request.sequence_number,)

        def plan(self, view: View) -> StepPlan:
            running = sorted(view.running, key=lambda candidate: candidate.pending_tokens)
            grants = [Grant(c.request_id, min(c.pending_tokens, 8)) for c in running]
            return StepPlan(grants or [Grant(next(view.waiting).request_id, 4)])

    engine = make_engine(PromptLast([]), num_blocks=16, windows=(None,), prefix_cache=False, max_batched_tokens=64)
    run = Run()
    add(engine, "decode", [3] * 4, greedy(50))
    while len(engine.roster.running) < 1 or engine.roster.running["decode[0]"].num_output_tokens < 20:
        run.add(engine.step())
    prompt = [9] * 60
    engine._planner.admit(add(engine, "prompt", prompt, greedy(2))[0], 1)
    run = finish(engine, run)
    assert engine.metrics.snapshot()["preemptions"] >= 1
    assert {chunk.finish_reason for chunk in run.last.values()} == {FinishReason.LENGTH}
    assert run.tokens["prompt", 0] == expected_tokens(prompt, 2, (None,))
    assert run.tokens["decode", 0] == expected_tokens([3] * 4, 50, (None,))


# --- log-probabilities of the prompt ---------------------------------------------------------------------------------


def plain_logprobs(prompt: list[int]) -> list[float]:
    model = PlainModel()
    rows = [torch.tensor(model.push(token), dtype=torch.float64).log_softmax(0) for token in prompt]
    return [float(row[token]) for row, token in zip(rows, prompt[1:], strict=False)]


@pytest.mark.parametrize("length", [1, 2, 9, 30])
@pytest.mark.parametrize(
    "options",
    [{}, {"max_batched_tokens": 3}, {"num_blocks": 18, "max_batched_tokens": 7}, {"prefix_cache": False}],
    ids=["whole", "chunks", "preempted", "no cache"],
)
def test_prompt_logprobs_are_the_model_s_own_however_the_prompt_was_computed(
    length: int, options: dict[str, Any]
) -> None:
    engine = make_engine(**options)
    others = list(prompts(3, 20))
    add(engine, "warm", LONG[:length], greedy(1))
    finish(engine)
    for number, prompt in enumerate(others[:2]):
        add(engine, f"o{number}", prompt, greedy(40))
    sequences = add(engine, "a", LONG[:length], greedy(30, prompt_logprobs=2, n=2))
    run = finish(engine)
    info = engine.prompt_info(sequences)
    assert info.token_ids == tuple(LONG[:length])
    assert info.logprobs is not None
    assert info.logprobs[0] is None
    found = [entry.logprob for entry in info.logprobs[1:] if entry is not None]
    assert found == pytest.approx(plain_logprobs(LONG[:length]), abs=1e-5)
    assert [entry.token_id for entry in info.logprobs[1:] if entry] == LONG[1:length]
    assert all(len(entry.top) == 2 and entry.top[0][1] >= entry.top[1][1] for entry in info.logprobs[1:] if entry)
    assert run.tokens["a", 1] == expected_tokens(LONG[:length], 30)


def test_a_prompt_interrupted_while_it_is_scored_is_scored_once() -> None:
    engine = make_engine(max_batched_tokens=5, num_blocks=30)
    sequences = add(engine, "a", LONG, greedy(4, prompt_logprobs=0))
    engine.step()
    engine.step()
    engine.roster.preempt(sequences[0])
    finish(engine)
    logprobs = engine.prompt_info(sequences).logprobs
    assert logprobs is not None
    assert [e.logprob for e in logprobs[1:] if e] == pytest.approx(plain_logprobs(LONG), abs=1e-5)
