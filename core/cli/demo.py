"""``drivetrain demo``: a real model end to end, and what was chosen to run it."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from drivetrain.cli.console import note, print_table
from drivetrain.cli.explain import print_report
from drivetrain.cli.generate import DEFAULT_MODEL, answer, open_llm
from drivetrain.cli.options import with_settings
from drivetrain.config import Settings

if TYPE_CHECKING:
    from drivetrain.serving.llm import LLM

QUESTION = "What is gravity? Answer in two sentences."


@with_settings()
def demo(
    settings: Settings,
    question: Annotated[str, typer.Option(help="What to ask the model.")] = QUESTION,
    requests: Annotated[int, typer.Option(min=1, help="Requests of the mixed workload.")] = 32,
) -> None:
    """Load a small real model, answer a question, then serve a mixed batch with live progress.

    Example: drivetrain demo
    """
    import dataclasses

    from drivetrain.bench.workloads import make_workload
    from drivetrain.serving.types import SamplingParams

    if settings.model is None:
        settings = dataclasses.replace(settings, model=DEFAULT_MODEL)
    with open_llm(settings) as llm:
        _title("1. What was chosen, and why")
        print_report(llm.explain())
        _title(f"2. {settings.model} answers: {question}")
        answer(llm, [{"role": "user", "content": question}], SamplingParams(max_tokens=160, temperature=0))
        _title(f"3. {requests} mixed requests at once")
        items = make_workload("mixed", requests, llm.vocab_size, seed=0)
        result = _run_live(llm, items)
        print_table(("figure", "value"), _rows(result))


def _title(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}", flush=True)


def _run_live(llm: LLM, items: Sequence[Any]) -> dict[str, Any]:
    """The throughput measurement with a line of live figures while it runs."""
    from drivetrain.bench.measure import run_throughput

    begin = llm.stats()["output_tokens"]
    started = time.perf_counter()
    is_terminal = sys.stderr.isatty()

    def show(what: str, done: int, total: int | None, unit: str = "bytes") -> None:
        stats = llm.stats()
        rate = (stats["output_tokens"] - begin) / (time.perf_counter() - started)
        text = (
            f"{done}/{total} finished  {stats['running']} running  {stats['waiting']} waiting  "
            f"{rate:.0f} tokens/s  KV {stats['kv_usage']:.1%}"
        )
        if is_terminal:
            print(f"\r\x1b[2K{text}", end="", file=sys.stderr, flush=True)
        elif total and (done % max(1, total // 4) == 0 or done == total):
            note(text)

    result = run_throughput(llm, items, show)
    if is_terminal:
        print("\r\x1b[2K", end="", file=sys.stderr, flush=True)
    return result


def _rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    first, token = result["time_to_first_token_seconds"], result["time_per_token_seconds"]
    return [
        ("output tokens per second", f"{result['output_tokens_per_second']:.1f}"),
        ("tokens per second, prompts included", f"{result['total_tokens_per_second']:.1f}"),
        ("time to first token, median / p99", f"{first['p50']:.2f} s / {first['p99']:.2f} s"),
        ("time per token, median / p99", f"{token['p50'] * 1000:.0f} ms / {token['p99'] * 1000:.0f} ms"),
        ("peak KV use", f"{result['peak_kv_usage']:.1%}"),
        ("prefix cache hits", f"{result['prefix_hit_rate']:.1%} of prompt tokens"),
        ("preemptions", str(result["preemptions"])),
        ("peak memory", f"{result['peak_memory_bytes'] / 2**20:.0f} MiB"),
        (
            "requests, prompt tokens, output tokens",
            f"{result['requests']}, {result['prompt_tokens']}, {result['output_tokens']}",
        ),
        ("wall time", f"{result['seconds']:.1f} s"),
    ]
