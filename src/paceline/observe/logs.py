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


class RequestLine(msgspec.Struct, omit_defaults=True, gc=False):
    """What became of a request; fields of which nothing is known are left out.

    Nothing here is of headers or text: no key and no word of a client can get into a log.
    """

    timestamp: datetime
    level: str
    event: str
    id: str
    status: int
    attempts: int
    kept: bool
    queued_s: float
    ttft_s: float
    itl_s: float
    stall_s: float
    seconds: float
    prompt_bytes: int
    output_tokens: int
    tenant: str = ""
    tier: str = ""
    model: str = ""
    worker: str = ""
    because: str = ""
    error: str = ""
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    predicted_ttft_s: float | None = None
    predicted_itl_s: float | None = None
    to_tier: str = ""
    to_model: str = ""
    prefilled_at: str = ""
    prefill_s: float | None = None
    moved: int = 0
    paused: int = 0


def request_lines(over: Iterable[tuple[float, Outcome]]) -> None:
    """Say what became of requests, each at its Unix time.

    As JSON, a line costs 5 µs: it goes straight to where structlog's lines go.
    """
    if _say is not None:
        with contextlib.suppress(OSError):  # a full disk or a closed pipe costs no request
            _say([_line(at, outcome) for at, outcome in over])


def _line(at: float, outcome: Outcome) -> RequestLine:
    request, predicted, given = outcome.request, outcome.predicted, outcome.degraded_to
    return RequestLine(  # by their places: by their names it takes ten times as long; to µs
        datetime.fromtimestamp(at, UTC),
        "info",
        "request",
        request.id,
        outcome.status,
        outcome.attempts,
        outcome.kept,
        int(outcome.queued_s * 1e6 + 0.5) / 1e6,
        int(outcome.ttft_s * 1e6 + 0.5) / 1e6,
        int(outcome.itl_s * 1e6 + 0.5) / 1e6,
        int(outcome.stall_s * 1e6 + 0.5) / 1e6,
        int(outcome.seconds * 1e6 + 0.5) / 1e6,
        request.prompt_bytes,
        outcome.output_tokens,
        request.tenant,
        request.tier,
        request.model,
        outcome.worker,
        outcome.because,
        outcome.error,
        outcome.prompt_tokens,
        outcome.cached_tokens,
        _to_us(predicted.ttft_s) if predicted is not None else None,
        _to_us(predicted.itl_s) if predicted is not None else None,
        given.tier if given is not None else "",
        given.model if given is not None else "",
        outcome.prefilled_at,
        _to_us(outcome.prefill_s) if outcome.prefill_s else None,
        outcome.moved,
        outcome.paused,
    )


def _to_us(seconds: float) -> float:
    """Without the digits after µs, which are noise; in a third of the time that `round` takes."""
    return int(seconds * 1e6 + 0.5) / 1e6 if seconds < FOREVER_S else seconds


def _as_events(log: FilteringBoundLogger, lines: Iterable[RequestLine]) -> None:
    """To be made pretty; the time and the level are structlog's."""
    for line in lines:
        told = msgspec.to_builtins(line)
        log.info(**{name: told[name] for name in told if name not in ("timestamp", "level")})


_say: Callable[[list[RequestLine]], object] | None = None
"""What is done with lines of requests; None: they are not wanted."""
_encoder = msgspec.json.Encoder(enc_hook=repr)
_encode = _encoder.encode


def _as_json(_logger: WrappedLogger, _method: str, event: EventDict) -> bytes:
    return _encode(event)


def _as_bytes(_logger: WrappedLogger, _method: str, text: str) -> bytes:
    return text.encode("utf-8", "replace")
