"""Run a workload on an LLM in this process and say what it took."""

from __future__ import annotations

import platform as host
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from drivetrain import __version__
from drivetrain.bench.workloads import GREEDY, Sampling, WorkItem, check_fits, mixed
from drivetrain.contracts.source import Progress, silent
from drivetrain.serving.metrics import percentile
from drivetrain.serving.timing import OUTSIDE_THE_MODEL, Phase
from drivetrain.serving.types import SamplingParams

if TYPE_CHECKING:
    from drivetrain.serving.llm import LLM


def percentiles(values: Sequence[float]) -> dict[str, float | None]:
    """Mean, median and tails of some times, in their own unit."""
    return {
        "mean": sum(values) / len(values) if values else None,
        **{f"p{int(share * 100)}": percentile(values, share) for share in (0.5, 0.9, 0.99)},
    }


def describe_run(llm: LLM) -> dict[str, Any]:
    """What was measured: versions, machine, parts."""
    import torch

    report = llm.explain()
    return {
        "model": llm.selection_dict()["model"],
        "drivetrain": __version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": host.platform(),
        "parts": report.chosen_names,
        "plan_digest": llm.selection_dict()["plan_digest"],
    }


def run_throughput(
    llm: LLM, items: Sequence[WorkItem], progress: Progress = silent, sampling: Sampling = GREEDY
) -> dict[str, Any]:
    """All requests at once, to their full length; rates over the whole run.

    Times are in seconds, rates in tokens per second over all requests, memory in bytes.
    """
    check_fits(items, llm.max_model_len)
    params = [
        SamplingParams(max_tokens=item.max_tokens, ignore_eos=True, **sampling.options(number))
        for number, item in enumerate(items)
    ]
    before = llm.stats()
    started = time.perf_counter()
    results = llm.generate([item.prompt for item in items], params, progress=progress)
    seconds = time.perf_counter() - started
    after = llm.stats()
    output_tokens = sum(len(result.token_ids) for result in results)
    prompt_tokens = sum(len(item.prompt) for item in items)
    hit_tokens = after["prefix_hit_tokens"] - before["prefix_hit_tokens"]
    firsts = [r.timing.first_token_seconds for r in results if r.timing.first_token_seconds is not None]
    return {
        "requests": len(items),
        "seconds": seconds,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "output_tokens_per_second": output_tokens / seconds,
        "total_tokens_per_second": (output_tokens + prompt_tokens) / seconds,
        "requests_per_second": len(items) / seconds,
        "time_to_first_token_seconds": percentiles(firsts),
        "time_per_token_seconds": percentiles([_seconds_per_token(r) for r in results if len(r.token_ids) > 1]),
        "request_seconds": percentiles([r.timing.total_seconds for r in results]),
        "peak_memory_bytes": llm.peak_memory_bytes(),
        "peak_kv_usage": after["peak_kv_usage"],
        "prefix_hit_rate": hit_tokens / prompt_tokens,
        "preemptions": after["preemptions"] - before["preemptions"],
        **step_figures(before, after),
    }


def step_figures(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Where the steps between two ``stats`` spent their time: seconds of a mean step by phase, and the share of all
    that is not the model."""
    steps = after["steps"] - before["steps"]
    spent = {phase.value: after["phase_seconds"][phase] - before["phase_seconds"][phase] for phase in Phase}
    outside = sum(spent[phase] for phase in OUTSIDE_THE_MODEL)
    return {
        "steps": steps,
        "step_phase_seconds": {phase: seconds / max(1, steps) for phase, seconds in spent.items()},
        "outside_the_model_share": outside / (sum(spent.values()) or 1.0),
    }


def _seconds_per_token(result: Any) -> float:
    first = result.timing.first_token_seconds or 0.0
    return float((result.timing.total_seconds - first) / (len(result.token_ids) - 1))


def run_latency(
    llm: LLM,
    *,
    prompt_length: int,
    output_length: int,
    batch: int,
    iterations: int,
    seed: int,
    progress: Progress = silent,
    sampling: Sampling = GREEDY,
) -> dict[str, Any]:
    """``batch`` equal requests at a time, ``iterations`` times after one to warm up: prompt and decode rates apart.

    Every iteration has prompts of its own, so that the prefix cache can't help.
    """
    check_fits([WorkItem((0,) * prompt_length, output_length)], llm.max_model_len)
    pool = mixed(1 + prompt_length * batch * (iterations + 1) // 32, llm.vocab_size, seed)
    tokens = [token for item in pool for token in item.prompt]
    runs = []
    before = llm.stats()
    for iteration in range(iterations + 1):
        begin = iteration * batch * prompt_length
        items = [
            WorkItem(tuple(tokens[begin + i * prompt_length : begin + (i + 1) * prompt_length]), output_length)
            for i in range(batch)
        ]
        runs.append(run_throughput(llm, items, sampling=sampling))
        if iteration == 0:
            before = llm.stats()
        progress("measuring", iteration, iterations, "iterations")
    runs = runs[1:]
    first = [run["time_to_first_token_seconds"]["p50"] for run in runs]
    per_token = [run["time_per_token_seconds"]["p50"] for run in runs if output_length > 1]
    prefill = [batch * prompt_length / seconds for seconds in first]
    decode = [batch / seconds for seconds in per_token if seconds]
    return {
        "batch": batch,
        "prompt_length": prompt_length,
        "output_length": output_length,
        "iterations": iterations,
        "time_to_first_token_seconds": percentiles(first),
        "time_per_token_seconds": percentiles(per_token),
        "request_seconds": percentiles([run["request_seconds"]["p50"] for run in runs]),
        "prompt_tokens_per_second": percentile(prefill, 0.5),
        "decode_tokens_per_second": percentile(decode, 0.5),
        "peak_memory_bytes": llm.peak_memory_bytes(),
        **step_figures(before, llm.stats()),
    }
