"""How many requests, how many tokens, how soon? Counted for Prometheus at a µs a request.

The library's own counters look every value up under a lock, and its histograms walk their buckets:
12 µs a request. Here they are plain numbers, put into the library's families when it asks.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from paceline.domain.outcome import Outcome

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
ITL_SECONDS = (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.12, 0.2, 0.5, 1.0, 2.0)
LABELS = ("model", "tier", "worker")

Labels = tuple[str, str, str]
"""Model, tier and worker."""
Key = tuple[str, str, str, str, int]
"""The same, then tenant and status."""


class Histogram:
    """How often something took how long."""

    __slots__ = ("bounds", "counts", "seconds")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.seconds = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(self.bounds, seconds)] += 1
        self.seconds += seconds


class _Answers:
    """What a worker's sound answers to one tier come to."""

    __slots__ = ("cached", "itl", "kept", "output", "prompt", "queue", "stall", "ttft")

    def __init__(self) -> None:
        self.kept = self.prompt = self.cached = self.output = 0
        self.queue, self.ttft, self.stall = (Histogram(SECONDS) for _ in range(3))
        self.itl = Histogram(ITL_SECONDS)


class RequestMetrics(Collector):
    """All requests since the start, but for those of workers that are gone."""

    def __init__(self) -> None:
        self._requests: dict[Key, int] = {}
        self._answers: dict[Labels, _Answers] = {}

    def closed(self, outcome: Outcome, tenant: str) -> None:
        """A request is over. `tenant`: as it is called in labels."""
        request, status = outcome.request, outcome.status
        labels = request.model, request.tier, outcome.worker
        key = (*labels, tenant, status)
        self._requests[key] = self._requests.get(key, 0) + 1
        found = self._answers.get(labels)
        if found is None:
            found = self._answers[labels] = _Answers()
        if status >= 400 or outcome.error:
            return
        if outcome.kept:
            found.kept += 1
        found.prompt += outcome.prompt_tokens or 0
        found.cached += outcome.cached_tokens or 0
        found.output += outcome.output_tokens
        found.queue.add(outcome.queued_s)
        if request.streaming:
            found.ttft.add(outcome.ttft_s)
            if outcome.itl_s:
                found.itl.add(outcome.itl_s)
                found.stall.add(outcome.stall_s)

    def forget(self, gone: Callable[[str], bool]) -> None:
        """Of these workers nothing more is told."""
        self._requests = {key: n for key, n in self._requests.items() if not gone(key[2])}
        self._answers = {key: a for key, a in self._answers.items() if not gone(key[2])}

    def collect(self) -> Iterator[Metric]:
        labels = ("model", "tier", "worker", "tenant", "status")
        requests = CounterMetricFamily(
            "paceline_requests", "Requests that are over.", labels=labels
        )
        for (*of, status), count in self._requests.items():
            requests.add_metric((*of, str(status)), count)
        yield requests
        kept = CounterMetricFamily(
            "paceline_promises_kept", "Requests whose promise was kept.", labels=LABELS
        )
        tokens = CounterMetricFamily(
            "paceline_tokens",
            "Tokens, by direction: prompt, cached (of the prompt), output.",
            labels=(*LABELS, "direction"),
        )
        for who, found in self._answers.items():
            kept.add_metric(who, found.kept)
            for direction in ("prompt", "cached", "output"):
                tokens.add_metric((*who, direction), getattr(found, direction))
        yield kept
        yield tokens
        for name, (metric, text) in HISTOGRAMS.items():
            family = HistogramMetricFamily(metric, text, labels=LABELS)
            for who, found in self._answers.items():
                histogram: Histogram = getattr(found, name)
                family.add_metric(who, *_told(histogram))
            yield family


def _told(histogram: Histogram) -> tuple[list[tuple[str, float]], float]:
    names = [*map(floatToGoString, histogram.bounds), "+Inf"]
    buckets = [(n, float(c)) for n, c in zip(names, accumulate(histogram.counts), strict=True)]
    return buckets, histogram.seconds


HISTOGRAMS: Mapping[str, tuple[str, str]] = {
    "queue": ("paceline_queue_seconds", "From arrival until sent to the worker."),
    "ttft": ("paceline_time_to_first_token_seconds", "From arrival to the first token."),
    "itl": (
        "paceline_request_inter_token_latency_seconds",
        "A request's mean gap between tokens.",
    ),
    "stall": ("paceline_worst_stall_seconds", "A request's worst gap between tokens."),
}
"""Name and text of each."""
