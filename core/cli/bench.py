"""``drivetrain bench``: how fast a model is served, in this process or over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from drivetrain.cli.bench_kernels import kernels
from drivetrain.cli.console import note, print_json, print_table, show_progress
from drivetrain.cli.generate import open_llm
from drivetrain.cli.options import with_settings
from drivetrain.config import Settings
from drivetrain.errors import ConfigError

if TYPE_CHECKING:
    from drivetrain.bench.trace import StepTrace
    from drivetrain.bench.workloads import Sampling

app = typer.Typer(help="Measure speed and memory.", no_args_is_help=True, rich_markup_mode=None)

app.command("kernels")(kernels)

_USUAL_VOCABULARY = 32_000
"""Taken for a server that does not tell its own; few have less."""

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
SeedOption = Annotated[int, typer.Option(help="Seed of the workload.")]
DrawTemperature = Annotated[float, typer.Option("--temperature", help="Of drawn tokens; 0 is greedy.")]
DrawTopP = Annotated[float, typer.Option("--top-p", help="Drawn: keep the smallest set with this probability.")]
DrawTopK = Annotated[int, typer.Option("--top-k", help="Drawn: keep the k most likely tokens; 0 keeps all.")]
Requests = Annotated[int | None, typer.Option(help="Number of requests. Default: the workload's.", show_default=False)]


Profile = Annotated[
    Path | None,
    typer.Option(
        "--profile", help="Write every step's phases to FILE as a Chrome trace.", metavar="FILE", show_default=False
    ),
]


@app.command("throughput")
@with_settings()
def throughput(
    settings: Settings,
    workload: Annotated[str, typer.Option(help="mixed or shared-prefix.")] = "mixed",
    requests: Requests = None,
    seed: SeedOption = 0,
    temperature: DrawTemperature = 0.0,
    top_p: DrawTopP = 1.0,
    top_k: DrawTopK = 0,
    profile: Profile = None,
    as_json: AsJson = False,
) -> None:
    """All requests at once: tokens per second, times, peak memory.

    Example: drivetrain bench throughput --model smollm2-135m --workload mixed --requests 64 --seed 0 --json
    """
    from drivetrain.bench.measure import describe_run, run_throughput
    from drivetrain.bench.workloads import make_workload

    sampling = _sampling(temperature, top_p, top_k, seed)
    make_workload(workload, requests, vocab_size=1000, seed=seed)  # a wrong name is told before the model is loaded
    with _traced(profile) as trace, open_llm(settings, trace) as llm, show_progress() as progress:
        items = make_workload(workload, requests, llm.vocab_size, seed)
        result = run_throughput(llm, items, progress, sampling)
        asked = {"workload": workload, "seed": seed, "sampling": sampling.options(0)}
        _print({**asked, **describe_run(llm), **result}, as_json)


@app.command("latency")
@with_settings()
def latency(
    settings: Settings,
    prompt_length: Annotated[int, typer.Option(min=1, help="Tokens in each prompt.")] = 128,
    output_length: Annotated[int, typer.Option(min=2, help="Tokens generated for each.")] = 128,
    batch: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 1,
    iterations: Annotated[int, typer.Option(min=1, help="Repetitions after one to warm up.")] = 5,
    seed: SeedOption = 0,
    temperature: DrawTemperature = 0.0,
    top_p: DrawTopP = 1.0,
    top_k: DrawTopK = 0,
    profile: Profile = None,
    as_json: AsJson = False,
) -> None:
    """Equal requests, a batch at a time: prompt rate and decode rate apart.

    Example: drivetrain bench latency --model smollm2-135m --prompt-length 128 --output-length 128
    """
    from drivetrain.bench.measure import describe_run, run_latency

    sampling = _sampling(temperature, top_p, top_k, seed)
    with _traced(profile) as trace, open_llm(settings, trace) as llm, show_progress() as progress:
        result = run_latency(
            llm,
            prompt_length=prompt_length,
            output_length=output_length,
            batch=batch,
            iterations=iterations,
            seed=seed,
            progress=progress,
            sampling=sampling,
        )
        _print({"seed": seed, "sampling": sampling.options(0), **describe_run(llm), **result}, as_json)


@app.command("swap")
@with_settings()
def swap(
    settings: Settings,
    to: Annotated[list[str], typer.Option(help="KIND=NAME or KIND.OPTION=VALUE to swap to.", show_default=False)],
    back: Annotated[
        list[str] | None,
        typer.Option(help="What to swap back to. Default: the parts at the start.", show_default=False),
    ] = None,
    times: Annotated[int, typer.Option(min=1, help="Swaps there and back.")] = 10,
    workload: Annotated[str, typer.Option(help="mixed or shared-prefix.")] = "mixed",
    requests: Requests = None,
    seed: SeedOption = 0,
    as_json: AsJson = False,
) -> None:
    """Swap parts there and back while a workload runs: pause, extra memory, requests kept, answers unchanged.

    Example: drivetrain bench swap --model smollm2-135m --to scheduler=priority --times 5 --requests 16
    """
    from drivetrain.bench.measure import describe_run
    from drivetrain.bench.swap import StepClock, run_swaps
    from drivetrain.bench.workloads import make_workload
    from drivetrain.cli.swap import parse_parts
    from drivetrain.serving.swap import check_kinds

    clock, there, home = StepClock(), parse_parts(to), parse_parts(back or [])
    check_kinds({**there, **home})  # a wrong kind is told before the model is loaded
    with open_llm(settings, [clock]) as llm, show_progress() as progress:
        items = make_workload(workload, requests, llm.vocab_size, seed)
        report = llm.explain()
        at_start = {kind: {"name": report[kind].chosen.qualified, **report[kind].options} for kind in there}
        result = run_swaps(llm, clock, items, there, home or at_start, times, progress)
        _print({"workload": workload, "seed": seed, **describe_run(llm), **result}, as_json)


@app.command("serve")
@with_settings("frontend")
def serve(
    settings: Settings,
    url: Annotated[
        str | None,
        typer.Option(
            help="A running server, of which --model may name one. Default: start one here.", show_default=False
        ),
    ] = None,
    workload: Annotated[str, typer.Option(help="mixed or shared-prefix.")] = "mixed",
    requests: Requests = None,
    rate: Annotated[float, typer.Option(min=0.001, help="Requests a second, Poisson arrivals.")] = 1.0,
    goal_first_token: Annotated[float, typer.Option(min=0, help="Goodput: seconds to the first token.")] = 2.0,
    goal_token: Annotated[float, typer.Option(min=0, help="Goodput: seconds for each later token.")] = 0.25,
    vocab_size: Annotated[
        int | None,
        typer.Option(
            min=2, help="Prompts use token ids below this. Default: what the server says.", show_default=False
        ),
    ] = None,
    api_key: Annotated[str | None, typer.Option(help="Key to send.", show_default=False)] = None,
    seed: SeedOption = 0,
    temperature: DrawTemperature = 0.0,
    top_p: DrawTopP = 1.0,
    top_k: DrawTopK = 0,
    as_json: AsJson = False,
) -> None:
    """Open-loop load over HTTP: requests leave at Poisson times whatever the server does; rates, tails, goodput.

    Example: drivetrain bench serve --model smollm2-135m --rate 1 --requests 32
    """
    from drivetrain.bench.http_load import Goal, find_model, run_load
    from drivetrain.bench.server import running_server
    from drivetrain.bench.workloads import make_workload

    sampling = _sampling(temperature, top_p, top_k, seed)
    make_workload(workload, requests, vocab_size=1000, seed=seed)  # a wrong name is told before a server is started
    goal = Goal(goal_first_token, goal_token)
    if url is not None and settings.parts:
        raise ConfigError(
            "a running server has chosen its parts already",
            where="--url",
            found=", ".join(settings.parts),
            hint="Leave them out, or leave out --url to start a server with them.",
        )
    with running_server(settings, url) as address, show_progress() as progress:
        model = find_model(address, api_key, None if url is None else settings.model)
        items = make_workload(workload, requests, vocab_size or model.vocab_size or _USUAL_VOCABULARY, seed)
        result = asyncio.run(
            run_load(model, items, rate=rate, goal=goal, seed=seed, progress=progress, sampling=sampling)
        )
    asked = {"workload": workload, "seed": seed, "sampling": sampling.options(0)}
    _print({**asked, "model": model.name, "url": address, **result}, as_json)


def _sampling(temperature: float, top_p: float, top_k: int, seed: int) -> Sampling:
    """How a workload's tokens are chosen. What can't be, or would change nothing, is told before a model is loaded."""
    from drivetrain.bench.workloads import Sampling
    from drivetrain.serving.types import SamplingParams

    if temperature == 0 and (top_p, top_k) != (1, 0):
        raise ConfigError(
            "greedy tokens are not drawn, so nothing is kept to draw from",
            where="--top-p" if top_p != 1 else "--top-k",
            found=top_p if top_p != 1 else top_k,
            hint="Give --temperature too, for example --temperature 1.",
        )
    SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k)
    return Sampling(temperature, top_p, top_k, seed)


@contextmanager
def _traced(path: Path | None) -> Iterator[list[StepTrace]]:
    """The observers of a measured run; what they saw is written when it ends, also when it is interrupted."""
    if path is None:
        yield []
        return
    from drivetrain.bench.trace import StepTrace

    trace = StepTrace(path)
    try:
        yield [trace]
    finally:
        trace.write()
        note(f"The profile is in {path}: open it in chrome://tracing or ui.perfetto.dev.")


def _print(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(result)
        return
    rows: list[tuple[str, str]] = []
    for key, value in result.items():
        if isinstance(value, dict):
            text = "  ".join(f"{name} {_short(item)}" for name, item in value.items())
        elif key.endswith("_bytes") and value is not None:
            key, text = key.removesuffix("_bytes"), f"{value / 2**20:.0f} MiB"
        else:
            text = _short(value)
        rows.append((key.replace("_", " "), text))
    print_table(("figure", "value"), rows)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
