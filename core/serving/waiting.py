"""The waiting queue: by the scheduler's key, with O(log n) arrival, departure and cancellation."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator

from drivetrain.contracts.scheduler import Candidate, OrderKey
from drivetrain.serving.request import Request

_Entry = tuple[OrderKey, int, Request]
_SLACK = 64


class WaitingQueue:
    """Requests that hold no blocks, smallest key first.

    A request that leaves is gone from the count at once. Its entry stays in the heap until it comes to the top, or
    until such entries are the greater part: an entry counts only while it is the one that its member is known by.
    """

    def __init__(self) -> None:
        self._heap: list[_Entry] = []
        self._members: dict[str, _Entry] = {}
        self._taken: list[_Entry] = []

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, name: str) -> bool:
        return name in self._members

    def push(self, request: Request) -> None:
        entry = (request.key, request.sequence_number, request)
        self._members[request.name] = entry
        heapq.heappush(self._heap, entry)

    def remove(self, request: Request) -> None:
        del self._members[request.name]
        if len(self._heap) > 2 * len(self._members) + _SLACK:
            self._heap = list(self._members.values())
            heapq.heapify(self._heap)
            self._taken.clear()

    def get(self, name: str) -> Request | None:
        entry = self._members.get(name)
        return None if entry is None else entry[2]

    def peek_in_order(self, candidate: Callable[[Request], Candidate]) -> Iterator[Candidate]:
        """Candidates by key, taken off the heap one by one; :meth:`put_back` returns those that are still members."""
        while self._heap:
            entry = heapq.heappop(self._heap)
            if self._members.get(entry[2].name) is entry:
                self._taken.append(entry)
                yield candidate(entry[2])

    def put_back(self) -> None:
        """End what :meth:`peek_in_order` began: what was looked at and not removed waits on."""
        for entry in self._taken:
            if self._members.get(entry[2].name) is entry:
                heapq.heappush(self._heap, entry)
        self._taken.clear()

    def rekey(self, key: Callable[[Request], OrderKey]) -> None:
        """Order everything anew, for another scheduler."""
        requests = [entry[2] for entry in self._members.values()]
        self._members.clear()
        self._heap.clear()
        for request in requests:
            request.key = key(request)
            self.push(request)

    def __iter__(self) -> Iterator[Request]:
        return iter([entry[2] for entry in self._members.values()])
