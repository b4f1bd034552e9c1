"""The serving loop: takes requests, runs one step at a time, gives out chunks. One thread; no locks, no sockets.

A step, in the order it reads:

    expire -> launch (plan: the scheduler decides, blocks are given; prepare; run the model)
           -> collect (sample, read the tokens, advance)

``advance`` is where requests change: tokens are appended, text comes out, sequences end. Where each of them is, the
roster knows; what a step computes, the planner decides with the scheduler.

The plain loop launches a step and collects it. The overlapped loop launches the next step before it collects the one
that runs, whose tokens it takes on the device: what the next step needs is packed while the model computes. Both give
the same tokens; where the next step depends on more than the tokens, the overlapped loop does as the plain one does.
"""

from __future__ import annotations

import itertools
import logging
import secrets
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from drivetrain.config import EngineSettings
from drivetrain.contracts.scheduler import Scheduler
from drivetrain.errors import InvalidRequestError, PromptTooLongError
from drivetrain.observers import Observers
from drivetrain.serving.blocks import KVManager
from drivetrain.serving.lane import InlineLane, Lane, Outcome, ThreadLane
from drivetrain.serving.metrics import EngineMetrics
from drivetrain.serving.packing import Scheduled, StepInputs
from drivetrain.serving.planner import StepPlanner
from drivetrain.serving.request import Request, RequestState, Untold
from drivetrain.serving.roster import Roster
from drivetrain.serving.runner import Copies, ModelRunner
from drivetrain.serving.sampler import Choice, MostLikely, Sampled, Sampler, SamplingPlan, sequence_seed, token_logprobs
from drivetrain.serving.text import IncrementalDecoder, TextStream
from drivetrain.serving.timing import Phase, StepClock
from drivetrain.serving.types import Chunk, FinishReason, GenerationRequest, PromptInfo, TokenLogprob

_log = logging.getLogger("drivetrain")

_TOKENS_AT_ONCE = 32
"""Tokens of a sequence that are told of at a time where somebody waits for all of them: what a chunk costs, from the
engine to its reader, is spread over so many. Text of many more, of all sequences at once, would outlast a step."""

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
    """What a step's run gave: scores [N, V] of the wanted rows, or the best of each where those are enough, and the
    tokens if they were chosen right behind it.

    seconds: begin and end of the run by ``time.perf_counter``.
    """

    scores: torch.Tensor | MostLikely
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

    roster:    where every sequence is.
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
        self.limits = limits
        self.settings = settings
        self.metrics = metrics or EngineMetrics()
        self._make_decoder = make_decoder
        self._observers = observers or Observers(installed=False)
        self._clock = clock
        self.roster = Roster(kv, scheduler, self.metrics, self._observers)
        self._planner = StepPlanner(self.roster, self.metrics, clock)
        self._sampler = Sampler(limits.vocab_size, runner.device, draw)
        self._numbers = itertools.count()
        self.epoch = 0
        self.probation: Probation | None = None
        self._overlaps = overlaps(settings.overlap, runner.device)
        self._lane: Lane = ThreadLane() if self._overlaps and runner.device.type == "cpu" else InlineLane()
        self._flying: Flight | None = None
        self._step_clock = StepClock()
        self._step_started = clock()
        runner.on_fallback = self.metrics.fell_back
        runner.reserve(kv, scheduler.limits().max_batched_tokens, scheduler.limits().max_running)
        self._tells_steps = self._observers.listens("step_done")

    @property
    def kv(self) -> KVManager:
        """The books of the cache in use."""
        return self.roster.kv

    @property
    def scheduler(self) -> Scheduler:
        """The scheduler in use."""
        return self.roster.scheduler

    # --- requests in and out ---------------------------------------------------------------------------------------

    def check(self, request: GenerationRequest, prompt: Sequence[int]) -> None:
        """Raise a RequestError when the engine could never serve this. Changes nothing; any thread may call it."""
        params = request.params
        if not prompt:
            raise InvalidRequestError("the prompt is empty", param="prompt", hint="Send at least one token.")
        room = self.limits.max_model_len - len(prompt)
        if room < 1:
            raise PromptTooLongError(
                f"the prompt has {len(prompt)} tokens; with at least one new token this model takes "
                f"{self.limits.max_model_len}",
                param="prompt",
                hint="Shorten the prompt.",
            )
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
        if request_id in self.roster:
            raise InvalidRequestError("a request with this id is under way", param="request_id", found=request_id)
        now = self._clock() if arrival_seconds is None else arrival_seconds
        timeouts = [t for t in (request.timeout_seconds, self.settings.timeout_seconds) if t is not None]
        deadline = now + min(timeouts) if timeouts else None
        seed = request.params.seed if request.params.seed is not None else secrets.randbits(63)
        sequences: list[Request] = []
        for index in range(request.params.n):
            parent = sequences[0] if sequences else None
            sequences.append(self._sequence(request_id, index, request, prompt, seed, now, deadline, parent))
        self.roster.add(sequences, deadline)
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
            chunk_tokens=1 if request.is_streamed or params.stop else _TOKENS_AT_ONCE,
            state=RequestState.WAITING if parent is None else RequestState.HELD,
        )
        sequence.key = self.roster.key(sequence)
        return sequence

    def cancel(self, request_id: str) -> list[Chunk]:
        """End every sequence of a request that is still under way. Unknown ids are ignored: it may just have ended."""
        return self._end_all(request_id, FinishReason.CANCELLED)

    def cancel_all(self) -> list[Chunk]:
        """End everything as cancelled, because the loop stops."""
        return [chunk for request_id in self.roster.request_ids for chunk in self.cancel(request_id)]

    def fail_all(self, message: str) -> list[Chunk]:
        """End everything with an error, after the loop itself has failed."""
        ids = self.roster.request_ids
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
        return len(self.roster.running)

    @property
    def num_waiting(self) -> int:
        """Sequences without blocks, those that wait for a sibling's prompt included."""
        return self.roster.num_waiting

    @property
    def has_work(self) -> bool:
        return bool(self.roster) or self._flying is not None

    @property
    def is_settled(self) -> bool:
        """Whether no step is under way; see :meth:`settle`."""
        return self._flying is None

    def close(self) -> None:
        """No step comes any more; what one that runs would give is dropped, once it has run (or is stalled)."""
        self._flying = None
        self._lane.close(self.settings.stall_seconds)

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
            scheduled = self._planner.plan(is_ahead=behind is not None)
        except Exception as error:  # a scheduler's code; fatal unless there is another to go back to
            if self.probation is None:
                raise
            self._roll_back(f"{type(error).__name__}: {error}")
            return None
        self._step_clock.mark(Phase.SCHEDULE)
        if not scheduled:
            return None
        flight = self._start(scheduled, behind)
        for request, num_tokens, _, gives_token, _ in scheduled:
            request.num_computed += num_tokens
            request.num_expected += gives_token
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
            is_best_enough = sampling.wants_best_only and not inputs.prompt_rows
            scores = self.runner.choose(inputs) if is_best_enough else self.runner.forward(inputs)
            ended = time.perf_counter()
            is_chosen_here = self._overlaps and sampling.requests and sampling.is_on_device
            choice = self._sampler.choose(scores, sampling) if is_chosen_here else None
            return Ran(scores, choice, (began, ended))

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
                if not isinstance(ran.scores, MostLikely):
                    self._score_prompts(flight.inputs, ran.scores)
        except Exception as error:  # a plugin's code; its requests end with the error, others go on
            if self.probation is None:
                return self._fail_step(flight, error)
            traceback.clear_frames(error.__traceback__)  # they hold the cache, which the old one may have to replace
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
        scores = ran.scores if isinstance(ran.scores, MostLikely) else ran.scores[: len(plan.requests)]
        choice = ran.choice or self._sampler.choose(scores, plan)
        return self._sampler.read(choice, plan)

    def _take_back(self, flight: Flight) -> None:
        """A launched step gave nothing: what was counted on is not there. Its requests are as before the launch."""
        for item in flight.scheduled:
            item.request.num_expected -= item.gives_token
            if item.request.blocks is item.blocks:
                item.request.num_computed = item.begin

    def _expire(self, now: float) -> list[Chunk]:
        expired = self.roster.expired(now)
        return [chunk for request_id in expired for chunk in self._end_all(request_id, FinishReason.TIMEOUT)]

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
        kv = self.kv
        for request, num_tokens, begin, gives_token, blocks in flight.scheduled:
            request.num_expected -= gives_token
            if request.blocks is not blocks:
                continue  # it ended, or gave way, while the step ran
            request.num_landed = begin + num_tokens
            names = None if request.has_mixed_cache else request.hashes
            kv.computed(blocks, request.tokens, names, begin, begin + num_tokens)
        chunks: list[Chunk] = []
        now = self._clock()
        gaps: dict[float, int] = {}
        for row, request in enumerate(flight.sampling.requests):
            if request.is_finished:
                continue  # a step that was launched before its end was known
            if request.num_prompt_tokens == 1 and request.wants_prompt_logprobs:
                request.prompt_logprobs.append(None)
            if request.request_id in self.roster.held:
                self.roster.release_held(request)
            if not sampled.is_sound[row]:
                message = "the model's scores are not finite (NaN or infinity); its weights or a kernel are at fault"
                chunks += self._end(request, FinishReason.ERROR, error=message)
                continue
            self._note_token(request, now, gaps)
            chunks += self._append_token(request, sampled.token_ids[row], sampled.logprobs[row])
        for seconds, count in gaps.items():
            self.metrics.next_tokens(seconds, count)
        return chunks

    def _append_token(self, request: Request, token: int, logprob: TokenLogprob | None) -> Sequence[Chunk]:
        """The new token's effect: text, and perhaps the sequence's end."""
        request.tokens.append(token)
        params, num_output = request.params, len(request.tokens) - request.num_prompt_tokens
        may_stop = num_output > params.min_tokens
        is_end = token in request.end_tokens and not params.ignore_eos
        if may_stop and (is_end or token in params.stop_token_ids):
            # An end token is no text; what was held back before it is.
            stop_reason = None if is_end else token
            return self._end(request, FinishReason.STOP, token=token, logprob=logprob, stop_reason=stop_reason)
        if request.chunk_tokens > 1 and num_output < request.max_tokens:
            return self._keep(request, token, logprob)
        told: Sequence[Chunk] = ()
        try:
            told = self._tell(request)
            text = request.text.push((token,), may_stop=may_stop)
        except Exception as error:  # a tokenizer's code; only this sequence ends with the error
            message = _decoding_failed(request, error)
            return [*told, *self._end(request, FinishReason.ERROR, token=token, logprob=logprob, error=message)]
        stop = request.text.stopped_by
        if stop is not None or num_output >= request.max_tokens:
            reason = FinishReason.LENGTH if stop is None else FinishReason.STOP
            return [*told, *self._end(request, reason, text=text, token=token, logprob=logprob, stop_reason=stop)]
        return (self._chunk(request, text, (token,), None if logprob is None else (logprob,)),)

    def _keep(self, request: Request, token: int, logprob: TokenLogprob | None) -> Sequence[Chunk]:
        """Put a token with others that nobody has been told of; tells when they are enough, or of another epoch."""
        told: Sequence[Chunk] = ()
        untold = request.untold
        try:
            if untold is not None and untold.epoch != self.epoch:
                told, untold = self._tell(request), None
            if untold is None:
                untold = request.untold = Untold(self.epoch)
            untold.token_ids.append(token)
            if logprob is not None:
                untold.logprobs.append(logprob)
            return told if len(untold.token_ids) < request.chunk_tokens else [*told, *self._tell(request)]
        except Exception as error:  # a tokenizer's code; only this sequence ends with the error
            return [*told, *self._end(request, FinishReason.ERROR, error=_decoding_failed(request, error))]

    def _tell(self, request: Request) -> Sequence[Chunk]:
        """A chunk of what nobody has been told of, if there is anything. Raises what the tokenizer raises."""
        untold, request.untold = request.untold, None
        if untold is None:
            return ()
        text = request.text.push(untold.token_ids)
        logprobs = tuple(untold.logprobs) if request.params.logprobs is not None else None
        return (self._chunk(request, text, tuple(untold.token_ids), logprobs, untold.epoch),)

    def _chunk(
        self,
        request: Request,
        text: str,
        tokens: tuple[int, ...],
        logprobs: tuple[TokenLogprob, ...] | None,
        epoch: int | None = None,
    ) -> Chunk:
        return Chunk(
            request.request_id, request.index, text, tokens, logprobs, epoch=self.epoch if epoch is None else epoch
        )

    def _end(
        self,
        request: Request,
        reason: FinishReason,
        *,
        text: str = "",
        token: int | None = None,
        logprob: TokenLogprob | None = None,
        stop_reason: str | int | None = None,
        error: str | None = None,
    ) -> list[Chunk]:
        """Every way out of the engine: free what the sequence holds, tell what was not told yet, and say why it
        ended."""
        told: Sequence[Chunk] = ()
        try:
            told = self._tell(request)
            if reason is not FinishReason.ERROR:
                text += request.text.flush()
        except Exception as fault:  # a tokenizer's code; it must not keep the sequence from ending
            reason, error = FinishReason.ERROR, _decoding_failed(request, fault)
        if reason is FinishReason.ERROR:
            self._scrub(request)
        self.roster.end(request)
        request.finish_reason, request.stop_reason = reason, stop_reason
        self._sampler.forget(request)
        self.metrics.request_finished(reason, self._clock() - request.arrival_seconds)
        tokens = () if token is None else (token,)
        logprobs = None if logprob is None else (logprob,)
        last = Chunk(request.request_id, request.index, text, tokens, logprobs, reason, stop_reason, error, self.epoch)
        return [*told, last]

    def _end_all(self, request_id: str, reason: FinishReason, error: str | None = None) -> list[Chunk]:
        # Held siblings first: ending the parent would otherwise let them go and wait.
        sequences = [one for one in reversed(self.roster.siblings(request_id)) if not one.is_finished]
        return [chunk for sequence in sequences for chunk in self._end(sequence, reason, error=error)]

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
        if scheduler is not self.scheduler:
            kv.allow(scheduler.limits().max_running)
            self.runner.reserve(kv, scheduler.limits().max_batched_tokens, scheduler.limits().max_running)
            self.roster.use_scheduler(scheduler)
        if kv is not self.kv:
            self.roster.use_kv(kv)

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
        return self.roster.preempt_all()

    def drop_prefixes(self) -> None:
        """Forget every cached prefix: other weights would give other keys and values. What runs keeps its own."""
        self.kv.forget_prefixes()
        for request in self.roster.running.values():
            request.has_mixed_cache = True

    def recompute_all(self) -> None:
        """Distrust every key and value there is; what runs is computed anew."""
        self.kv.take_copies()
        for request in self.roster.running.values():
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
        num_tokens = sum([item.num_tokens for item in flight.scheduled])
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
