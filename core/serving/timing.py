"""Where a step's time goes: a few readings of the clock a step, added up by phase."""

from __future__ import annotations

import time
from dataclasses import dataclass
from enum import StrEnum


class Phase(StrEnum):
    """What a step spends its time on.

    SCHEDULE: expired requests, the scheduler's plan, blocks.
    PREPARE:  packing the step's inputs.
    MODEL:    block copies and the model, with the wait for a device that works on its own.
    SAMPLE:   from scores to tokens.
    OUTPUT:   states, text, chunks.
    """

    SCHEDULE = "schedule"
    PREPARE = "prepare"
    MODEL = "model"
    SAMPLE = "sample"
    OUTPUT = "output"


OUTSIDE_THE_MODEL = tuple(phase for phase in Phase if phase is not Phase.MODEL)


@dataclass(frozen=True)
class StepTiming:
    """One step of the engine's thread.

    started_seconds: by ``time.perf_counter``.
    marks:           (phase, end): each phase from the end of the one before to its own, in seconds since the start. A
                     phase may come several times.
    model_seconds:   begin and end of the model's run by ``time.perf_counter``: of its launch, where the device queues
                     its work. With the overlapped loop it began in the step before.
    """

    started_seconds: float
    marks: tuple[tuple[Phase, float], ...]
    num_tokens: int
    num_running: int
    num_waiting: int
    kv_usage: float
    model_seconds: tuple[float, float]

    @property
    def seconds(self) -> float:
        return self.marks[-1][1] if self.marks else 0.0


class StepClock:
    """Takes the time of one step after another. Used by the step loop only."""

    def __init__(self) -> None:
        self._started = self._last = time.perf_counter()
        self._marks: list[tuple[Phase, float]] = []
        self.totals = dict.fromkeys(Phase, 0.0)

    def start(self) -> None:
        """A step begins; what was marked of one that came to nothing is dropped."""
        self._started = self._last = time.perf_counter()
        self._marks = []

    def mark(self, phase: Phase) -> None:
        """What was done since the last mark was ``phase``."""
        now = time.perf_counter()
        self.totals[phase] += now - self._last
        self._last = now
        self._marks.append((phase, now - self._started))

    @property
    def seconds(self) -> float:
        """Of the step, up to the last mark."""
        return self._last - self._started

    def timing(
        self,
        num_tokens: int,
        num_running: int,
        num_waiting: int,
        kv_usage: float,
        model_seconds: tuple[float, float],
    ) -> StepTiming:
        """The step up to now."""
        marks = tuple(self._marks)
        return StepTiming(self._started, marks, num_tokens, num_running, num_waiting, kv_usage, model_seconds)
