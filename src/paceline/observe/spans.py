"""How does a request become a span?

Between its begin and its end only a few marks are kept; the span is made at once at the end. The
SDK's own way, by a tracer, took four times as long, most of it while the request waited.
"""

from __future__ import annotations

import re
from collections import deque
from time import monotonic, time_ns

import msgspec
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags
from opentelemetry.util.types import AttributeValue

from paceline.domain.outcome import Outcome
from paceline.observe.ended import Life
from paceline.observe.otel_metrics import attributes, error_type, operation_of

PARENT = re.compile(
    r"(?!ff|00-.{52}.)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?"
)
"""W3C trace context, section 3.2: later versions may say more, no trace or span is number 0."""
HEADER, STATE = "traceparent", "tracestate"
MOST_EVENTS = 128
"""As many as OpenTelemetry keeps of a span."""

_ids = RandomIdGenerator()
_SAMPLED = TraceFlags(TraceFlags.SAMPLED)


class Trace(msgspec.Struct):
    """A request that is traced and not over."""

    context: SpanContext
    parent: SpanContext | None
    began_ns: int
    events: deque[Event]

    def turned(self, turn: str, because: str, worker_id: str) -> None:
        """It waits, was sent to a worker, moved, paused or turned away."""
        where = {"paceline.worker": worker_id} if worker_id else {}
        self.events.append(Event(turn, {"paceline.because": because, **where}, time_ns()))


def parent_of(headers: dict[str, str]) -> SpanContext | None:
    """What its client says; what cannot be read is taken out, as the standard wants it."""
    told = PARENT.fullmatch(headers.get(HEADER, ""))
    if told is None:
        headers.pop(HEADER, None)
        headers.pop(STATE, None)
        return None
    return SpanContext(int(told[1], 16), int(told[2], 16), True, TraceFlags(int(told[3], 16) & 1))


def begun(headers: dict[str, str], parent: SpanContext | None) -> Trace:
    """A request comes in that is to be traced: its engine is told."""
    trace_id = parent.trace_id if parent is not None else _ids.generate_trace_id()
    context = SpanContext(trace_id, _ids.generate_span_id(), False, _SAMPLED)
    headers[HEADER] = f"00-{trace_id:032x}-{context.span_id:016x}-01"
    return Trace(context, parent, time_ns(), deque(maxlen=MOST_EVENTS))


def span(
    trace: Trace, life: Life, outcome: Outcome, resource: Resource, scope: InstrumentationScope
) -> ReadableSpan:
    """It is over."""
    request, to_ns = outcome.request, time_ns() - int(monotonic() * 1e9)

    def unix_ns(at: float) -> int:
        return to_ns + int(at * 1e9)

    operation, events = operation_of(outcome.path), trace.events
    error = error_type(outcome.status, outcome.error != "")
    if life.first_at:
        events.append(Event("first token", None, unix_ns(life.first_at)))
    told: dict[str, AttributeValue] = {**attributes(operation, request.model, error)}
    known = details(outcome).items()
    told |= {name: value for name, value in known if value is not None and value != ""}
    return ReadableSpan(
        f"{operation} {request.model}",
        trace.context,
        trace.parent,
        resource,
        told,
        events,
        kind=SpanKind.SERVER,
        status=Status(StatusCode.ERROR, outcome.error) if error else Status(),
        start_time=trace.began_ns,
        end_time=unix_ns(life.done_at),
        instrumentation_scope=scope,
    )


def details(outcome: Outcome) -> dict[str, str | int | float | None]:
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
