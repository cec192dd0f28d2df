"""What is said while Paceline runs? One line a request, and what operators must know.

On a terminal the lines are for eyes; else each is one JSON object, so that it can be searched.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from functools import partial
from typing import Any, BinaryIO

import msgspec
import structlog
from structlog.typing import EventDict, FilteringBoundLogger, WrappedLogger

from paceline.domain.outcome import Outcome

LEVELS = {  # nothing here is said at "critical"
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "off": logging.CRITICAL,
}


def configure(
    level: str = "info", style: str = "auto", stream: BinaryIO | None = None
) -> FilteringBoundLogger:
    """Set up structlog for the whole process. The logger returned is the cheapest to log with.

    `style` is json, pretty, or auto: pretty on a terminal. `stream` is stderr unless told.
    """
    out = sys.stderr.buffer if stream is None else stream
    pretty = style == "pretty" or (style == "auto" and out.isatty())
    processors: list[Any] = [structlog.processors.add_log_level]
    if pretty:
        clock = structlog.processors.TimeStamper("%H:%M:%S", utc=False)
        # Texts as repr: a client names the model, and its escape codes must not reach a terminal.
        # Tracebacks without locals: those hold prompts and keys.
        console = structlog.dev.ConsoleRenderer(
            colors=out.isatty(),
            repr_native_str=True,
            exception_formatter=structlog.dev.plain_traceback,
        )
        processors += [clock, console, _as_bytes]
    else:
        clock = structlog.processors.TimeStamper("iso")
        processors += [clock, structlog.processors.format_exc_info, _as_json]
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        logger_factory=structlog.BytesLoggerFactory(out),
        cache_logger_on_first_use=False,  # a reload may configure again
    )
    log: FilteringBoundLogger = structlog.get_logger().bind()
    global _say
    write = structlog.BytesLogger(out).msg
    if LEVELS[level] > logging.INFO:
        _say = None
    elif pretty:
        _say = partial(_as_events, log)
    else:
        _say = lambda lines: write(_encoder.encode_lines(lines)[:-1])  # noqa: E731
    return log


FOREVER_S = 1e9


class RequestLine(msgspec.Struct, omit_defaults=True, kw_only=True, gc=False):
    """What became of a request; fields of which nothing is known are left out.

    Nothing here is of headers or text: no key and no word of a client can get into a log.
    """

    id: str
    tenant: str = ""
    tier: str = ""
    model: str = ""
    to_tier: str = ""
    to_model: str = ""
    worker: str = ""
    prefilled_at: str = ""
    prefill_s: float | None = None
    status: int
    error: str = ""
    because: str = ""
    attempts: int
    moved: int = 0
    paused: int = 0
    kept: bool
    queued_s: float
    predicted_ttft_s: float | None = None
    ttft_s: float
    predicted_itl_s: float | None = None
    itl_s: float
    stall_s: float
    seconds: float
    prompt_bytes: int
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int
    event: str
    level: str
    timestamp: datetime


def request_lines(over: Iterable[tuple[float, Outcome]]) -> None:
    """Say what became of requests, each at its Unix time.

    As JSON, a line costs 5 µs: it goes straight to where structlog's lines go.
    """
    if _say is not None:
        with contextlib.suppress(OSError):  # a full disk or a closed pipe costs no request
            _say([_line(at, outcome) for at, outcome in over])


def _line(at: float, outcome: Outcome) -> RequestLine:
    request, predicted, given = outcome.request, outcome.predicted, outcome.degraded_to
    return RequestLine(
        id=request.id,
        tenant=request.tenant,
        tier=request.tier,
        model=request.model,
        to_tier=given.tier if given is not None else "",
        to_model=given.model if given is not None else "",
        worker=outcome.worker,
        prefilled_at=outcome.prefilled_at,
        prefill_s=_to_us(outcome.prefill_s) or None,
        status=outcome.status,
        error=outcome.error,
        because=outcome.because,
        attempts=outcome.attempts,
        moved=outcome.moved,
        paused=outcome.paused,
        kept=outcome.kept,
        queued_s=_to_us(outcome.queued_s),
        predicted_ttft_s=_to_us(predicted.ttft_s) if predicted is not None else None,
        ttft_s=_to_us(outcome.ttft_s),
        predicted_itl_s=_to_us(predicted.itl_s) if predicted is not None else None,
        itl_s=_to_us(outcome.itl_s),
        stall_s=_to_us(outcome.stall_s),
        seconds=_to_us(outcome.seconds),
        prompt_bytes=request.prompt_bytes,
        prompt_tokens=outcome.prompt_tokens,
        cached_tokens=outcome.cached_tokens,
        output_tokens=outcome.output_tokens,
        event="request",
        level="info",
        timestamp=datetime.fromtimestamp(at, UTC),
    )


def _to_us(seconds: float) -> float:
    """Without the digits after µs, which are noise; in a third of the time that `round` takes."""
    return int(seconds * 1e6 + 0.5) / 1e6 if seconds < FOREVER_S else seconds


def _as_events(log: FilteringBoundLogger, lines: Iterable[RequestLine]) -> None:
    """To be made pretty; the time and the level are structlog's."""
    for line in lines:
        known = {name: v for name, v in msgspec.structs.asdict(line).items() if v not in (None, "")}
        log.info(**{name: v for name, v in known.items() if name not in ("level", "timestamp")})


_say: Callable[[list[RequestLine]], object] | None = None
"""What is done with lines of requests; None: they are not wanted."""
_encoder = msgspec.json.Encoder(enc_hook=repr)
_encode = _encoder.encode


def _as_json(_logger: WrappedLogger, _method: str, event: EventDict) -> bytes:
    return _encode(event)


def _as_bytes(_logger: WrappedLogger, _method: str, text: str) -> bytes:
    return text.encode("utf-8", "replace")
