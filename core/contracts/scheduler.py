"""Contract of a scheduler: which requests get how many tokens in the next step.

The engine owns the queues and the blocks; a scheduler only decides. It gives each request a key when it arrives (its
place in the order) and, before each step, a plan. The engine then walks the plan: it allocates KV blocks in that
order, preempts the running request with the *largest* key when a running one finds no block, and stops admitting when
a waiting one finds none.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from drivetrain.contracts.plugin import Plugin

OrderKey = tuple[Any, ...]
"""Sorts requests: smaller is served first. Comparable with every other key of the same scheduler, and never equal."""


@dataclass(frozen=True)
class RequestFacts:
    """What a scheduler knows of a request when it arrives.

    arrival_seconds:   monotonic clock.
    sequence_number:   rises by one with each request; breaks ties.
    priority:          the client's wish; smaller is more urgent, 0 is normal.
    num_prompt_tokens: length of the prompt.
    """

    request_id: str
    arrival_seconds: float
    sequence_number: int
    priority: int
    num_prompt_tokens: int


@dataclass(frozen=True)
class Candidate:
    """A request in the scheduler's view of one step.

    key:            as :meth:`Scheduler.key` gave it.
    pending_tokens: tokens whose keys and values are not computed yet: 1 while it decodes, the rest of the prompt
                    (and, after a preemption, of the output) while it prefills.
    """

    request_id: str
    key: OrderKey
    pending_tokens: int

    @cached_property
    def whole_grant(self) -> Grant:
        """The grant of all that is pending. Made once: a request that decodes is the same candidate in every step."""
        return Grant(self.request_id, self.pending_tokens)


@dataclass(frozen=True)
class View:
    """The engine's state before a step.

    running: requests that hold blocks, by key.
    waiting: requests that do not, by key, read lazily: take only as many as the plan can use.
    """

    running: Sequence[Candidate]
    waiting: Iterator[Candidate]


@dataclass(frozen=True)
class Grant:
    """``num_tokens`` (1 .. pending_tokens) of one request are computed in the next step."""

    request_id: str
    num_tokens: int


@dataclass(frozen=True)
class StepPlan:
    """What the next step does.

    grants:  in the order in which they get blocks; each request at most once, running requests before waiting ones,
             waiting ones in key order.
    preempt: running requests that give up their blocks and go back to waiting, before any grant.
    """

    grants: Sequence[Grant]
    preempt: Sequence[str] = ()


@dataclass(frozen=True)
class Limits:
    """What a scheduler promises to keep: the engine sizes its buffers by it and checks every plan against it.

    max_batched_tokens: most tokens in one step.
    max_running:        most requests that hold blocks at once.
    """

    max_batched_tokens: int
    max_running: int


class Scheduler(Plugin):
    """Decides order and tokens per request. Keeps no state that a fresh instance could not rebuild, so that a swap
    loses nothing.

    No request may wait for ever: for any request, only finitely many later arrivals may get a smaller key.
    """

    kind = "scheduler"

    @abstractmethod
    def limits(self) -> Limits:
        """The bounds of every plan. Pure."""

    @abstractmethod
    def key(self, request: RequestFacts) -> OrderKey:
        """The request's place in the order. Called once for each request, and again after a swap of the scheduler."""

    @abstractmethod
    def plan(self, view: View) -> StepPlan:
        """Decide the next step. Must grant something whenever a request is running or waiting."""
