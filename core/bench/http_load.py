"""Open-loop load on a server: requests leave at random times that do not wait for answers, as users do."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from drivetrain.bench.measure import percentiles
from drivetrain.bench.workloads import GREEDY, Sampling, WorkItem, check_fits
from drivetrain.contracts.source import Progress, silent
from drivetrain.errors import ConfigError, DrivetrainError


@dataclass
class Sample:
    """One request as a client saw it; times are seconds from its start.

    num_tokens: output tokens by the server's own account; without one, the events that carried text.
    """

    first_seconds: float | None = None
    last_seconds: float | None = None
    num_tokens: int = 0
    total_seconds: float = 0.0
    error: str | None = None

    @property
    def seconds_per_token(self) -> float | None:
        if self.first_seconds is None or self.last_seconds is None or self.num_tokens < 2:
            return None
        return (self.last_seconds - self.first_seconds) / (self.num_tokens - 1)


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


@dataclass(frozen=True)
class ServedModel:
    """A server and the model it serves.

    max_model_len, vocab_size: None when the server does not tell.
    """

    url: str
    name: str
    max_model_len: int | None
    vocab_size: int | None
    headers: dict[bytes, bytes] = field(default_factory=dict, repr=False)


def find_model(url: str, api_key: str | None = None, name: str | None = None) -> ServedModel:
    """The model ``name`` of the server at ``url``, or the first that it lists. Raises ConfigError when there is none to
    be had."""
    import httpx

    headers = (
        {b"Authorization": f"Bearer {api_key}".encode()} if api_key else {}
    )  # as bytes: any character may be in it
    try:
        response = httpx.get(f"{url}/v1/models", headers=headers, timeout=30, trust_env=False)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ConfigError(f"no server answers: {error}", where=url, hint="Start one with: drivetrain serve") from error
    if response.status_code in (401, 403):
        raise ConfigError("the server wants an API key", where=url, hint="Give one with --api-key.")
    try:
        cards = {card["id"]: card for card in response.json()["data"]}
        first = next(iter(cards))
    except (ValueError, LookupError, TypeError, StopIteration) as error:
        raise ConfigError(
            f"the server lists no models; it answered {response.status_code} at /v1/models",
            where=url,
            hint="Give the address before /v1 of a server that speaks the OpenAI API.",
        ) from error
    if name is not None and name not in cards:
        raise ConfigError("the server does not serve this model", where=url, found=name, allowed=tuple(cards))
    card = cards[name or first]
    return ServedModel(url, card["id"], card.get("max_model_len"), card.get("vocab_size"), headers)


async def run_load(
    model: ServedModel,
    items: Sequence[WorkItem],
    *,
    rate: float,
    goal: Goal,
    seed: int,
    progress: Progress = silent,
    sampling: Sampling = GREEDY,
) -> dict[str, Any]:
    """Send ``items`` to ``model`` with Poisson arrivals of ``rate`` a second; rates, percentiles and goodput.

    Goodput is the number of requests a second that met ``goal``. Raises ConfigError when an item is longer than the
    model takes, DrivetrainError when no request at all was answered.
    """
    import httpx

    if model.max_model_len is not None:
        check_fits(items, model.max_model_len)
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(
        base_url=model.url, headers=model.headers, timeout=None, limits=limits, trust_env=False
    ) as client:
        rng = random.Random(seed)
        started = time.perf_counter()
        tasks: list[asyncio.Task[Sample]] = []
        moment = 0.0
        for number, item in enumerate(items):
            await asyncio.sleep(max(0.0, started + moment - time.perf_counter()))
            tasks.append(asyncio.create_task(_send(client, model.name, item, sampling.options(number))))
            tasks[-1].add_done_callback(
                lambda _: progress("serving", sum(task.done() for task in tasks), len(items), "requests")
            )
            moment += rng.expovariate(rate)
        samples = await asyncio.gather(*tasks)
        seconds = time.perf_counter() - started
    if all(sample.error for sample in samples):
        raise DrivetrainError(f"no request was answered; the first failed with {samples[0].error}", where=model.url)
    return _summary(samples, seconds, rate, goal)


async def _send(client: Any, model: str, item: WorkItem, options: Mapping[str, Any]) -> Sample:
    import httpx

    sample = Sample()
    body = {
        "model": model,
        "prompt": list(item.prompt),
        "max_tokens": item.max_tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        **options,
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
    except (httpx.HTTPError, ValueError) as error:
        sample.error = f"{type(error).__name__}: {error}"
    sample.total_seconds = time.perf_counter() - begin
    if sample.error is None and sample.first_seconds is None:
        sample.error = "the stream ended without a token"
    return sample


def _note_event(sample: Sample, event: dict[str, Any], now: float) -> None:
    if "error" in event:
        sample.error = event["error"]["message"]
    elif event.get("choices"):
        if sample.first_seconds is None:
            sample.first_seconds = now
        sample.last_seconds = now
        sample.num_tokens += 1
    # Comes after the last choice: an event may carry several tokens, or none of a character that is not whole yet.
    if event.get("usage"):
        sample.num_tokens = event["usage"]["completion_tokens"]


def _summary(samples: Sequence[Sample], seconds: float, rate: float, goal: Goal) -> dict[str, Any]:
    good = [sample for sample in samples if sample.error is None]
    errors: dict[str, int] = {}
    for sample in samples:
        if sample.error:
            errors[sample.error] = errors.get(sample.error, 0) + 1
    output_tokens = sum(sample.num_tokens for sample in good)
    return {
        "requests": len(samples),
        "failed": len(samples) - len(good),
        "errors": errors,
        "rate_offered": rate,
        "seconds": seconds,
        "output_tokens": output_tokens,
        "requests_per_second": len(good) / seconds,
        "output_tokens_per_second": output_tokens / seconds,
        "goodput_requests_per_second": sum(goal.is_met(sample) for sample in samples) / seconds,
        "goal": {"first_token_seconds": goal.first_token_seconds, "token_seconds": goal.token_seconds},
        "goal_met_share": sum(goal.is_met(sample) for sample in samples) / len(samples),
        "time_to_first_token_seconds": percentiles([s.first_seconds for s in good if s.first_seconds is not None]),
        "time_per_token_seconds": percentiles([s.seconds_per_token for s in good if s.seconds_per_token is not None]),
        "request_seconds": percentiles([sample.total_seconds for sample in good]),
    }
