"""What the engine counts. One registry an engine, in Prometheus' form; ``snapshot`` gives the same as plain numbers."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from drivetrain.serving.types import FinishReason

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_RECENT = 4096


def percentile(values: Sequence[float], share: float) -> float | None:
    """The value below which ``share`` (0 to 1) of the values lie, by linear interpolation; None without values."""
    if not values:
        return None
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


class EngineMetrics:
    """Counters, gauges and histograms of one engine. Written by the step loop only; read from any thread."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        self._added = Counter("drivetrain_requests", "Requests accepted", registry=r)
        self._finished = Counter("drivetrain_sequences_finished", "Sequences ended", ["reason"], registry=r)
        self._prompt_tokens = Counter("drivetrain_prompt_tokens", "Prompt tokens accepted", registry=r)
        self._output_tokens = Counter("drivetrain_output_tokens", "Tokens generated", registry=r)
        self._computed_tokens = Counter("drivetrain_computed_tokens", "Tokens run through the model", registry=r)
        self._looked_up = Counter("drivetrain_prefix_lookup_tokens", "Prompt tokens looked up in the cache", registry=r)
        self._hits = Counter("drivetrain_prefix_hit_tokens", "Prompt tokens found in the prefix cache", registry=r)
        self._preemptions = Counter("drivetrain_preemptions", "Sequences that gave up their blocks", registry=r)
        self._failed_steps = Counter("drivetrain_failed_steps", "Steps that raised", registry=r)
        self._fallbacks = Counter("drivetrain_fallbacks", "Choices by auto that passed over a better part", registry=r)
        self._swaps = Counter("drivetrain_swaps", "Parts exchanged while serving", ["kind", "outcome"], registry=r)
        self._epoch = Gauge("drivetrain_epoch", "How often parts were exchanged or put back", registry=r)
        self._steps = Counter("drivetrain_steps", "Steps run", registry=r)
        self._running = Gauge("drivetrain_running", "Sequences that hold KV blocks", registry=r)
        self._waiting = Gauge("drivetrain_waiting", "Sequences that wait", registry=r)
        self._kv_usage = Gauge("drivetrain_kv_usage_ratio", "Share of KV blocks in use, 0 to 1", registry=r)
        self._step_seconds = Histogram("drivetrain_step_seconds", "One step", buckets=_SECONDS, registry=r)
        self._first = Histogram(
            "drivetrain_time_to_first_token_seconds", "Arrival to first token", buckets=_SECONDS, registry=r
        )
        self._between = Histogram("drivetrain_time_per_token_seconds", "Token to token", buckets=_SECONDS, registry=r)
        self._queued = Histogram("drivetrain_queue_seconds", "Arrival to first step", buckets=_SECONDS, registry=r)
        self._whole = Histogram("drivetrain_request_seconds", "Arrival to last token", buckets=_SECONDS, registry=r)
        self._recent_first: deque[float] = deque(maxlen=_RECENT)
        self._recent_between: deque[float] = deque(maxlen=_RECENT)
        self.peak_kv_usage = 0.0

    def request_added(self, num_prompt_tokens: int) -> None:
        self._added.inc()
        self._prompt_tokens.inc(num_prompt_tokens)

    def request_finished(self, reason: FinishReason, seconds: float) -> None:
        self._finished.labels(reason.value).inc()
        self._whole.observe(seconds)

    def prompt_looked_up(self, num_tokens: int, num_hits: int) -> None:
        self._looked_up.inc(num_tokens)
        self._hits.inc(num_hits)

    def queue_seconds(self, seconds: float) -> None:
        self._queued.observe(seconds)

    def first_token(self, seconds: float) -> None:
        self._output_tokens.inc()
        self._first.observe(seconds)
        self._recent_first.append(seconds)

    def next_token(self, seconds: float) -> None:
        self._output_tokens.inc()
        self._between.observe(seconds)
        self._recent_between.append(seconds)

    def preempted(self) -> None:
        self._preemptions.inc()

    def step_failed(self) -> None:
        self._failed_steps.inc()

    def fell_back(self, count: int) -> None:
        self._fallbacks.inc(count)

    def swapped(self, kind: str, outcome: str, epoch: int) -> None:
        self._swaps.labels(kind, outcome).inc()
        self._epoch.set(epoch)

    def step(self, seconds: float, num_tokens: int, num_running: int, num_waiting: int, kv_usage: float) -> None:
        self._steps.inc()
        self._step_seconds.observe(seconds)
        self._computed_tokens.inc(num_tokens)
        self.peak_kv_usage = max(self.peak_kv_usage, kv_usage)
        self.levels(num_running, num_waiting, kv_usage)

    def levels(self, num_running: int, num_waiting: int, kv_usage: float) -> None:
        """What stands now; also called when the engine falls idle, so that gauges do not keep their last busy value."""
        self._running.set(num_running)
        self._waiting.set(num_waiting)
        self._kv_usage.set(kv_usage)

    def _total(self, name: str) -> int:
        return int(self.registry.get_sample_value(name) or 0)

    def snapshot(self) -> dict[str, Any]:
        """The counters as plain numbers; times in seconds over the most recent tokens."""
        looked_up, hits = (
            self._total("drivetrain_prefix_lookup_tokens_total"),
            self._total("drivetrain_prefix_hit_tokens_total"),
        )
        first, between = list(self._recent_first), list(self._recent_between)
        return {
            "requests": self._total("drivetrain_requests_total"),
            "running": self._total("drivetrain_running"),
            "waiting": self._total("drivetrain_waiting"),
            "prompt_tokens": self._total("drivetrain_prompt_tokens_total"),
            "output_tokens": self._total("drivetrain_output_tokens_total"),
            "computed_tokens": self._total("drivetrain_computed_tokens_total"),
            "steps": self._total("drivetrain_steps_total"),
            "failed_steps": self._total("drivetrain_failed_steps_total"),
            "preemptions": self._total("drivetrain_preemptions_total"),
            "fallbacks": self._total("drivetrain_fallbacks_total"),
            "kv_usage": self.registry.get_sample_value("drivetrain_kv_usage_ratio") or 0.0,
            "peak_kv_usage": self.peak_kv_usage,
            "prefix_hit_rate": hits / looked_up if looked_up else 0.0,
            "prefix_hit_tokens": hits,
            "time_to_first_token_seconds": {name: percentile(first, share) for name, share in _SHARES.items()},
            "time_per_token_seconds": {name: percentile(between, share) for name, share in _SHARES.items()},
        }


_SHARES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
