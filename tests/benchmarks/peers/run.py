"""Run engines in turn: one is timed while the others are stopped, repeat after repeat."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from drivetrain.bench.workloads import WorkItem

from .child import Child, PeerError
from .contestants import Adapters, Contestant
from .floor import Ceilings, Geometry, Weights
from .machine import others_share
from .workloads import Sample, Workload

Say = Callable[[str], None]

LEAST_EQUAL_TOKENS = 8
"""Greedy tokens in float32 that every engine has to agree on with ours. The first of an output are no ties in these
workloads: an engine that differs there computes something else."""


@dataclass
class Entry:
    """One contestant in one workload: what it is, and what came of it.

    failure: why there are no more samples; None when all went well.
    """

    contestant: Contestant
    weights: Weights | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    parts: Mapping[str, str] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    failure: str | None = None

    def median(self, rate: str) -> float | None:
        return median(self._values(rate)) if self.samples else None

    def spread(self, rate: str) -> tuple[float, float] | None:
        """The lowest and the highest."""
        values = self._values(rate)
        return (min(values), max(values)) if values else None

    def _values(self, rate: str) -> list[float]:
        return [sample.rates[rate] for sample in self.samples]


@dataclass(frozen=True)
class Agreement:
    """How far an engine's greedy outputs are ours: equal leading tokens of all, and the shortest equal beginning."""

    equal_tokens: int
    all_tokens: int
    shortest: int

    @property
    def is_enough(self) -> bool:
        return self.shortest >= LEAST_EQUAL_TOKENS


@dataclass
class Group:
    """The contestants of one workload whose weights have equal bits."""

    workload: Workload
    row: str
    entries: list[Entry]

    def best_of_ours(self, rate: str) -> float | None:
        found = [entry.median(rate) for entry in self.entries if entry.contestant.is_ours]
        return max((value for value in found if value is not None), default=None)

    def agreement(self, entry: Entry) -> Agreement | None:
        """Against our first entry of the group; None without outputs of both, for ours itself, and for drawn tokens."""
        if self.workload.sampling:
            return None  # each engine draws with numbers of its own
        ours = next((other for other in self.entries if other.contestant.is_ours and other.samples), None)
        if ours is None or entry.contestant.is_ours or not entry.samples:
            return None
        return compare_outputs(entry.samples[0].outputs, ours.samples[0].outputs)


def compare_outputs(theirs: Sequence[Sequence[int]], ours: Sequence[Sequence[int]]) -> Agreement:
    """``theirs`` may be of the first requests only."""
    equal, total, shortest = 0, 0, LEAST_EQUAL_TOKENS
    for a, b in zip(theirs, ours, strict=False):
        same = next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
        equal += same
        total += len(a)
        shortest = min(shortest, same)
    return Agreement(equal, total, shortest)


class Bench:
    """One run of the benchmark."""

    def __init__(self, adapters: Adapters, geometry: Geometry, repeats: int, logs: Path, say: Say) -> None:
        self.others: list[float] = []
        self._adapters = adapters
        self._geometry = geometry
        self._repeats = repeats
        self._logs = logs
        self._say = say

    def ceilings(self, threads: int) -> Ceilings:
        self._say("measuring the machine's ceilings")
        command = self._adapters.ceilings()
        with Child(command.words, self._logs / "ceilings.log", command.env) as child:
            return Ceilings(**child.ask("measure", threads=threads, repeats=max(self._repeats, 3)))

    def run(self, workload: Workload, row: str, contestants: Sequence[Contestant]) -> Group:
        """Load all, then time each once per repeat, in turn. A peer that fails is out, with its reason."""
        entries = [Entry(contestant) for contestant in contestants]
        with contextlib.ExitStack() as stack:
            running: list[tuple[Entry, Child]] = []
            for entry in entries:
                with _failures_noted(entry):
                    running.append((entry, self._start(stack, entry, workload)))
            for repeat in range(self._repeats):
                items = workload.items(self._geometry.vocab_size, repeat)
                for entry, child in running:
                    if entry.failure is None:
                        self._say(f"{workload.name}, {entry.contestant.label}: {repeat + 1} of {self._repeats}")
                        with _failures_noted(entry):
                            entry.samples.append(self._timed(workload, entry.contestant, child, items))
        for entry in entries:
            if entry.failure is not None:
                self._say(f"{workload.name}, {entry.contestant.label} failed: {entry.failure}")
        return Group(workload, row, entries)

    def _start(self, stack: contextlib.ExitStack, entry: Entry, workload: Workload) -> Child:
        contestant = entry.contestant
        command = self._adapters.command(contestant, workload)
        self._say(f"{workload.name}, {contestant.label}: loading")
        log = self._logs / f"{workload.name}-{contestant.label.replace(' ', '-').replace(',', '')}.log"
        child = stack.enter_context(Child(command.words, log, command.env))
        try:
            loaded: dict[str, Any] = child.ask("load", **command.load)
            entry.versions = loaded["versions"]
            entry.parts = loaded.get("parts", {})
            entry.weights = self._adapters.weights(contestant, self._geometry, loaded)
            workload.warm_up(child, self._geometry.vocab_size)
        finally:
            child.pause()  # one that failed must not disturb the others either
        return child

    def _timed(self, workload: Workload, contestant: Contestant, child: Child, items: Sequence[WorkItem]) -> Sample:
        share = others_share()
        if share is not None:
            self.others.append(share)
        child.resume()
        try:
            workload.warm_up(child, self._geometry.vocab_size)
            return workload.measure(child, items[: contestant.first])
        finally:
            child.pause()


@contextlib.contextmanager
def _failures_noted(entry: Entry) -> Iterator[None]:
    try:
        yield
    except (PeerError, ValueError, KeyError, ZeroDivisionError) as error:
        entry.failure = str(error) if isinstance(error, PeerError) else f"{type(error).__name__}: {error}"
