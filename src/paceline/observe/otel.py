"""What does an OpenTelemetry collector get to know? A span of some requests, and metrics of all.

Only loaded where a collector is configured. A request whose client says whether it is traced (W3C
trace context) is traced as it says; of the others a share is. The engine is told of our span as its
parent. The exporters work in threads of their own, and what they cannot get rid of is dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from math import inf
from random import random
from time import monotonic
from typing import Protocol

import structlog
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.metrics.export import MetricsData
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from paceline import __version__
from paceline.domain.commands import Command, Dispatch, Hold, Prefill
from paceline.domain.facts import Fact
from paceline.observe.ended import Over
from paceline.observe.otel_metrics import GenAiMetrics
from paceline.observe.spans import HEADER, STATE, Trace, begun, parent_of, span

log = structlog.get_logger("paceline")

METRICS_S = 15.0
"""Between two exports of metrics."""
COMPLAINT_S = 600.0
"""Between two lines in the log about a collector that takes nothing."""
PATIENCE_S = 2.0
"""With a collector: for one export, and for the last ones at the end."""


class Http(Protocol):
    """A request as its client sent it."""

    path: str
    headers: dict[str, str]


class OpenTelemetry:
    """The way to one collector."""

    def __init__(self, url: str, sample: float, chance: Callable[[], float] = random) -> None:
        """`url`: of its OTLP/HTTP receiver, as http://collector:4318."""
        base = url.rstrip("/")
        _Complaints.take_over()
        self._resource = Resource.create(
            {"service.name": "paceline", "service.version": __version__}
        )
        self._sample = sample
        self._chance = chance
        self._spans = BatchSpanProcessor(
            OTLPSpanExporter(endpoint=f"{base}/v1/traces", timeout=PATIENCE_S)
        )
        self._exporter = OTLPMetricExporter(endpoint=f"{base}/v1/metrics", timeout=PATIENCE_S)
        self._scope = InstrumentationScope("paceline", __version__)
        self._metrics = GenAiMetrics()
        self.count = self._metrics.count
        self.before_reading: Callable[[], object] = lambda: None
        """To be called first: whoever counts may have something left to count."""
        self._traces: dict[str, Trace] = {}
        """Of requests under way, those that are traced."""

    # What happens to a request.

    def begin(self, request_id: str, http: Http) -> None:
        """A request comes in: decide whether it is traced, and have its engine know."""
        headers, parent = http.headers, None
        if HEADER in headers or STATE in headers:
            parent = parent_of(headers)
        if self._chance() < self._sample if parent is None else parent.trace_flags.sampled:
            self._traces[request_id] = begun(headers, parent)

    def saw(self, now: float, fact: Fact, commands: Sequence[Command]) -> None:
        """The kernel has decided: requests wait, or are sent to workers."""
        for command in commands:
            if command.request_id not in self._traces:
                continue
            match command:
                case Hold(request_id, because):
                    self.turned(request_id, "queued", because)
                case Prefill(request_id, worker_id, because):
                    self.turned(request_id, "prefill", because, worker_id)
                case Dispatch(request_id, worker_id, because):
                    self.turned(request_id, "dispatched", because, worker_id)

    def turned(self, request_id: str, turn: str, because: str, worker_id: str = "") -> None:
        """It waits, was sent to a worker, moved, paused or turned away."""
        trace = self._traces.get(request_id)
        if trace is not None:
            trace.turned(turn, because, worker_id)

    def over(self, ended: Over) -> None:
        """These requests are over."""
        for life, outcome in ended:
            trace = self._traces.pop(outcome.request.id, None)
            if trace is not None:
                self._spans.on_end(span(trace, life, outcome, self._resource, self._scope))

    # From start to end.

    async def run(self) -> None:
        """Export the metrics, again and again."""
        while True:
            await asyncio.sleep(METRICS_S)
            try:
                await asyncio.to_thread(self._export, self._data())
            except Exception:  # metrics are not worth a stream
                log.exception("metrics were not exported")

    def _data(self) -> MetricsData:
        self.before_reading()
        return self._metrics.data(self._resource, self._scope)

    def _export(self, data: MetricsData) -> None:
        if data.resource_metrics[0].scope_metrics[0].metrics:
            self._exporter.export(data, timeout_millis=PATIENCE_S * 1e3)

    def close(self) -> None:
        """Export what is left, if the collector takes it soon."""
        with contextlib.suppress(Exception):  # nobody is left to hear of it
            self._export(self._data())
        self._spans.force_flush(int(PATIENCE_S * 1e3))
        self._exporter.shutdown()
        self._spans.shutdown()  # type: ignore[no-untyped-call]


class _Complaints(logging.Handler):
    """What OpenTelemetry says of its troubles every few seconds, said in our words now and then."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._said_at = -inf

    @classmethod
    def take_over(cls) -> None:
        theirs = logging.getLogger("opentelemetry")
        theirs.handlers, theirs.propagate = [cls()], False

    def emit(self, record: logging.LogRecord) -> None:
        if monotonic() - self._said_at > COMPLAINT_S:
            self._said_at = monotonic()
            log.warning("traces or metrics are lost", because=record.getMessage()[:300])
