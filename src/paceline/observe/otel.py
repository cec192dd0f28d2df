"""What does an OpenTelemetry collector get to know? A span of some requests, and metrics of all.

Only loaded where a collector is configured. A request whose client says whether it is traced (W3C
trace context) is traced as it says; of the others a share is. The engine is told of our span as its
parent. The exporters work in threads of their own, and what they cannot get rid of is dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import Callable, Sequence
from math import inf
from random import random
from time import monotonic, time_ns
from typing import Protocol

import structlog
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import (
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
)

from paceline import __version__
from paceline.domain.commands import Command, Dispatch, Hold, Prefill
from paceline.domain.facts import Fact
from paceline.domain.outcome import Outcome
from paceline.observe.ended import Life, Over
from paceline.observe.otel_metrics import GenAiMetrics, attributes

log = structlog.get_logger("paceline")

PARENT = re.compile(
    r"(?!ff|00-.{52}.)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?"
)
"""W3C trace context, section 3.2: later versions may say more, no trace or span is number 0."""
HEADER = "traceparent"
OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/messages": "chat",
    "/v1/responses": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
}
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
        exporter = OTLPSpanExporter(endpoint=f"{base}/v1/traces", timeout=PATIENCE_S)
        self._provider = TracerProvider(
            sampler=ALWAYS_ON, resource=self._resource, shutdown_on_exit=False
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("paceline", __version__)
        self._exporter = OTLPMetricExporter(endpoint=f"{base}/v1/metrics", timeout=PATIENCE_S)
        self._scope = InstrumentationScope("paceline", __version__)
        self._metrics = GenAiMetrics()
        self._open: dict[str, tuple[str, Span | None]] = {}
        """Of requests under way: the operation, and the span of those that are traced."""

    # What happens to a request.

    def begin(self, request_id: str, http: Http) -> None:
        """A request comes in: decide whether it is traced, and have its engine know."""
        operation = OPERATIONS.get(http.path, "other")
        self._open[request_id] = operation, self._span(http.headers)

    def _span(self, headers: dict[str, str]) -> Span | None:
        parent_said = headers.get(HEADER)
        told = PARENT.fullmatch(parent_said) if parent_said is not None else None
        if told is None:
            headers.pop(HEADER, None)  # as the standard wants it of one that cannot be read
            headers.pop("tracestate", None)
        if not (int(told[3], 16) & 1 if told else self._chance() < self._sample):
            return None
        context = None
        if told is not None:
            parent = SpanContext(int(told[1], 16), int(told[2], 16), True, TraceFlags(1))
            context = trace.set_span_in_context(NonRecordingSpan(parent))
        span = self._tracer.start_span("request", context, SpanKind.SERVER)
        ours = span.get_span_context()
        headers[HEADER] = f"00-{ours.trace_id:032x}-{ours.span_id:016x}-01"
        return span

    def saw(self, now: float, fact: Fact, commands: Sequence[Command]) -> None:
        """The kernel has decided: requests wait, or are sent to workers."""
        for command in commands:
            match command:
                case Hold(request_id, because):
                    self.turned(request_id, "queued", because)
                case Prefill(request_id, worker_id, because):
                    self.turned(request_id, "prefill", because, worker_id)
                case Dispatch(request_id, worker_id, because):
                    self.turned(request_id, "dispatched", because, worker_id)

    def turned(self, request_id: str, turn: str, because: str, worker_id: str = "") -> None:
        """It waits, was sent to a worker, moved, paused or turned away."""
        _, span = self._open.get(request_id, ("", None))
        if span is not None:
            where = {"paceline.worker": worker_id} if worker_id else {}
            span.add_event(turn, {"paceline.because": because, **where})

    def over(self, ended: Over) -> None:
        """These requests are over."""
        for life, outcome in ended:
            self.closed(life, outcome)

    def closed(self, life: Life, outcome: Outcome) -> None:
        """It is over."""
        found = self._open.pop(outcome.request.id, None)
        if found is None:
            return
        operation, span = found
        error = error_type(outcome)
        self._metrics.closed(operation, outcome, error)
        if span is not None:
            self._end(span, life, outcome, operation, error)

    def _end(self, span: Span, life: Life, outcome: Outcome, operation: str, error: str) -> None:
        request, to_ns = outcome.request, time_ns() - int(monotonic() * 1e9)

        def unix_ns(at: float) -> int:
            return to_ns + int(at * 1e9)

        span.update_name(f"{operation} {request.model}")
        span.set_attributes(attributes(operation, request.model, error))
        span.set_attributes(
            {name: value for name, value in details(outcome).items() if value not in (None, "")}
        )
        if life.first_at:
            span.add_event("first token", None, unix_ns(life.first_at))
        if error:
            span.set_status(Status(StatusCode.ERROR, outcome.error))
        span.end(unix_ns(life.done_at))

    # From start to end.

    async def run(self) -> None:
        """Export the metrics, again and again."""
        while True:
            await asyncio.sleep(METRICS_S)
            try:
                await asyncio.to_thread(self._export)
            except Exception:  # metrics are not worth a stream
                log.exception("metrics were not exported")

    def _export(self) -> None:
        data = self._metrics.data(self._resource, self._scope)
        if data.resource_metrics[0].scope_metrics[0].metrics:
            self._exporter.export(data, timeout_millis=PATIENCE_S * 1e3)

    def close(self) -> None:
        """Export what is left, if the collector takes it soon."""
        with contextlib.suppress(Exception):  # nobody is left to hear of it
            self._export()
        self._provider.force_flush(int(PATIENCE_S * 1e3))
        self._exporter.shutdown()
        self._provider.shutdown()


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


def error_type(outcome: Outcome) -> str:
    """What went wrong, in few words; empty if nothing did."""
    if outcome.status >= 400:
        return str(outcome.status)
    return "broken_stream" if outcome.error else ""


def details(outcome: Outcome) -> dict[str, str | int | float | bool | None]:
    """What else is known of a request. No word of a prompt or an answer is among it."""
    request, given, predicted = outcome.request, outcome.degraded_to, outcome.predicted
    return {
        "gen_ai.request.max_tokens": request.max_tokens,
        "gen_ai.response.model": (given or request).model,
        "gen_ai.usage.input_tokens": outcome.prompt_tokens,
        "gen_ai.usage.output_tokens": outcome.output_tokens,
        "gen_ai.usage.cache_read.input_tokens": outcome.cached_tokens,
        "http.response.status_code": outcome.status,
        "server.address": outcome.worker,
        "paceline.request_id": request.id,
        "paceline.tenant": request.tenant,
        "paceline.tier": request.tier,
        "paceline.to_tier": given.tier if given is not None else None,
        "paceline.worker": outcome.worker,
        "paceline.kept": outcome.kept,
        "paceline.because": outcome.because,
        "paceline.attempts": outcome.attempts,
        "paceline.queued_s": outcome.queued_s,
        "paceline.ttft_s": outcome.ttft_s,
        "paceline.itl_s": outcome.itl_s,
        "paceline.stall_s": outcome.stall_s,
        "paceline.predicted_ttft_s": predicted.ttft_s if predicted else None,
        "paceline.predicted_itl_s": predicted.itl_s if predicted else None,
    }
