"""Steps as a Chrome trace, to be looked at in ``chrome://tracing`` or https://ui.perfetto.dev.

The format is Google's "Trace Event Format": complete events (``X``) nest by their times, counters (``C``) draw a curve,
metadata (``M``) names threads. Times are in microseconds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from drivetrain.errors import ConfigError
from drivetrain.observers import hookimpl
from drivetrain.serving.timing import StepTiming

_ENGINE, _MODEL = 1, 2
_THREADS = {_ENGINE: "engine: steps and their phases", _MODEL: "model: as it computes"}


class StepTrace:
    """An observer that keeps every step, and writes them as a trace.

    Raises ConfigError at once when the file can't be written, not after an hour of measuring.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.steps: list[StepTiming] = []
        try:
            path.touch()
        except OSError as error:
            raise ConfigError(f"the profile can't be written: {error}", where="--profile", found=str(path)) from error

    @hookimpl
    def step_done(self, timing: StepTiming) -> None:
        self.steps.append(timing)

    def write(self) -> None:
        """Write what was seen so far."""
        self.path.write_text(json.dumps({"traceEvents": list(self._events()), "displayTimeUnit": "ms"}))

    def _events(self) -> Iterator[dict[str, Any]]:
        process = os.getpid()
        yield {"ph": "M", "name": "process_name", "pid": process, "args": {"name": "drivetrain"}}
        for thread, name in _THREADS.items():
            yield {"ph": "M", "name": "thread_name", "pid": process, "tid": thread, "args": {"name": name}}
        origin = min((step.started_seconds for step in self.steps), default=0.0)
        for number, step in enumerate(self.steps):
            for event in _step_events(number, step):
                event["ts"] = round((event["ts"] - origin) * 1e6, 3)
                yield {"pid": process, **event}


def _step_events(number: int, step: StepTiming) -> Iterator[dict[str, Any]]:
    start = step.started_seconds
    yield _slice(f"step {number}", _ENGINE, start, start + step.seconds, tokens=step.num_tokens)
    begin = 0.0
    for phase, end in step.marks:
        yield _slice(phase.value, _ENGINE, start + begin, start + end)
        begin = end
    yield _slice(f"model {number}", _MODEL, *step.model_seconds, tokens=step.num_tokens)
    counters = {
        "requests": {"running": step.num_running, "waiting": step.num_waiting},
        "kv use": {"%": step.kv_usage * 100},
    }
    for name, values in counters.items():
        yield {"ph": "C", "name": name, "tid": _ENGINE, "ts": start, "args": values}


def _slice(name: str, thread: int, begin: float, end: float, **details: Any) -> dict[str, Any]:
    return {"ph": "X", "name": name, "tid": thread, "ts": begin, "dur": round((end - begin) * 1e6, 3), "args": details}
