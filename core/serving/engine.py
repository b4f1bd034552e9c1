"""The serving loop: takes requests, runs one step at a time, gives out chunks. One thread; no locks, no sockets.

A step, in the order it reads:

    expire -> launch (plan: the scheduler decides, blocks are given; prepare; run the model)
           -> collect (sample, read the tokens, advance)

``advance`` is where requests change: tokens are appended, text comes out, sequences end.

The plain loop launches a step and collects it. The overlapped loop launches the next step before it collects the one
that runs, whose tokens it takes on the device: what the next step needs is packed while the model computes. Both give
the same tokens; where the next step depends on more than the tokens, the overlapped loop does as the plain one does.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from drivetrain.config import EngineSettings
from drivetrain.contracts.scheduler import Candidate, Grant, RequestFacts, Scheduler, StepPlan, View
from drivetrain.errors import EngineError, InvalidRequestError, PromptTooLongError
from drivetrain.observers import Observers
from drivetrain.serving.blocks import KVManager, SequenceBlocks
from drivetrain.serving.lane import InlineLane, Lane, Outcome, ThreadLane
from drivetrain.serving.metrics import EngineMetrics
from drivetrain.serving.packing import Scheduled, StepInputs
from drivetrain.serving.request import Request, RequestState
from drivetrain.serving.runner import Copies, ModelRunner
from drivetrain.serving.sampler import Choice, Sampled, Sampler, SamplingPlan, sequence_seed, token_logprobs
from drivetrain.serving.text import IncrementalDecoder, TextStream
from drivetrain.serving.timing import Phase, StepClock
from drivetrain.serving.types import Chunk, FinishReason, GenerationRequest, PromptInfo, TokenLogprob
from drivetrain.serving.waiting import WaitingQueue

_log = logging.getLogger("drivetrain")

MakeDecoder = Callable[[Sequence[int], bool], IncrementalDecoder]
"""(prompt token ids, skip special tokens) -> a decoder for what follows them."""


@dataclass(frozen=True)
class EngineLimits:
    """What any request must keep to.

    max_model_len: most tokens of prompt and output together.
    vocab_size:    token ids are below it.
    end_tokens:    the model's own end tokens.
    """

    max_model_len: int
    vocab_size: int
    end_tokens: frozenset[int]


@dataclass(frozen=True, eq=False)
class Ran:
    """What a step's run gave: logits [N, V] of the wanted rows, and the tokens if they were chosen right behind it.

    seconds: begin and end of the run by ``time.perf_counter``.
    """

    logits_NV: torch.Tensor
    choice: Choice | None
    seconds: tuple[float, float]


@dataclass(frozen=True, eq=False)
class Flight:
    """A step that is launched and not yet collected. Without inputs it could not be launched, and says why."""

    scheduled: list[Scheduled]
    inputs: StepInputs | None
    sampling: SamplingPlan
    outcome: Outcome[Ran]


@dataclass
class Probation:
    """Parts that were exchanged a moment ago, while the next steps show whether they work.

    roll_back:    puts the old parts back.
    finish:       told how it ended: None for well, otherwise why it was rolled back.
    is_withdrawn: whether the swap has been given up by whoever asked for it.
    keep:         the last question: may the new parts stay? From a yes on it can't be given up any more.
    """

    steps_left: int
    roll_back: Callable[[], None]
    finish: Callable[[str | None], None]
    is_withdrawn: Callable[[], bool]
    keep: Callable[[], bool]


class Engine:
    """Continuous batching over one model.

    epoch:     how often parts were exchanged or put back; every chunk carries the epoch that made it.
    probation: set while freshly exchanged parts are watched.
    """

    def __init__(
        self,
        runner: ModelRunner,
        kv: KVManager,
        scheduler: Scheduler,
        limits: EngineLimits,
        settings: EngineSettings,
        make_decoder: MakeDecoder,
        observers: Observers | None = None,
        metrics: EngineMetrics | None = None,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[..., torch.Tensor] | None = None,
    ) -> None:
        self.runner = runner
        self.kv = kv
        self.scheduler = scheduler
        self.limits = limits
        self.settings = settings
        self.metrics = metrics or EngineMetrics()
        self._make_decoder = make_decoder
        self._observers = observers or Observers(installed=False)
        self._clock = clock
        self._sampler = Sampler(limits.vocab_size, runner.device, draw)
        self._waiting = WaitingQueue()
        self._running: dict[str, Request] = {}
        self._sequences: dict[str, list[Request]] = {}
        self._held: dict[str, list[Request]] = {}
        self._num_held = 0  # counted along: the sum over all requests would grow with the queue
        self._deadlines: list[tuple[float, str]] = []
        self._numbers = itertools.count()
        self.epoch = 0
        self.probation: Probation | None = None
        self._overlaps = overlaps(settings.overlap, runner.device)
        self._lane: Lane = ThreadLane() if self._overlaps and runner.device.type == "cpu" else InlineLane()
        self._flying: Flight | None = None
        self._in_order: list[Request] | None = None
        self._step_clock = StepClock()
        self._step_started = clock()
        runner.on_fallback = self.metrics.fell_back
        runner.reserve(kv, scheduler.limits().max_batched_tokens, scheduler.limits().max_running)
        self._tells_states = self._observers.listens("request_changed_state")
        self._tells_steps = self._observers.listens("step_done")

    # --- requests in and out ---------------------------------------------------------------------------------------

    def check(self, request: GenerationRequest, prompt: Sequence[int]) -> None:
        """Raise a RequestError when the engine could never serve this. Changes nothing; any thread may call it."""
        params = request.params
        if not prompt:
            raise InvalidRequestError("the prompt is empty", param="prompt", hint="Send at least one token.")
        for name, tokens in (
            ("prompt", prompt),
            ("stop_token_ids", params.stop_token_ids),
            ("logit_bias", params.logit_bias),
        ):
            bad = next((t for t in tokens if type(t) is not int or not 0 <= t < self.limits.vocab_size), None)
            if bad is not None:
                raise InvalidRequestError(
                    f"token id {bad!r} is outside the vocabulary",
                    param=name,
                    allowed=f"0..{self.limits.vocab_size - 1}",
                )
        room = self.limits.max_model_len - len(prompt)
        if room < 1:
            raise PromptTooLongError(
                f"the prompt has {len(prompt)} tokens; with at least one new token this model takes "
                f"{self.limits.max_model_len}",
                param="prompt",
                hint="Shorten the prompt.",
            )
        if params.max_tokens is not None and params.max_tokens > room:
            raise PromptTooLongError(
                f"the prompt has {len(prompt)} tokens and max_tokens is {params.max_tokens}: together more than the "
                f"{self.limits.max_model_len} this model takes",
                param="max_tokens",
                hint=f"Set max_tokens to at most {room}.",
            )

    def now(self) -> float:
        """The engine's clock, in seconds. Any thread may call it."""
        return self._clock()

    def add(
        self, request_id: str, request: GenerationRequest, prompt: Sequence[int], arrival_seconds: float | None = None
    ) -> list[Request]:
        """Take a request; returns its n sequences. Raises what :meth:`check` raises, and then has taken nothing.

        arrival_seconds: when it came, by :meth:`now`, if it had to wait before it got here.
        """
        self.check(request, prompt)
        if request_id in self._sequences:
            raise InvalidRequestError("a request with this id is under way", param="request_id", found=request_id)
        now = self._clock() if arrival_seconds is None else arrival_seconds
        timeouts = [t for t in (request.timeout_seconds, self.settings.timeout_seconds) if t is not None]
        deadline = now + min(timeouts) if timeouts else None
        seed = request.params.seed if request.params.seed is not None else secrets.randbits(63)
        sequences: list[Request] = []
        for index in range(request.params.n):
            parent = sequences[0] if sequences else None
            sequences.append(self._sequence(request_id, index, request, prompt, seed, now, deadline, parent))
        self._waiting.push(sequences[0])
        if len(sequences) > 1:
            self._held[request_id] = sequences[1:]
            self._num_held += len(sequences) - 1
        self._sequences[request_id] = sequences
        if deadline is not None:
            heapq.heappush(self._deadlines, (deadline, request_id))
        self.metrics.request_added(len(prompt))
        return sequences

    def _sequence(
        self,
        request_id: str,
        index: int,
        request: GenerationRequest,
        prompt: Sequence[int],
        seed: int,
        now: float,
        deadline: float | None,
        parent: Request | None,
    ) -> Request:
        params = request.params
        number = next(self._numbers)
        decoder = self._make_decoder(prompt, params.skip_special_tokens)
        room = self.limits.max_model_len - len(prompt)
        sequence = Request(
            request_id=request_id,
            index=index,
            tokens=list(prompt),
            num_prompt_tokens=len(prompt),
            params=params,
            max_tokens=room if params.max_tokens is None else params.max_tokens,
            seed=sequence_seed(seed, index),
            priority=request.priority,
            arrival_seconds=now,
            sequence_number=number,
            deadline_seconds=deadline,
            text=TextStream(decoder, params.stop, params.include_stop),
            end_tokens=self.limits.end_tokens,
            parent=parent,
            state=RequestState.WAITING if parent is None else RequestState.HELD,
        )
        sequence.key = self._key(sequence)
        return sequence

    def _key(self, request: Request, scheduler: Scheduler | None = None) -> tuple[object, ...]:
        return (scheduler or self.scheduler).key(
            RequestFacts(
                request.name,
                request.arrival_seconds,
                request.sequence_number,
                request.priority,
                request.num_prompt_tokens,
            )
        )

    def cancel(self, request_id: str) -> list[Chunk]:
        """End every sequence of a request that is still under way. Unknown ids are ignored: it may just have ended."""
        return self._end_all(request_id, FinishReason.CANCELLED)

    def cancel_all(self) -> list[Chunk]:
        """End everything as cancelled, because the loop stops."""
        return [chunk for request_id in list(self._sequences) for chunk in self.cancel(request_id)]

    def fail_all(self, message: str) -> list[Chunk]:
        """End everything with an error, after the loop itself has failed."""
        ids = list(self._sequences)
        return [chunk for request_id in ids for chunk in self._end_all(request_id, FinishReason.ERROR, message)]

    def prompt_info(self, sequences: Sequence[Request]) -> PromptInfo:
        """What is known of a request's prompt; complete once its first token is there."""
        first = sequences[0]
        wanted = first.params.prompt_logprobs is not None
        return PromptInfo(
            tuple(first.tokens[: first.num_prompt_tokens]),
            tuple(first.prompt_logprobs) if wanted else None,
            first.num_cached_tokens or 0,
        )

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences without blocks, those that wait for a sibling's prompt included."""
        return len(self._waiting) + self._num_held

    @property
    def has_work(self) -> bool:
        return bool(self._sequences) or self._flying is not None

    @property
    def is_settled(self) -> bool:
        """Whether no step is under way; see :meth:`settle`."""
        return self._flying is None

    def close(self) -> None:
        """No step comes any more; what one that runs would give is dropped."""
        self._flying = None
        self._lane.close()

    # --- the step --------------------------------------------------------------------------------------------------

    def step(self) -> list[Chunk]:
        """Advance every scheduled request once; returns what they gave. Never raises for one request's fault."""
        self._step_clock.start()
        self._step_started = self._clock()
        chunks = self._expire(self._step_started)
        flight, self._flying = self._flying or self._launch(), None
        if flight is None:
            return chunks
        if self._may_run_ahead(flight):
            self._flying = self._launch(behind=flight)
        return chunks + self._collect(flight)

    def settle(self) -> list[Chunk]:
        """Collect the step that runs, if one does, and launch no other; returns what it gave."""
        flight, self._flying = self._flying, None
        if flight is None:
            return []
        self._step_clock.start()
        self._step_started = self._clock()
        return self._collect(flight)

    def _may_run_ahead(self, flight: Flight) -> bool:
        """Whether nothing but its tokens is needed of a step that runs to launch the next one behind it."""
        return (
            self._overlaps
            and self.probation is None
            and flight.inputs is not None
            and flight.sampling.is_on_device
            and not flight.inputs.prompt_rows
        )

    def _launch(self, behind: Flight | None = None) -> Flight | None:
        """Plan the next step and set it going; None when there is nothing to compute.

        behind: the step that runs, if one does; the tokens that it will choose are counted as if they were there.
        """
        try:
            scheduled = self._plan(is_ahead=behind is not None)
        except Exception as error:  # a scheduler's code; fatal unless there is another to go back to
            if self.probation is None:
                raise
            self._roll_back(f"{type(error).__name__}: {error}")
            return None
        self._step_clock.mark(Phase.SCHEDULE)
        if not scheduled:
            return None
        flight = self._start(scheduled, behind)
        for item in scheduled:
            item.request.num_computed += item.num_tokens
            item.request.num_expected += item.gives_token
        self._step_clock.mark(Phase.MODEL)
        return flight

    def _start(self, scheduled: list[Scheduled], behind: Flight | None) -> Flight:
        """Pack a planned step and hand it to the lane."""
        copies = self.kv.take_copies()
        try:
            inputs = self.runner.prepare(scheduled, self.kv, behind.sampling.requests if behind is not None else ())
            sampling = self._sampler.plan(inputs.sampling)
        except Exception as error:  # memory that is not there; told when the step is collected, like the model's own
            return Flight(scheduled, None, SamplingPlan.empty(), Outcome.failed(error))
        self._step_clock.mark(Phase.PREPARE)
        return Flight(scheduled, inputs, sampling, self._lane.run(lambda: self._run(inputs, sampling, copies, behind)))

    def _run(self, inputs: StepInputs, sampling: SamplingPlan, copies: Copies, behind: Flight | None) -> Ran:
        """The step itself, in the lane. It reads nothing that the engine's thread may change meanwhile."""
        began = time.perf_counter()
        with torch.inference_mode():
            self.runner.copy_blocks(self.kv, copies)
            if inputs.unknown is not None:
                assert behind is not None
                chosen = behind.outcome.wait().choice
                assert chosen is not None
                places, sources = inputs.unknown.unbind()
                inputs.ids_T.index_copy_(0, places, chosen.token_S.index_select(0, sources))
            logits_NV = self.runner.forward(inputs)
            ended = time.perf_counter()
            is_chosen_here = self._overlaps and sampling.requests and sampling.is_on_device
            choice = self._sampler.choose(logits_NV, sampling) if is_chosen_here else None
            return Ran(logits_NV, choice, (began, ended))

    def _collect(self, flight: Flight) -> list[Chunk]:
        """Wait for a step, read its tokens, and advance its requests."""
        try:
            with torch.inference_mode():
                ran = flight.outcome.wait()
                assert flight.inputs is not None
                self._step_clock.mark(Phase.MODEL)
                sampled = self._sample(flight.sampling, ran)
                if self.probation is not None and not all(sampled.is_sound):
                    raise FloatingPointError("the model's scores are not finite")
                self._score_prompts(flight.inputs, ran.logits_NV)
        except Exception as error:  # a plugin's code; its requests end with the error, others go on
            if self.probation is None:
                return self._fail_step(flight, error)
            self._take_back(flight)
            self._roll_back(f"{type(error).__name__}: {error}")
            return []
        self._step_clock.mark(Phase.SAMPLE)
        chunks = self._advance(flight, sampled)
        self._step_clock.mark(Phase.OUTPUT)
        self._note_step(flight, ran)
        return chunks

    def _sample(self, plan: SamplingPlan, ran: Ran) -> Sampled:
        if not plan.requests:
            return Sampled([], [], [])
        choice = ran.choice or self._sampler.choose(ran.logits_NV[: len(plan.requests)], plan)
        return self._sampler.read(choice, plan)

    def _take_back(self, flight: Flight) -> None:
        """A launched step gave nothing: what was counted on is not there. Its requests are as before the launch."""
        for item in flight.scheduled:
            item.request.num_expected -= item.gives_token
            if item.request.blocks is item.blocks:
                item.request.num_computed = item.begin

    def _expire(self, now: float) -> list[Chunk]:
        chunks: list[Chunk] = []
        while self._deadlines and self._deadlines[0][0] <= now:
            _, request_id = heapq.heappop(self._deadlines)
            deadline = self._sequences[request_id][0].deadline_seconds if request_id in self._sequences else None
            # The id may have ended and come back: then this deadline was another request's.
            if deadline is not None and deadline <= now:
                chunks += self._end_all(request_id, FinishReason.TIMEOUT)
        return chunks

    def _plan(self, *, is_ahead: bool = False) -> list[Scheduled]:
        """Ask the scheduler, then give blocks in its order.

        is_ahead: a step still runs. What it frees, and whom it ends, is not known yet, so nobody gives way: where
                  blocks are short nothing is planned, and the plan is made again once that step is collected.
        """
        if not self._running and not self._waiting:
            return []
        running = self._running_in_order()
        view = View([request.candidate() for request in running], self._waiting.peek_in_order(self._newcomer))
        try:
            plan = self.scheduler.plan(view)
            self._check_plan(plan)
            for name in plan.preempt:
                self._preempt(self._running[name])
            scheduled = self._give_blocks(plan.grants, is_ahead)
        finally:
            self._waiting.put_back()
        if not scheduled and not is_ahead and len(self._running) == len(running):
            # Nothing has changed, so the next plan would be the same, for ever.
            raise EngineError(
                f"scheduler {type(self.scheduler).__name__} made a plan that computes nothing: it grants waiting "
                "requests only, and they find too few blocks",
                hint="Grant running requests before waiting ones.",
            )
        return scheduled

    def _running_in_order(self) -> list[Request]:
        """What runs, by key; ordered anew only when somebody came or went."""
        if self._in_order is None:
            self._in_order = sorted(self._running.values(), key=lambda request: request.key)
        return self._in_order

    def _newcomer(self, request: Request) -> Candidate:
        """A waiting request as the scheduler sees it: what the cache holds already costs none of the step's tokens."""
        return Candidate(request.name, request.key, len(request.tokens) - self._num_reusable(request))

    def _check_plan(self, plan: StepPlan) -> None:
        limits = self.scheduler.limits()
        names = [grant.request_id for grant in plan.grants]
        total = sum(grant.num_tokens for grant in plan.grants)
        problem = None
        if len(set(names)) != len(names):
            problem = "a request is granted twice"
        elif len({*names, *plan.preempt}) != len(names) + len(plan.preempt):
            problem = "a request is preempted twice, or preempted and granted at once"
        elif any(grant.num_tokens < 1 for grant in plan.grants):
            problem = "a grant of less than one token"
        elif total > limits.max_batched_tokens:
            problem = f"{total} tokens are granted, over max_batched_tokens {limits.max_batched_tokens}"
        elif not plan.grants:
            problem = "nothing is granted although requests are there"
        elif any(name not in self._running for name in plan.preempt):
            problem = "a request is preempted that does not run"
        elif any(name not in self._running and name not in self._waiting for name in names):
            problem = "a request is granted that neither runs nor waits"
        else:
            newcomers = sum(name in self._waiting for name in names)
            if len(self._running) - len(plan.preempt) + newcomers > limits.max_running:
                problem = f"more than max_running {limits.max_running} requests would run"
        if problem:
            raise EngineError(f"scheduler {type(self.scheduler).__name__} made an impossible plan: {problem}")

    def _give_blocks(self, grants: Sequence[Grant], is_ahead: bool) -> list[Scheduled]:
        scheduled: dict[str, Scheduled] = {}
        was_running = set(self._running)
        is_admitting = True
        for grant in grants:
            request = self._running.get(grant.request_id)
            if request is not None:
                if is_ahead and request.is_at_its_last:
                    continue  # the token that is still to come ends it
                num_running = len(self._running)
                num_tokens = min(grant.num_tokens, request.pending_tokens)
                assert request.blocks is not None
                if is_ahead and not self.kv.extend(request.blocks, request.num_computed, num_tokens):
                    return []
                if self._make_room(request, num_tokens, scheduled):
                    scheduled[request.name] = Scheduled.of(request, num_tokens)
                # Blocks that someone gave up are not for a newcomer: it would be the next to give them up.
                is_admitting = is_admitting and len(self._running) == num_running
                continue
            waiting = self._waiting.get(grant.request_id)
            if waiting is None or grant.request_id in was_running or not is_admitting:
                continue  # it gave way a moment ago, or one before it found too few blocks
            tokens = self._admit(waiting, grant.num_tokens)
            if tokens > 0:
                scheduled[waiting.name] = Scheduled.of(waiting, tokens)
            is_admitting = tokens > 0
        return list(scheduled.values())

    def _make_room(self, request: Request, num_tokens: int, scheduled: dict[str, Scheduled]) -> bool:
        """Blocks for a running request; the one last in order gives way, be it the request itself."""
        assert request.blocks is not None
        while not self.kv.extend(request.blocks, request.num_computed, num_tokens):
            last = max(self._running.values(), key=lambda other: other.key)
            scheduled.pop(last.name, None)
            self._preempt(last)
            if last is request:
                return False
        return True

    def _admit(self, request: Request, num_tokens: int) -> int:
        """Let a waiting request run if its first tokens find blocks; returns how many tokens it may compute."""
        blocks = self.kv.open()
        computed = self._reuse(request, blocks)
        num_tokens = min(num_tokens, len(request.tokens) - computed)
        if not self.kv.extend(blocks, computed, num_tokens):
            self.kv.close(blocks)
            return 0
        self._waiting.remove(request)
        request.blocks = blocks
        request.num_computed = request.num_landed = computed
        if request.num_cached_tokens is None:
            request.num_cached_tokens = min(computed, request.num_prompt_tokens)
            self.metrics.prompt_looked_up(request.num_prompt_tokens, request.num_cached_tokens)
            self.metrics.queue_seconds(self._clock() - request.arrival_seconds)
        self._move(request, RequestState.RUNNING)
        self._running[request.name] = request
        self._in_order = None
        return num_tokens

    def _reuse(self, request: Request, blocks: SequenceBlocks) -> int:
        """Start from a sibling's blocks or from the prefix cache; returns the tokens that need no computing."""
        if request.wants_prompt_logprobs:
            return 0  # every prompt position has to be computed to be scored
        parent = self._forkable_parent(request)
        if parent is not None:
            self.kv.fork(parent, blocks, request.num_prompt_tokens)
            return request.num_prompt_tokens - 1
        return self.kv.adopt_prefix(blocks, request.tokens, request.hashes)

    def _num_reusable(self, request: Request) -> int:
        """What :meth:`_reuse` would return. Changes nothing."""
        if request.wants_prompt_logprobs:
            return 0
        if self._forkable_parent(request) is not None:
            return request.num_prompt_tokens - 1
        return self.kv.num_cached(request.tokens, request.hashes)

    def _forkable_parent(self, request: Request) -> SequenceBlocks | None:
        """The blocks of the first of n sequences, while they still hold the whole prompt that the others start from."""
        parent, length = request.parent, request.num_prompt_tokens
        if parent is None or parent.blocks is None or parent.num_landed < length or len(request.tokens) > length:
            return None
        return parent.blocks if self.kv.can_fork(parent.blocks, length - 1) else None

    def _preempt(self, request: Request) -> None:
        """Take a running request's blocks; it waits in its old place and computes again what it lost."""
        self._release_blocks(request)
        self._move(request, RequestState.PREEMPTED)
        self._waiting.push(request)
        self.metrics.preempted()

    # --- after the model -------------------------------------------------------------------------------------------

    def _score_prompts(self, inputs: StepInputs, logits_NV: torch.Tensor) -> None:
        for request, row, position, count in inputs.prompt_rows:
            if not request.prompt_logprobs:
                request.prompt_logprobs.append(None)
            if position + 1 < len(request.prompt_logprobs):
                # Computed again after a preemption: these positions have been scored.
                done = len(request.prompt_logprobs) - position - 1
                row, position, count = row + done, position + done, count - done
            if count > 0:
                tokens = request.tokens[position + 1 : position + 1 + count]
                most = request.params.prompt_logprobs or 0
                request.prompt_logprobs += token_logprobs(logits_NV[row : row + count], tokens, most)

    def _advance(self, flight: Flight, sampled: Sampled) -> list[Chunk]:
        for item in flight.scheduled:
            request = item.request
            request.num_expected -= item.gives_token
            if request.blocks is not item.blocks:
                continue  # it ended, or gave way, while the step ran
            request.num_landed = item.begin + item.num_tokens
            names = None if request.has_mixed_cache else request.hashes
            self.kv.computed(item.blocks, request.tokens, names, item.begin, request.num_landed)
        chunks: list[Chunk] = []
        now = self._clock()
        gaps: dict[float, int] = {}
        for row, request in enumerate(flight.sampling.requests):
            if request.is_finished:
                continue  # a step that was launched before its end was known
            if request.num_prompt_tokens == 1 and request.wants_prompt_logprobs:
                request.prompt_logprobs.append(None)
            if request.request_id in self._held:
                self._release_held(request)
            if not sampled.is_sound[row]:
                message = "the model's scores are not finite (NaN or infinity); its weights or a kernel are at fault"
                chunks.append(self._end(request, FinishReason.ERROR, error=message))
                continue
            self._note_token(request, now, gaps)
            chunks.append(self._append_token(request, sampled.token_ids[row], sampled.logprobs[row]))
        for seconds, count in gaps.items():
            self.metrics.next_tokens(seconds, count)
        return chunks

    def _append_token(self, request: Request, token: int, logprob: TokenLogprob | None) -> Chunk:
        """The new token's effect: text, and perhaps the sequence's end."""
        request.tokens.append(token)
        logprobs = (logprob,) if logprob is not None else None
        may_stop = request.num_output_tokens > request.params.min_tokens
        is_end = token in request.end_tokens and not request.params.ignore_eos
        if may_stop and (is_end or token in request.params.stop_token_ids):
            # An end token is no text; what was held back before it is.
            return self._end(
                request, FinishReason.STOP, token=token, logprobs=logprobs, stop_reason=None if is_end else token
            )
        try:
            text = request.text.push((token,), may_stop=may_stop)
        except Exception as error:  # a tokenizer's code; only this sequence ends with the error
            message = _decoding_failed(request, error)
            return self._end(request, FinishReason.ERROR, token=token, logprobs=logprobs, error=message)
        if request.text.stopped_by is not None:
            stop = request.text.stopped_by
            return self._end(request, FinishReason.STOP, text=text, token=token, logprobs=logprobs, stop_reason=stop)
        if request.num_output_tokens >= request.max_tokens:
            return self._end(request, FinishReason.LENGTH, text=text, token=token, logprobs=logprobs)
        return Chunk(request.request_id, request.index, text, (token,), logprobs, epoch=self.epoch)

    def _end(
        self,
        request: Request,
        reason: FinishReason,
        *,
        text: str = "",
        token: int | None = None,
        logprobs: tuple[TokenLogprob, ...] | None = None,
        stop_reason: str | int | None = None,
        error: str | None = None,
    ) -> Chunk:
        """Every way out of the engine: free what the sequence holds, and say why it ended."""
        if reason is not FinishReason.ERROR:
            try:
                text += request.text.flush()
            except Exception as fault:  # a tokenizer's code; it must not keep the sequence from ending
                reason, error = FinishReason.ERROR, _decoding_failed(request, fault)
        if reason is FinishReason.ERROR:
            self._scrub(request)
        self._take_away(request)
        self._move(request, RequestState.FINISHED)
        request.finish_reason, request.stop_reason = reason, stop_reason
        self._release_held(request)
        self._sampler.forget(request)
        siblings = self._sequences[request.request_id]
        if all(sibling.is_finished for sibling in siblings):
            del self._sequences[request.request_id]
        self.metrics.request_finished(reason, self._clock() - request.arrival_seconds)
        tokens = () if token is None else (token,)
        return Chunk(request.request_id, request.index, text, tokens, logprobs, reason, stop_reason, error, self.epoch)

    def _end_all(self, request_id: str, reason: FinishReason, error: str | None = None) -> list[Chunk]:
        # Held siblings first: ending the parent would otherwise let them go and wait.
        sequences = reversed(self._sequences.get(request_id, []))
        return [self._end(sequence, reason, error=error) for sequence in list(sequences) if not sequence.is_finished]

    def _fail_step(self, flight: Flight, error: Exception) -> list[Chunk]:
        """A step broke: what it worked on ends with the error; everything else is untouched."""
        _log.error("a step failed with %s: %s", type(error).__name__, error, exc_info=error)
        self.metrics.step_failed()
        behind, self._flying = self._flying, None
        for launched in (behind, flight):
            if launched is not None:
                self._take_back(launched)
        message = f"the engine failed while it worked on this request: {type(error).__name__}: {error}"
        ids = dict.fromkeys(item.request.request_id for item in flight.scheduled)
        return [chunk for request_id in ids for chunk in self._end_all(request_id, FinishReason.ERROR, message)]

    # --- exchanging parts (the transaction is in swap.py) ----------------------------------------------------------

    def exchange(self, scheduler: Scheduler, kv: KVManager) -> None:
        """Use another scheduler or other books from the next step on. Nothing has changed when it raises.

        Other books need requests that hold nothing: :meth:`preempt_all` first.
        """
        sequences = [sequence for siblings in self._sequences.values() for sequence in siblings]
        if scheduler is not self.scheduler:
            kv.make_rows(scheduler.limits().max_running)
            self.runner.reserve(kv, scheduler.limits().max_batched_tokens, scheduler.limits().max_running)
            keys = [self._key(sequence, scheduler) for sequence in sequences]
            for sequence, key in zip(sequences, keys, strict=True):
                sequence.key = key
            self.scheduler = scheduler
            self._waiting.rekey(lambda request: request.key)
            by_key = sorted(self._running.values(), key=lambda request: request.key)
            for request in by_key[scheduler.limits().max_running :]:
                self._preempt(request)
        if kv is not self.kv:
            self.kv = kv
            for sequence in sequences:
                sequence.hashes = []  # names of blocks of another size or contract

    @property
    def draw(self) -> Callable[..., torch.Tensor] | None:
        """The kernel that draws tokens; None for torch's own operations. Settable between two steps."""
        return self._sampler.kernel

    @draw.setter
    def draw(self, kernel: Callable[..., torch.Tensor] | None) -> None:
        self._sampler.kernel = kernel

    def notify(self, hook: str, **arguments: object) -> None:
        """Tell the observers of something that happened around the engine."""
        self._observers.notify(hook, **arguments)

    def preempt_all(self) -> int:
        """Take the blocks of every running request; returns how many there were."""
        running = list(self._running.values())
        for request in running:
            self._preempt(request)
        return len(running)

    def drop_prefixes(self) -> None:
        """Forget every cached prefix: other weights would give other keys and values. What runs keeps its own."""
        self.kv.forget_prefixes()
        for request in self._running.values():
            request.has_mixed_cache = True

    def recompute_all(self) -> None:
        """Distrust every key and value there is; what runs is computed anew."""
        self.kv.take_copies()
        for request in self._running.values():
            self._scrub(request)
        self.kv.forget_prefixes()
        self.preempt_all()

    def end_probation(self) -> None:
        """What was exchanged stays, unless the swap has been given up."""
        if self.probation is None:
            return
        if not self.probation.keep():
            self._roll_back("it was given up")
            return
        probation, self.probation = self.probation, None
        probation.finish(None)

    def _watch(self, seconds: float) -> None:
        assert self.probation is not None
        self.probation.steps_left -= 1
        if seconds > self.settings.stall_seconds:
            self._roll_back(f"a step took {seconds:.1f} s, over stall_seconds {self.settings.stall_seconds:g}")
        elif self.probation.steps_left <= 0 or self.probation.is_withdrawn():
            self.end_probation()

    def _roll_back(self, reason: str) -> None:
        """The new parts failed: the old ones come back. The step that showed it has given nothing; it runs again."""
        _log.warning("a swap is rolled back: %s", reason)
        probation, self.probation = self.probation, None
        assert probation is not None
        probation.roll_back()
        probation.finish(reason)

    def _scrub(self, request: Request) -> None:
        """What a sequence holds may not be numbers: nobody may find it, and nobody may inherit it."""
        if request.blocks is None:
            return
        try:
            own = self.kv.distrust(request.blocks)
            self._lane.run(lambda: self.runner.clear_blocks(self.kv, own)).wait()
        except Exception as error:  # the backend's code, in a sequence that ends with an error anyway
            _log.error("blocks of %s could not be cleared", request.name, exc_info=error)

    # --- small moves -----------------------------------------------------------------------------------------------

    def _take_away(self, request: Request) -> None:
        """Take a sequence that ends from wherever it is."""
        if request.state is RequestState.RUNNING:
            self._release_blocks(request)
        elif request.state is RequestState.HELD:
            self._held[request.request_id].remove(request)
            self._num_held -= 1
            if not self._held[request.request_id]:
                del self._held[request.request_id]
        else:
            self._waiting.remove(request)

    def _release_blocks(self, request: Request) -> None:
        assert request.blocks is not None
        self.kv.close(request.blocks)
        request.blocks = None
        request.num_computed = request.num_landed = 0
        request.has_mixed_cache = False
        del self._running[request.name]
        self._in_order = None

    def _release_held(self, parent: Request) -> None:
        """The prompt is computed, or never will be: siblings that waited for it join the queue."""
        if parent.index == 0:
            for sibling in self._held.pop(parent.request_id, ()):
                self._num_held -= 1
                self._move(sibling, RequestState.WAITING)
                self._waiting.push(sibling)

    def _move(self, request: Request, state: RequestState) -> None:
        old = request.state
        request.move(state)
        if self._tells_states:
            self._observers.notify("request_changed_state", request=request, old=old, new=state)

    def _note_token(self, request: Request, now: float, gaps: dict[float, int]) -> None:
        """gaps: seconds between two tokens -> how many sequences had them; equal for nearly all of a step."""
        if request.first_token_seconds is None:
            request.first_token_seconds = now - request.arrival_seconds
            self.metrics.first_token(request.first_token_seconds)
        elif request.last_token_seconds is not None:
            gap = now - request.last_token_seconds
            gaps[gap] = gaps.get(gap, 0) + 1
        request.last_token_seconds = now

    def _note_step(self, flight: Flight, ran: Ran) -> None:
        num_tokens = sum(item.num_tokens for item in flight.scheduled)
        levels = self.num_running, self.num_waiting, self.kv.usage
        self.metrics.step(self._step_clock.seconds, num_tokens, *levels, self._step_clock.totals)
        if self._tells_steps:
            timing = self._step_clock.timing(num_tokens, *levels, ran.seconds)
            self._observers.notify(
                "step_done",
                seconds=timing.seconds,
                num_tokens=num_tokens,
                num_running=timing.num_running,
                timing=timing,
            )
        if self.probation is not None:
            self._watch(self._clock() - self._step_started)


def overlaps(setting: str, device: torch.device) -> bool:
    """Whether the next step is prepared while one runs: always pays where the device queues its work.

    On a CPU the two would share its cores; docs/log.md has the measurement.
    """
    return setting == "on" or (setting == "auto" and device.type != "cpu")


def _decoding_failed(request: Request, error: Exception) -> str:
    _log.error("the text of %s could not be decoded", request.name, exc_info=error)
    return f"the tokens could not be turned into text: {type(error).__name__}: {error}"
