"""What the engine counts. One registry an engine, in Prometheus' form; ``snapshot`` gives the same as plain numbers.

What changes with every step is kept in plain numbers, which a scrape reads; the client library's own counters take a
lock each, too much for a token.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric

from drivetrain.serving.timing import Phase
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


class _Times:
    """A histogram of seconds to which many equal values are added at once."""

    def __init__(self) -> None:
        self._counts = [0] * (len(_SECONDS) + 1)
        self._sum = 0.0

    def add(self, seconds: float, count: int = 1) -> None:
        self._counts[bisect_left(_SECONDS, seconds)] += count
        self._sum += seconds * count

    def family(self, name: str, meaning: str) -> Metric:
        bounds = [*(str(float(bound)) for bound in _SECONDS), "+Inf"]
        return HistogramMetricFamily(
            name, meaning, buckets=list(zip(bounds, accumulate(self._counts), strict=True)), sum_value=self._sum
        )


class _StepNumbers:
    """What every step changes."""

    def __init__(self) -> None:
        self.steps = 0
        self.output_tokens = 0
        self.computed_tokens = 0
        self.running = 0
        self.waiting = 0
        self.kv_usage = 0.0
        self.phase_seconds: Mapping[Phase, float] = dict.fromkeys(Phase, 0.0)
        self.step_seconds = _Times()
        self.between_seconds = _Times()

    def collect(self) -> Iterator[Metric]:
        """Called by the registry when it is scraped."""
        yield CounterMetricFamily("drivetrain_steps", "Steps run", value=self.steps)
        yield CounterMetricFamily("drivetrain_output_tokens", "Tokens generated", value=self.output_tokens)
        yield CounterMetricFamily(
            "drivetrain_computed_tokens", "Tokens run through the model", value=self.computed_tokens
        )
        yield GaugeMetricFamily("drivetrain_running", "Sequences that hold KV blocks", value=self.running)
        yield GaugeMetricFamily("drivetrain_waiting", "Sequences that wait", value=self.waiting)
        yield GaugeMetricFamily("drivetrain_kv_usage_ratio", "Share of KV blocks in use, 0 to 1", value=self.kv_usage)
        phases = CounterMetricFamily(
            "drivetrain_step_phase_seconds", "Time of the step loop by phase", labels=["phase"]
        )
        for phase, seconds in self.phase_seconds.items():
            phases.add_metric([phase.value], seconds)
        yield phases
        yield self.step_seconds.family("drivetrain_step_seconds", "One step")
        yield self.between_seconds.family("drivetrain_time_per_token_seconds", "Token to token")


class EngineMetrics:
    """Counters, gauges and histograms of one engine. Written by the step loop only; read from any thread."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        self._added = Counter("drivetrain_requests", "Requests accepted", registry=r)
        self._finished = Counter("drivetrain_sequences_finished", "Sequences ended", ["reason"], registry=r)
        self._prompt_tokens = Counter("drivetrain_prompt_tokens", "Prompt tokens accepted", registry=r)
        self._looked_up = Counter("drivetrain_prefix_lookup_tokens", "Prompt tokens looked up in the cache", registry=r)
        self._hits = Counter("drivetrain_prefix_hit_tokens", "Prompt tokens found in the prefix cache", registry=r)
        self._preemptions = Counter("drivetrain_preemptions", "Sequences that gave up their blocks", registry=r)
        self._failed_steps = Counter("drivetrain_failed_steps", "Steps that raised", registry=r)
        self._fallbacks = Counter("drivetrain_fallbacks", "Choices by auto that passed over a better part", registry=r)
        self._swaps = Counter("drivetrain_swaps", "Parts exchanged while serving", ["kind", "outcome"], registry=r)
        self._epoch = Gauge("drivetrain_epoch", "How often parts were exchanged or put back", registry=r)
        self._first = Histogram(
            "drivetrain_time_to_first_token_seconds", "Arrival to first token", buckets=_SECONDS, registry=r
        )
        self._queued = Histogram("drivetrain_queue_seconds", "Arrival to first step", buckets=_SECONDS, registry=r)
        self._whole = Histogram("drivetrain_request_seconds", "Arrival to last token", buckets=_SECONDS, registry=r)
        self._step_numbers = _StepNumbers()
        r.register(self._step_numbers)
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
        self._step_numbers.output_tokens += 1
        self._first.observe(seconds)
        self._recent_first.append(seconds)

    def next_tokens(self, seconds: float, count: int) -> None:
        """``count`` sequences got a token ``seconds`` after their last one."""
        self._step_numbers.output_tokens += count
        self._step_numbers.between_seconds.add(seconds, count)
        self._recent_between.extend([seconds] * count)

    def preempted(self) -> None:
        self._preemptions.inc()

    def step_failed(self) -> None:
        self._failed_steps.inc()

    def fell_back(self, count: int) -> None:
        self._fallbacks.inc(count)

    def swapped(self, kind: str, outcome: str, epoch: int) -> None:
        self._swaps.labels(kind, outcome).inc()
        self._epoch.set(epoch)

    def step(
        self,
        seconds: float,
        num_tokens: int,
        num_running: int,
        num_waiting: int,
        kv_usage: float,
        phase_seconds: Mapping[Phase, float],
    ) -> None:
        """phase_seconds: since the start, by phase."""
        numbers = self._step_numbers
        numbers.steps += 1
        numbers.step_seconds.add(seconds)
        numbers.computed_tokens += num_tokens
        numbers.phase_seconds = phase_seconds
        self.peak_kv_usage = max(self.peak_kv_usage, kv_usage)
        self.levels(num_running, num_waiting, kv_usage)

    def levels(self, num_running: int, num_waiting: int, kv_usage: float) -> None:
        """What stands now; also called when the engine falls idle, so that gauges do not keep their last busy value."""
        numbers = self._step_numbers
        numbers.running, numbers.waiting, numbers.kv_usage = num_running, num_waiting, kv_usage

    @property
    def num_steps(self) -> int:
        """Steps made since the start."""
        return self._step_numbers.steps

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
            "running": self._step_numbers.running,
            "waiting": self._step_numbers.waiting,
            "prompt_tokens": self._total("drivetrain_prompt_tokens_total"),
            "output_tokens": self._step_numbers.output_tokens,
            "computed_tokens": self._step_numbers.computed_tokens,
            "steps": self._step_numbers.steps,
            "failed_steps": self._total("drivetrain_failed_steps_total"),
            "preemptions": self._total("drivetrain_preemptions_total"),
            "fallbacks": self._total("drivetrain_fallbacks_total"),
            "kv_usage": self._step_numbers.kv_usage,
            "peak_kv_usage": self.peak_kv_usage,
            "prefix_hit_rate": hits / looked_up if looked_up else 0.0,
            "prefix_hit_tokens": hits,
            "phase_seconds": {phase.value: seconds for phase, seconds in self._step_numbers.phase_seconds.items()},
            "time_to_first_token_seconds": {name: percentile(first, share) for name, share in _SHARES.items()},
            "time_per_token_seconds": {name: percentile(between, share) for name, share in _SHARES.items()},
        }


_SHARES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
