"""Exchange parts again and again while a workload runs, and say how long it stood still each time."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from drivetrain.bench.measure import percentiles
from drivetrain.bench.workloads import WorkItem, check_fits
from drivetrain.contracts.source import Progress, silent
from drivetrain.observers import hookimpl
from drivetrain.serving.types import SamplingParams

if TYPE_CHECKING:
    from drivetrain.serving.llm import LLM


class StepClock:
    """An observer that notes when each step ended, so that gaps between steps can be told from steps."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, float]] = []

    @hookimpl
    def step_done(self, seconds: float) -> None:
        self.steps.append((time.monotonic(), seconds))

    def gaps(self) -> list[float]:
        """Seconds between the end of each step and the start of the next."""
        return [end - seconds - before for (before, _), (end, seconds) in zip(self.steps, self.steps[1:], strict=False)]


def run_swaps(
    llm: LLM,
    clock: StepClock,
    items: Sequence[WorkItem],
    there: Mapping[str, Any],
    back: Mapping[str, Any],
    times: int,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Run ``items`` twice, undisturbed and with ``times`` swaps there and back; compare answers and gaps.

    Times are in seconds, memory in bytes. ``outputs_equal`` says whether greedy answers came out the same.
    """
    check_fits(items, llm.max_model_len)
    params = [SamplingParams(max_tokens=item.max_tokens, temperature=0, ignore_eos=True) for item in items]
    prompts = [item.prompt for item in items]
    expected = [result.token_ids for result in llm.generate(prompts, params)]
    undisturbed = clock.gaps()
    answers: list[tuple[int, ...]] = []
    clock.steps.clear()

    is_over = threading.Event()

    def work() -> None:
        while not is_over.is_set():
            answers.extend(result.token_ids for result in llm.generate(prompts, params))

    reports = []
    worker = threading.Thread(target=work)
    worker.start()
    try:
        for done in range(2 * times):
            reports.append(llm.swap(**(there if done % 2 == 0 else back)))
            progress("swapping", done + 1, 2 * times, "swaps")
    finally:
        is_over.set()
        worker.join()
    return {
        "swaps": len(reports),
        "rolled_back": sum(report.outcome.value == "rolled back" for report in reports),
        "cache": reports[0].cache.value,
        "pause_seconds": percentiles([report.pause_seconds for report in reports]),
        "longest_gap_seconds": max(clock.gaps(), default=0.0),
        "longest_gap_undisturbed_seconds": max(undisturbed, default=0.0),
        "prepare_seconds": percentiles([report.prepare_seconds for report in reports]),
        "extra_memory_bytes": max(report.extra_memory_bytes for report in reports),
        "requests_kept": sum(report.requests_kept for report in reports),
        "requests_recomputed": sum(report.requests_recomputed for report in reports),
        "answers": len(answers),
        "outputs_equal": all(answer == expected[i % len(items)] for i, answer in enumerate(answers)),
    }
