"""What steps take of a device's memory, measured before the cache is made: the largest ones are rehearsed.

The rehearsal runs the model as the engine does, on a cache of one block a KV group: block tables that name it over and
over stand for contexts of any length, and what is read there is of no consequence.

Which step takes the most depends on the parts. What is of tokens (activations, gate and up) wants all tokens that a
step may have; scores and the sampler's copies want as many sequences as possible; what attention gathers wants long
contexts. So two steps of all tokens are rehearsed: one with as many sequences as may run, one with as few as have so
many tokens. In each, the first sequences are prompts that take all they can, the others decodes, and together they have
as much context as the free memory could hold. Not counted: prompts whose log-probabilities are asked for, which want
scores of all their tokens; and what an attention backend that pads decodes takes where one is much longer than others.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from drivetrain.contracts.model import CausalLM
from drivetrain.contracts.platform import MeasuresPeaks
from drivetrain.contracts.scheduler import Limits
from drivetrain.contracts.source import Progress
from drivetrain.errors import DrivetrainError, EngineError, MemoryBudgetError
from drivetrain.serving.blocks import KVManager
from drivetrain.serving.cache_size import ADVICE, BlockSizes, StepNeeds, make_kv, memory_told, wanted_length
from drivetrain.serving.graphs import Capture
from drivetrain.serving.packing import Scheduled
from drivetrain.serving.pieces import CapturePieces
from drivetrain.serving.request import Request
from drivetrain.serving.runner import ModelRunner
from drivetrain.serving.sampler import Choice, Sampler
from drivetrain.serving.text import NoText, TextStream
from drivetrain.serving.types import SamplingParams

if TYPE_CHECKING:
    from drivetrain.assembly import Parts

_EVERYTHING = SamplingParams(top_p=0.9, min_p=0.05, repetition_penalty=1.1, logprobs=1)
"""Settings of which each takes memory; without top-k, which lets a sampler look at fewer tokens."""


@dataclass(frozen=True)
class Performers:
    """What a rehearsal is run with, as the engine will be.

    draw:                    the bound operation ``sample``, if there is one.
    capture, capture_pieces: the platform's, where steps are to be captured.
    weight_bytes:            of the model; None where its plugin does not tell.
    """

    model: CausalLM
    draw: Callable[..., torch.Tensor] | None
    capture: Capture | None
    capture_pieces: CapturePieces | None
    weight_bytes: int | None


def rehearse(parts: Parts, performers: Performers, limits: Limits, progress: Progress) -> StepNeeds | None:
    """What steps within ``limits`` take; None where the size of the cache is given, or the platform does not measure.

    All that is made here is gone afterwards. Raises MemoryBudgetError when the rehearsal itself finds too little
    memory, and EngineError when a step fails.
    """
    platform = parts.platform
    if parts.settings.engine.kv_bytes is not None or not isinstance(platform, MeasuresPeaks):
        return None
    told = memory_told(platform.memory(), performers.weight_bytes)
    rehearsal = _Rehearsal(parts, performers, limits)
    tokens, running = limits.max_batched_tokens, limits.max_running
    try:
        with torch.inference_mode():
            progress("rehearsing the largest steps", 0, 2, "kinds")
            step_bytes = _measure(platform, rehearsal.run_steps)
            progress("rehearsing the largest steps", 1, 2, "kinds")
            graph_bytes = rehearsal.bytes_of_captures(platform)
            progress("rehearsing the largest steps", 2, 2, "kinds")
    except (torch.OutOfMemoryError, MemoryBudgetError) as error:
        raise MemoryBudgetError(
            f"{told}, which is too little for a step of {tokens} tokens of up to "
            f"{running} requests, and a cache has to fit beside it",
            where="engine.kv_memory",
            hint=ADVICE,
        ) from error
    except DrivetrainError:
        raise
    except Exception as error:  # a plugin's code, on the largest step that it will be given
        raise EngineError(
            f"a step of {tokens} tokens of up to {running} requests failed when it was rehearsed: "
            f"{type(error).__name__}: {error}"
        ) from error
    return StepNeeds(limits, step_bytes, graph_bytes, performers.weight_bytes)


def _measure(platform: MeasuresPeaks, work: Callable[[], object]) -> int:
    """The peak of ``work`` when it is done for the second time: what is compiled, tuned or set up on first use takes
    memory that later steps do not."""
    work()
    return platform.peak_of(work)


def lengths_of(num_tokens: int, num_sequences: int, longest: int) -> list[int]:
    """How a step's tokens lie over sequences: the first take all they can, and each has one at least."""
    lengths = []
    for others in range(num_sequences - 1, -1, -1):
        lengths.append(max(1, min(longest, num_tokens - others)))
        num_tokens -= lengths[-1]
    return lengths


class _Rehearsal:
    """The largest steps that a scheduler's limits allow."""

    def __init__(self, parts: Parts, performers: Performers, limits: Limits) -> None:
        assert parts.spec is not None
        self._parts, self._performers, self._limits = parts, performers, limits
        self._spec = parts.spec.attention
        self._vocab_size = parts.spec.vocab_size
        self._wanted = wanted_length(parts)
        self._sizes = BlockSizes.of(parts.attention, self._spec, limits)
        self._free = parts.platform.memory().free_bytes

    def run_steps(self) -> None:
        """The steps that take most, one after another. The scores of each are held until the next has run, as the
        overlapped loop holds them."""
        tokens, running = self._limits.max_batched_tokens, self._limits.max_running
        runner, kv = self._make(None, None)
        sampler = Sampler(self._vocab_size, runner.device, self._performers.draw)
        most = min(tokens, running)
        held: tuple[torch.Tensor, Choice] | None = None
        for num_sequences in dict.fromkeys((most, min(running, -(-tokens // self._longest_of(1))))):
            for _ in range(2 if num_sequences == most else 1):
                held = self._step(runner, kv, sampler, num_sequences)
        del held

    def _step(
        self, runner: ModelRunner, kv: KVManager, sampler: Sampler, num_sequences: int
    ) -> tuple[torch.Tensor, Choice]:
        """One step as the engine runs it; its scores."""
        lengths = lengths_of(self._limits.max_batched_tokens, num_sequences, self._longest_of(1))
        each = self._longest_of(num_sequences)
        prompt = _request(0, max(each, *lengths))
        rows = [kv.open() for _ in lengths]
        scheduled = [
            Scheduled(prompt, length, max(0, each - length), gives_token=True, blocks=row)
            for length, row in zip(lengths, rows, strict=True)
        ]
        inputs = runner.prepare(scheduled, kv)
        for row in rows:
            kv.close(row)
        logits_NV = runner.forward(inputs)
        plan = sampler.plan([_request(number, 1) for number in range(num_sequences)])
        choice = sampler.choose(logits_NV, plan)
        sampler.read(choice, plan)
        return logits_NV, choice

    def bytes_of_captures(self, platform: MeasuresPeaks) -> int:
        """What the steps that are captured will keep, buffers included."""
        capture, capture_pieces = self._performers.capture, self._performers.capture_pieces
        runner, _ = self._make(capture, capture_pieces)
        kinds = runner.captured
        if not kinds:
            return 0
        kept = buffers = platform.peak_of(lambda: self._make(capture, capture_pieces))
        for index, steps in enumerate(kinds):
            # Each time in new memory: what a first rehearsal made and kept would be missing in a second.
            work = functools.partial(self._rehearse_capture, index)
            kept += steps.bytes_kept(max(0, _measure(platform, work) - buffers))
        return kept

    def _rehearse_capture(self, index: int) -> None:
        runner, _ = self._make(self._performers.capture, self._performers.capture_pieces)
        runner.captured[index].rehearse_largest()

    def _make(self, capture: Capture | None, capture_pieces: CapturePieces | None) -> tuple[ModelRunner, KVManager]:
        parts, limits = self._parts, self._limits
        blocks = [1 for _ in self._spec.groups]
        kv = make_kv(parts, parts.attention, blocks, limits, self._wanted)
        runner = ModelRunner(
            self._performers.model,
            parts.attention,
            blocks,
            parts.platform.device(),
            capture,
            capture_pieces=capture_pieces,
            spec=self._spec,
        )
        runner.reserve(kv, limits.max_batched_tokens, limits.max_running)
        return runner, kv

    def _longest_of(self, num_sequences: int) -> int:
        """Tokens that each of so many requests could have, were all free memory the cache's."""
        return max(1, self._sizes.longest_that_fits(self._wanted, self._free // num_sequences))


def _request(number: int, num_tokens: int) -> Request:
    """A request that no engine knows, with tokens of id 0."""
    return Request(
        request_id=f"rehearsal-{number}",
        index=0,
        tokens=[0] * num_tokens,
        num_prompt_tokens=num_tokens,
        params=_EVERYTHING,
        max_tokens=1,
        seed=number,
        priority=0,
        arrival_seconds=0.0,
        sequence_number=number,
        deadline_seconds=None,
        text=TextStream(NoText(), (), include_stop=False),
        end_tokens=frozenset(),
    )
