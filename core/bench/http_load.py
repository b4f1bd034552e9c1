"""Open-loop load on a server: requests leave at random times that do not wait for answers, as users do."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from drivetrain.bench.measure import percentiles
from drivetrain.bench.workloads import WorkItem
from drivetrain.contracts.source import Progress, silent
from drivetrain.errors import ConfigError


@dataclass
class Sample:
    """One request as a client saw it; times are seconds from its start."""

    sent_seconds: float
    first_seconds: float | None = None
    token_seconds: list[float] = field(default_factory=list)
    total_seconds: float = 0.0
    error: str | None = None

    @property
    def seconds_per_token(self) -> float | None:
        if self.first_seconds is None or len(self.token_seconds) < 2:
            return None
        return (self.token_seconds[-1] - self.first_seconds) / (len(self.token_seconds) - 1)


@dataclass(frozen=True)
class Goal:
    """What counts as well served: the first token and each later one within these seconds."""

    first_token_seconds: float
    token_seconds: float

    def is_met(self, sample: Sample) -> bool:
        per_token = sample.seconds_per_token
        return (
            sample.error is None
            and sample.first_seconds is not None
            and sample.first_seconds <= self.first_token_seconds
            and (per_token is None or per_token <= self.token_seconds)
        )


async def run_load(
    url: str,
    items: Sequence[WorkItem],
    *,
    rate: float,
    goal: Goal,
    seed: int,
    api_key: str | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Send ``items`` to ``url`` with Poisson arrivals of ``rate`` a second; rates, percentiles and goodput.

    Goodput is the number of requests a second that met ``goal``. Raises ConfigError when the server can't be reached.
    """
    import httpx

    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=None, limits=limits, trust_env=False) as client:
        try:
            models = (await client.get("/v1/models")).raise_for_status().json()
        except (httpx.HTTPError, ValueError) as error:
            raise ConfigError(
                f"no server answers: {error}", where=url, hint="Start one with drivetrain serve."
            ) from error
        model = models["data"][0]["id"]
        rng = random.Random(seed)
        started = time.perf_counter()
        tasks = []
        moment = 0.0
        for item in items:
            await asyncio.sleep(max(0.0, started + moment - time.perf_counter()))
            tasks.append(asyncio.create_task(_send(client, model, item, started)))
            tasks[-1].add_done_callback(
                lambda _: progress("serving", sum(task.done() for task in tasks), len(items), "requests")
            )
            moment += rng.expovariate(rate)
        samples = await asyncio.gather(*tasks)
        seconds = time.perf_counter() - started
    return _summary(samples, seconds, rate, goal)


async def _send(client: Any, model: str, item: WorkItem, started: float) -> Sample:
    import httpx

    sample = Sample(time.perf_counter() - started)
    body = {
        "model": model,
        "prompt": list(item.prompt),
        "max_tokens": item.max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    begin = time.perf_counter()
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                sample.error = f"{response.status_code}: {(await response.aread()).decode(errors='replace')[:200]}"
                return sample
            async for line in response.aiter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    _note_event(sample, json.loads(line[6:]), time.perf_counter() - begin)
    except httpx.HTTPError as error:
        sample.error = f"{type(error).__name__}: {error}"
    sample.total_seconds = time.perf_counter() - begin
    return sample


def _note_event(sample: Sample, event: dict[str, Any], now: float) -> None:
    if "error" in event:
        sample.error = event["error"]["message"]
    elif event.get("choices"):
        if sample.first_seconds is None:
            sample.first_seconds = now
        sample.token_seconds.append(now)


def _summary(samples: Sequence[Sample], seconds: float, rate: float, goal: Goal) -> dict[str, Any]:
    good = [sample for sample in samples if sample.error is None]
    errors: dict[str, int] = {}
    for sample in samples:
        if sample.error:
            errors[sample.error] = errors.get(sample.error, 0) + 1
    output_tokens = sum(len(sample.token_seconds) for sample in good)
    return {
        "requests": len(samples),
        "failed": len(samples) - len(good),
        "errors": errors,
        "rate_offered": rate,
        "seconds": seconds,
        "requests_per_second": len(good) / seconds,
        "output_tokens_per_second": output_tokens / seconds,
        "goodput_requests_per_second": sum(goal.is_met(sample) for sample in samples) / seconds,
        "goal": {"first_token_seconds": goal.first_token_seconds, "token_seconds": goal.token_seconds},
        "goal_met_share": sum(goal.is_met(sample) for sample in samples) / len(samples),
        "time_to_first_token_seconds": percentiles([s.first_seconds for s in good if s.first_seconds is not None]),
        "time_per_token_seconds": percentiles([s.seconds_per_token for s in good if s.seconds_per_token is not None]),
        "request_seconds": percentiles([sample.total_seconds for sample in good]),
    }
