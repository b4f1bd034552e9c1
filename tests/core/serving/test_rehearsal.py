"""Rule: what the largest steps take is left free beside the cache, so that none of them runs out of memory."""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from drivetrain.assembly import Parts, ServingStack, build_engine, build_model, resolve_parts
from drivetrain.config import load_settings
from drivetrain.contracts.scheduler import Limits
from drivetrain.contracts.source import silent
from drivetrain.errors import EngineError, MemoryBudgetError, SwapError
from drivetrain.plugins.attention.sdpa import SdpaAttention
from drivetrain.registry import PartRequest, Registry
from drivetrain.serving.cache_size import make_kv
from drivetrain.serving.rehearsal import Performers, lengths_of, rehearse
from drivetrain.serving.runner import ModelRunner
from drivetrain.serving.swap import CacheFate, SwapOutcome, commit, prepare
from drivetrain.serving.types import FinishReason, GenerationRequest, SamplingParams
from support.captures import Recorder
from support.card import Card, CardPlatform, registry_with_card
from support.swap_parts import refs_with_swap_parts

torch.set_num_threads(1)
MIB = 2**20
CARD_BYTES = 8 * MIB
LIMITS = Limits(max_batched_tokens=256, max_running=32)
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "eos_token_id": 1,
}
"""0.5 MiB of weights, 3 MiB for a step of 256 tokens, 8 MiB of keys and values for all requests at their longest."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("model")
    (made / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    return made


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[Card]:
    gc.collect()
    with Card(CARD_BYTES) as card:
        monkeypatch.setattr(CardPlatform, "card", card, raising=False)
        yield card


def resolve(folder: Path, **engine: Any) -> Parts:
    settings = {
        "model": str(folder),
        "platform": {"name": "card", "threads": 1, "huge_pages": "off"},
        "loader": {"name": "random", "seed": 3},
        "precision": "fp32",
        "kernels": "reference",
        "attention": {"name": "sdpa", "block_size": 16},
        "scheduler": {"name": "fcfs", "max_batched_tokens": 256, "max_running": 32},
        "engine": {"fuse": False, **engine},
    }
    return resolve_parts(load_settings(None, settings), registry=registry_with_card(), leave_out=("frontend",))


def serve(stack: ServingStack, params: SamplingParams, prompts: list[list[int]]) -> list[FinishReason | None]:
    """Why each request ended; in this thread, which the card watches."""
    for number, prompt in enumerate(prompts):
        stack.engine.add(f"r{number}", GenerationRequest(prompt, params), prompt)
    reasons = []
    while stack.engine.has_work:
        reasons += [chunk.finish_reason for chunk in stack.engine.step() if chunk.finish_reason]
    return reasons


GREEDY = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
DRAWN = SamplingParams(top_p=0.5, frequency_penalty=0.5, logprobs=2, max_tokens=3, ignore_eos=True)
LONGEST = [[number % 300 for number in range(256)]]
MANY = [[number + 5 * other for number in range(60)] for other in range(32)]


def test_the_largest_steps_fit_beside_the_cache_that_auto_makes(folder: Path, card: Card) -> None:
    """Where nine tenths of the free memory, which devices gave before, would have left too little."""
    stack = build_engine(resolve(folder))
    needs = stack.needs
    assert needs is not None
    assert needs.limits == LIMITS
    assert str(needs) in stack.parts.notes
    held = card.peak_bytes = card.held_bytes
    assert serve(stack, GREEDY, LONGEST) == [FinishReason.LENGTH]
    assert serve(stack, DRAWN, MANY) == [FinishReason.LENGTH] * 32
    assert 0.7 * needs.step_bytes < card.peak_bytes - held <= needs.step_bytes
    assert stack.engine.kv.pools[0].total * 16 * 512 > MIB
    _expect_swaps_within_the_memory(stack)


def test_a_cache_that_is_told_to_take_all_leaves_too_little(
    folder: Path, card: Card, caplog: pytest.LogCaptureFixture
) -> None:
    """The same prompt, so that the test above can fail; a size that is given is not questioned."""
    caplog.set_level(logging.CRITICAL, "drivetrain")
    stack = build_engine(resolve(folder, kv_memory="6MiB"))
    assert stack.needs is None
    assert serve(stack, GREEDY, LONGEST) == [FinishReason.ERROR]


def _expect_swaps_within_the_memory(stack: ServingStack) -> None:
    """A scheduler with larger limits is taken only where a step of these has room, and another cache as well."""
    for changed in ({"max_running": 16}, {"max_batched_tokens": 300}):
        prepare(stack, _scheduler(**changed), dry_run=True)
    for changed in ({"max_batched_tokens": 1000}, {"max_running": 256}):
        with pytest.raises(SwapError, match=r"would take .* beside the weights and the cache, and .* are free"):
            prepare(stack, _scheduler(**changed), dry_run=True)
    larger = {"attention": PartRequest("attention", "sdpa", {"block_size": 2**16})}
    with pytest.raises(SwapError, match=r"new parts take .* beside the old ones and a step .* leaves room for swaps"):
        prepare(stack, larger)


# --- a cache that takes another's place ------------------------------------------------------------------------------


class Answers:
    """Thirty-two requests, stepped in this thread, which the card watches."""

    def __init__(self, stack: ServingStack) -> None:
        self._stack = stack
        params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
        for number, prompt in enumerate(MANY):
            stack.engine.add(f"r{number}", GenerationRequest(prompt, params), prompt)
        self._tokens: dict[str, list[int]] = {}

    def step(self, count: int) -> None:
        for _ in range(count):
            for chunk in self._stack.engine.step():
                self._tokens.setdefault(chunk.request_id, []).extend(chunk.token_ids)

    def finish(self) -> dict[str, list[int]]:
        while self._stack.engine.has_work:
            self.step(1)
        return self._tokens


@pytest.mark.parametrize("ends", ["well", "without memory", "with a step that fails", "with scores that are NaN"])
def test_a_cache_that_has_no_room_beside_the_old_one_takes_its_place(
    folder: Path, card: Card, ends: str, caplog: pytest.LogCaptureFixture
) -> None:
    """No request notices, and where the new parts fail, the old cache finds its room again."""
    caplog.set_level(logging.CRITICAL, "drivetrain")
    stack = build_engine(resolve(folder))
    stack.parts.registry = Registry((*refs_with_swap_parts(), stack.parts.registry.find("platform", "card")))
    expected = Answers(stack).finish()
    answers = Answers(stack)
    answers.step(12)  # some wait, some decode
    running = stack.engine.num_running
    faults = {"with a step that fails": "raise", "with scores that are NaN": "nan"}
    options = {"block_size": 8} | ({"phase": faults[ends]} if ends in faults else {})
    asked = {"attention": PartRequest("attention", "faulty" if ends in faults else "sdpa", options)}
    prepared = prepare(stack, asked)
    assert prepared.takes_place
    assert prepared.cache is CacheFate.RECOMPUTE
    assert prepared.extra_memory_bytes < 0.05 * CARD_BYTES
    if ends == "without memory":
        allocate = prepared.parts.attention.allocate

        def run_out(*arguments: Any) -> Any:
            made = allocate(*arguments)
            raise torch.OutOfMemoryError(f"{made} and no more")

        prepared.parts.attention.allocate = run_out  # type: ignore[method-assign]
    commit(stack, prepared, 4, lambda report: None)
    assert answers.finish() == expected
    stack.engine.kv.check()
    assert stack.engine.kv.pools[0].num_used == 0
    if ends == "without memory":
        assert isinstance(prepared.failure, torch.OutOfMemoryError)
        return
    assert prepared.outcome is not None
    assert prepared.outcome.outcome is (SwapOutcome.FINALIZED if ends == "well" else SwapOutcome.ROLLED_BACK)
    assert (prepared.outcome.requests_recomputed, prepared.outcome.requests_kept) == (running, 0)


def _scheduler(**changed: int) -> dict[str, PartRequest]:
    options = {"max_batched_tokens": 256, "max_running": 32, **changed}
    return {"scheduler": PartRequest("scheduler", "fcfs", options)}


def performers(parts: Parts, **captures: Any) -> Performers:
    parts.platform.activate()
    model, _ = build_model(parts, parts.kernels, parts.quantizer)
    return Performers(model, None, captures.get("capture"), captures.get("capture_pieces"), 500_000)


def test_nothing_of_a_rehearsal_stays(folder: Path, card: Card) -> None:
    parts = resolve(folder)
    cast = performers(parts)
    before = card.held_bytes
    needs = rehearse(parts, cast, LIMITS, silent)
    assert needs is not None
    assert card.held_bytes == before
    assert needs.graph_bytes == 0
    # Gate, up and their product of all tokens are there at once.
    assert 3 * 256 * 512 * 4 < needs.step_bytes < 4 * MIB


class SafeSdpa(SdpaAttention):
    """Its decode steps count as ones that can be captured."""

    @classmethod
    def abilities(cls) -> frozenset[str]:
        return super().abilities() | {"graph_safe"}


class PiecesRecorder:
    """Runs what it is to capture once, and keeps what that holds."""

    def __call__(self, function: Callable[[Callable[[Callable[[], None]], None]], None]) -> Callable[[], None]:
        function(lambda work: None)
        return lambda: function(lambda work: work())


def test_what_captured_steps_keep_is_counted(folder: Path, card: Card) -> None:
    """At least what they hold once all sizes are captured; what the driver keeps is a guess on top."""
    card.total_bytes = 64 * MIB
    parts = resolve(folder)
    parts.plugins["attention"] = SafeSdpa(parts.attention.config)
    cast = performers(parts, capture=Recorder(), capture_pieces=PiecesRecorder())
    needs = rehearse(parts, cast, LIMITS, silent)
    assert needs is not None
    assert parts.spec is not None
    kv = make_kv(parts, parts.attention, [8], LIMITS, 512)
    before = card.held_bytes
    runner = ModelRunner(
        cast.model, parts.attention, [8], torch.device("cpu"), cast.capture, capture_pieces=cast.capture_pieces
    )
    runner.reserve(kv, 256, 32)
    runner.capture_ahead(silent)
    held = card.held_bytes - before
    num_sizes = sum(len(steps._sizes) for steps in runner.captured)
    guess = num_sizes * 2 * 2**18
    assert len(runner.captured) == 2
    assert held <= needs.graph_bytes - guess < held + 3 * needs.step_bytes


def test_too_little_memory_for_a_step_is_told_with_what_to_lower(folder: Path, card: Card) -> None:
    card.total_bytes = 3 * MIB // 2
    with pytest.raises(MemoryBudgetError) as raised:
        build_engine(resolve(folder))
    text = str(raised.value)
    assert text.startswith("engine.kv_memory: the weights take 0.5 MiB, and 1.0 MiB of the device's 1.5 MiB are free")
    assert "too little for a step of 256 tokens of up to 32 requests" in text
    assert text.endswith("Lower scheduler.max_batched_tokens or scheduler.max_running, or choose a quantizer.")
    assert isinstance(raised.value.__cause__, torch.OutOfMemoryError)


def test_memory_for_a_step_but_for_no_cache_is_told_with_all_three(folder: Path, card: Card) -> None:
    card.total_bytes = 4 * MIB
    with pytest.raises(MemoryBudgetError, match=r"weights take 0\.5 .*; a step of 256 .* takes .*; one token needs"):
        build_engine(resolve(folder))


def test_a_step_that_fails_is_told_before_the_engine_starts(folder: Path, card: Card) -> None:
    parts = resolve(folder)
    cast = performers(parts)

    def fail(*_: object) -> None:
        raise ZeroDivisionError("no such kernel")

    cast.model.forward = fail  # type: ignore[assignment]
    with pytest.raises(EngineError, match=r"a step of 256 tokens .* rehearsed: ZeroDivisionError: no such kernel"):
        rehearse(parts, cast, LIMITS, silent)


def test_a_size_that_is_given_and_a_platform_that_does_not_measure_want_no_rehearsal(folder: Path, card: Card) -> None:
    parts = resolve(folder, kv_memory="1MiB")
    cast = Performers(None, None, None, None, None)  # type: ignore[arg-type]
    assert rehearse(parts, cast, LIMITS, silent) is None
    settings = load_settings(None, {"model": str(folder), "loader": {"name": "random", "seed": 3}, "platform": "cpu"})
    assert rehearse(resolve_parts(settings, leave_out=("frontend",)), cast, LIMITS, silent) is None


@pytest.mark.parametrize(
    ("num_tokens", "num_sequences", "longest", "lengths"),
    [
        (256, 1, 1024, [256]),
        (256, 4, 1024, [253, 1, 1, 1]),
        (256, 4, 100, [100, 100, 55, 1]),
        (8, 8, 100, [1] * 8),
        (100, 3, 20, [20, 20, 20]),
    ],
)
def test_tokens_lie_over_sequences(num_tokens: int, num_sequences: int, longest: int, lengths: list[int]) -> None:
    assert lengths_of(num_tokens, num_sequences, longest) == lengths
