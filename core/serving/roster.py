"""Where every sequence of the engine is: waiting, running with blocks, or held until its sibling's prompt is computed.

Whatever moves a sequence goes through here, so that these always agree: its state, the place that it is kept in, and
whether it holds blocks.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from drivetrain.contracts.scheduler import OrderKey, RequestFacts, Scheduler
from drivetrain.observers import Observers
from drivetrain.serving.blocks import KVManager, SequenceBlocks
from drivetrain.serving.metrics import EngineMetrics
from drivetrain.serving.request import Request, RequestState
from drivetrain.serving.waiting import WaitingQueue


class Roster:
    """All sequences that have not ended.

    kv:        the books of the blocks that running sequences hold.
    scheduler: gives the order of those that wait, and of those that run.
    waiting:   sequences without blocks that may run next.
    running:   name -> sequence that holds blocks.
    held:      request id -> siblings that wait for the prompt of the first.
    """

    def __init__(self, kv: KVManager, scheduler: Scheduler, metrics: EngineMetrics, observers: Observers) -> None:
        self.kv = kv
        self.scheduler = scheduler
        self.waiting = WaitingQueue()
        self.running: dict[str, Request] = {}
        self.held: dict[str, list[Request]] = {}
        self._num_held = 0  # counted along: the sum over all requests would grow with the queue
        self._siblings: dict[str, list[Request]] = {}
        self._deadlines: list[tuple[float, str]] = []
        self._in_order: list[Request] | None = None
        self._metrics = metrics
        self._observers = observers
        self._tells_states = observers.listens("request_changed_state")

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._siblings

    def __bool__(self) -> bool:
        return bool(self._siblings)

    def __iter__(self) -> Iterator[Request]:
        """Every sequence of every request that is under way, those of its siblings that have ended included."""
        return (sequence for siblings in self._siblings.values() for sequence in siblings)

    @property
    def request_ids(self) -> list[str]:
        return list(self._siblings)

    @property
    def num_waiting(self) -> int:
        """Sequences without blocks, those that wait for a sibling's prompt included."""
        return len(self.waiting) + self._num_held

    def siblings(self, request_id: str) -> list[Request]:
        """The n sequences of a request; none for one that is not under way."""
        return self._siblings.get(request_id, [])

    def key(self, request: Request, scheduler: Scheduler | None = None) -> OrderKey:
        """Its place in the order of ``scheduler``, or of the one in use."""
        return (scheduler or self.scheduler).key(
            RequestFacts(
                request.name,
                request.arrival_seconds,
                request.sequence_number,
                request.priority,
                request.num_prompt_tokens,
            )
        )

    def running_in_order(self) -> list[Request]:
        """What runs, by key; ordered anew only when somebody came or went."""
        if self._in_order is None:
            self._in_order = sorted(self.running.values(), key=lambda request: request.key)
        return self._in_order

    # --- in and out ------------------------------------------------------------------------------------------------

    def add(self, sequences: list[Request], deadline: float | None) -> None:
        """Take the n sequences of a request: the first waits, the others are held until its prompt is computed."""
        first, *others = sequences
        self.waiting.push(first)
        if others:
            self.held[first.request_id] = others
            self._num_held += len(others)
        self._siblings[first.request_id] = sequences
        if deadline is not None:
            heapq.heappush(self._deadlines, (deadline, first.request_id))

    def expired(self, now: float) -> Iterator[str]:
        """Ids of requests whose deadline has passed, each once. They are still here."""
        while self._deadlines and self._deadlines[0][0] <= now:
            _, request_id = heapq.heappop(self._deadlines)
            deadline = self._siblings[request_id][0].deadline_seconds if request_id in self._siblings else None
            # The id may have ended and come back: then this deadline was another request's.
            if deadline is not None and deadline <= now:
                yield request_id

    def end(self, request: Request) -> None:
        """Take a sequence from wherever it is. With it, what it holds is free, and what waited for it may run."""
        if request.state is RequestState.RUNNING:
            self._release_blocks(request)
        elif request.state is RequestState.HELD:
            self.held[request.request_id].remove(request)
            self._num_held -= 1
            if not self.held[request.request_id]:
                del self.held[request.request_id]
        else:
            self.waiting.remove(request)
        self._move(request, RequestState.FINISHED)
        self.release_held(request)
        if all(sibling.is_finished for sibling in self._siblings[request.request_id]):
            del self._siblings[request.request_id]

    # --- from one place to another ---------------------------------------------------------------------------------

    def admit(self, request: Request, blocks: SequenceBlocks, num_computed: int) -> None:
        """A waiting request runs, with these blocks, of which the first tokens are computed."""
        self.waiting.remove(request)
        request.blocks = blocks
        request.num_computed = request.num_landed = num_computed
        self._move(request, RequestState.RUNNING)
        self.running[request.name] = request
        self._in_order = None

    def preempt(self, request: Request) -> None:
        """Take a running request's blocks; it waits in its old place and computes again what it lost."""
        self._release_blocks(request)
        self._move(request, RequestState.PREEMPTED)
        self.waiting.push(request)
        self._metrics.preempted()

    def preempt_all(self) -> int:
        """Take the blocks of every running request; returns how many there were."""
        running = list(self.running.values())
        for request in running:
            self.preempt(request)
        return len(running)

    def release_held(self, parent: Request) -> None:
        """The prompt is computed, or never will be: siblings that waited for it join the queue."""
        if parent.index == 0:
            for sibling in self.held.pop(parent.request_id, ()):
                self._num_held -= 1
                self._move(sibling, RequestState.WAITING)
                self.waiting.push(sibling)

    def _release_blocks(self, request: Request) -> None:
        assert request.blocks is not None
        self.kv.close(request.blocks)
        request.blocks = None
        request.num_computed = request.num_landed = 0
        request.has_mixed_cache = False
        del self.running[request.name]
        self._in_order = None

    def _move(self, request: Request, state: RequestState) -> None:
        old = request.state
        request.move(state)
        if self._tells_states:
            self._observers.notify("request_changed_state", request=request, old=old, new=state)

    # --- other parts -----------------------------------------------------------------------------------------------

    def use_scheduler(self, scheduler: Scheduler) -> None:
        """Order everything by another scheduler; those that are too many for it give way. A key that can't be made
        raises, and then nothing has changed."""
        sequences = list(self)
        keys = [self.key(sequence, scheduler) for sequence in sequences]
        for sequence, key in zip(sequences, keys, strict=True):
            sequence.key = key
        self.scheduler = scheduler
        self.waiting.rekey(lambda request: request.key)
        by_key = sorted(self.running.values(), key=lambda request: request.key)
        for request in by_key[scheduler.limits().max_running :]:
            self.preempt(request)
        self._in_order = None

    def use_kv(self, kv: KVManager) -> None:
        """Use other books. Nothing may run: :meth:`preempt_all` first."""
        self.kv = kv
        for sequence in self:
            sequence.hashes = []  # names of blocks of another size or contract
