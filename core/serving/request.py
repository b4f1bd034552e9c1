"""One sequence under way: its tokens, its place in the state machine, and what it holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import TYPE_CHECKING

from drivetrain.contracts.scheduler import Candidate, OrderKey
from drivetrain.errors import IllegalTransitionError
from drivetrain.serving.blocks import BlockHash, SequenceBlocks
from drivetrain.serving.types import FinishReason, SamplingParams, TokenLogprob

if TYPE_CHECKING:
    from drivetrain.serving.text import TextStream


class RequestState(StrEnum):
    """Where a sequence is in its life. Only the edges of ``_EDGES`` are legal."""

    HELD = "held"
    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


_EDGES = {
    RequestState.HELD: {RequestState.WAITING, RequestState.FINISHED},
    RequestState.WAITING: {RequestState.RUNNING, RequestState.FINISHED},
    RequestState.RUNNING: {RequestState.PREEMPTED, RequestState.FINISHED},
    RequestState.PREEMPTED: {RequestState.RUNNING, RequestState.FINISHED},
    RequestState.FINISHED: set(),
}


@dataclass
class Untold:
    """Tokens on their way to a chunk: their log-probabilities, where these are wanted, and the parts' epoch."""

    epoch: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)


@dataclass(eq=False)
class Request:
    """One sequence. A prompt with n > 1 becomes n of them with one ``request_id``.

    Set when it arrives:
        index:      which of the n.
        tokens:     prompt, then output.
        max_tokens: most output tokens, the context's end included.
        seed:       of its random draws.
        parent:     the first of the n, whose prompt blocks the others share; None for the first itself. Until the
                    parent has computed the prompt, the others are HELD.
        chunk_tokens: how many tokens are put together before somebody is told of them.
    Changed by the engine:
        num_computed:  leading tokens whose keys and values are in the cache, or will be when running steps are done.
        num_expected:  tokens that steps which still run will choose for it: not in ``tokens`` yet, but counted on.
        num_landed:    of the computed ones, those whose step has been collected: what others may start from.
        blocks, hashes: what it holds while it runs, and the names of its full blocks.
        untold:        tokens that no chunk has told of yet, those that end a sequence aside.
    """

    request_id: str
    index: int
    tokens: list[int]
    num_prompt_tokens: int
    params: SamplingParams
    max_tokens: int
    seed: int
    priority: int
    arrival_seconds: float
    sequence_number: int
    deadline_seconds: float | None
    text: TextStream
    end_tokens: frozenset[int]
    parent: Request | None = None
    chunk_tokens: int = 1
    key: OrderKey = ()

    state: RequestState = RequestState.WAITING
    num_computed: int = 0
    num_expected: int = 0
    num_landed: int = 0
    blocks: SequenceBlocks | None = None
    hashes: list[BlockHash] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    num_cached_tokens: int | None = None
    has_mixed_cache: bool = False
    first_token_seconds: float | None = None
    last_token_seconds: float | None = None
    untold: Untold | None = None
    _candidate: Candidate | None = field(default=None, repr=False)

    def move(self, state: RequestState) -> None:
        """Go to ``state``. Raises IllegalTransitionError when no edge leads there."""
        if state not in _EDGES[self.state]:
            raise IllegalTransitionError(
                f"request {self.request_id}[{self.index}] can't go from {self.state} to {state}",
                allowed=sorted(_EDGES[self.state]) or "nothing",
            )
        self.state = state

    @cached_property
    def name(self) -> str:
        """Unique among sequences: ``ID[index]``."""
        return f"{self.request_id}[{self.index}]"

    @cached_property
    def wants_most_likely(self) -> bool:
        """Whether nothing is ever wanted of its scores but the most likely token, as the model has them."""
        params = self.params
        changes_scores = params.has_penalty or bool(params.logit_bias) or params.min_tokens > 0
        return params.is_greedy and params.logprobs is None and not changes_scores

    @property
    def num_output_tokens(self) -> int:
        return len(self.tokens) - self.num_prompt_tokens

    @property
    def output_tokens(self) -> Sequence[int]:
        return self.tokens[self.num_prompt_tokens :]

    @property
    def pending_tokens(self) -> int:
        """Tokens whose keys and values are not computed yet, those counted that are still to be chosen."""
        return len(self.tokens) + self.num_expected - self.num_computed

    @property
    def is_at_its_last(self) -> bool:
        """Whether a token that is expected is sure to be the last one."""
        return len(self.tokens) - self.num_prompt_tokens + self.num_expected >= self.max_tokens

    @property
    def is_finished(self) -> bool:
        return self.state is RequestState.FINISHED

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether prompt positions still have to give their log-probabilities."""
        is_first = self.index == 0 and self.params.prompt_logprobs is not None
        return is_first and len(self.prompt_logprobs) < self.num_prompt_tokens

    def candidate(self) -> Candidate:
        """The request as the scheduler sees it; the same object for as long as nothing about it changes."""
        known, pending = self._candidate, len(self.tokens) + self.num_expected - self.num_computed
        if known is None or known.pending_tokens != pending or known.key is not self.key:
            known = self._candidate = Candidate(self.name, self.key, pending)
        return known
