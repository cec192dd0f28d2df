"""Which metrics does an OpenTelemetry collector get? Those of the GenAI conventions.

They are counted here, and handed to the exporter as they stand.
"""

from __future__ import annotations

from time import time_ns

from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Histogram,
    HistogramDataPoint,
    Metric,
    MetricsData,
    ResourceMetrics,
    ScopeMetrics,
)
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from paceline.observe.counts import Counts
from paceline.observe.sheet import Sheet, Who

OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/messages": "chat",
    "/v1/responses": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
}
SECONDS = (
    *(0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64),
    *(1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92),
)
TTFT_SECONDS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1),
    *(0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
)
TOKEN_SECONDS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
"""Bounds as the conventions advise; Prometheus gets finer ones."""
METRICS = (
    ("gen_ai.server.request.duration", "From arrival to the end of the answer.", SECONDS),
    ("gen_ai.server.time_to_first_token", "From arrival to the first token.", TTFT_SECONDS),
    (
        "gen_ai.server.time_per_output_token",
        "A request's mean gap between tokens.",
        TOKEN_SECONDS,
    ),
)

Key = tuple[str, str, str]
"""Operation, model, and what went wrong."""


class GenAiMetrics:
    """Counts of all requests since the start."""

    def __init__(self) -> None:
        self._began_ns = time_ns()
        self._seen = Counts(_key, bounds=[bounds for _, _, bounds in METRICS])

    def count(self, sheet: Sheet) -> None:
        """These requests are over."""
        rows = self._seen.rows(sheet)
        streams, gaps = sheet.streams, sheet.gaps
        duration, first, each = self._seen.histograms
        duration.add(rows, sheet.seconds)
        first.add(rows[streams], sheet.ttft_s[streams])
        each.add(rows[gaps], sheet.itl_s[gaps])

    def data(self, resource: Resource, scope: InstrumentationScope) -> MetricsData:
        """All of them, as the exporter takes them."""
        now = time_ns()
        metrics = [
            Metric(name, text, "s", Histogram(points, AggregationTemporality.CUMULATIVE))
            for place, (name, text, _) in enumerate(METRICS)
            if (points := self._points(place, now))
        ]
        return MetricsData([ResourceMetrics(resource, [ScopeMetrics(scope, metrics, "")], "")])

    def _points(self, place: int, now: int) -> list[HistogramDataPoint]:
        found = self._seen.histograms[place]
        return [
            HistogramDataPoint(
                attributes=attributes(*key),
                start_time_unix_nano=self._began_ns,
                time_unix_nano=now,
                count=count,
                sum=float(found.seconds[row]),
                bucket_counts=found.counts[row].tolist(),
                explicit_bounds=found.bounds,
                min=float(found.least[row]),
                max=float(found.most[row]),
            )
            for key, row in list(self._seen.series.items())
            if (count := int(found.counts[row].sum()))
        ]


def _key(who: Who) -> Key:
    return operation_of(who.path), who.model, error_type(who.status, who.broken)


def operation_of(path: str) -> str:
    """In the conventions' words."""
    return OPERATIONS.get(path, "other")


def error_type(status: int, broken: bool) -> str:
    """What went wrong, in few words; empty if nothing did."""
    if status >= 400:
        return str(status)
    return "broken_stream" if broken else ""


def attributes(operation: str, model: str, error: str) -> dict[str, str]:
    """In the conventions' words."""
    told = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "paceline",
        "gen_ai.request.model": model,
    }
    return told | {"error.type": error} if error else told
