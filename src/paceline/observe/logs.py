"""What is said while Paceline runs? One line a request, and what operators must know.

On a terminal the lines are for eyes; else each is one JSON object, so that it can be searched.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from typing import Any, BinaryIO

import msgspec
import structlog
from structlog.typing import EventDict, FilteringBoundLogger, WrappedLogger

LEVELS = {  # nothing here is said at "critical"
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "off": logging.CRITICAL,
}


class RequestLine(msgspec.Struct, frozen=True, gc=False, omit_defaults=True, kw_only=True):
    """What became of one request. Fields that nothing is known of are left out of the line.

    It has no field for headers or text, so that no key and no word of a client can get into a log.
    """

    id: str
    tenant: str
    tier: str
    model: str
    status: int
    """The HTTP status that the client saw; 499 if it left before its answer was complete."""
    worker: str = ""
    """The last one tried; empty if none was."""
    because: str = ""
    """Why this worker, or why none."""
    attempts: int = 0
    predicted_ttft_s: float | None = None
    ttft_s: float | None = None
    predicted_itl_s: float | None = None
    itl_s: float | None = None
    stall_s: float | None = None
    """The worst gap between two tokens."""
    total_s: float | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None
    bytes_in: int = 0
    bytes_out: int = 0


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
        console = structlog.dev.ConsoleRenderer(colors=out.isatty(), repr_native_str=True)
        processors += [clock, console, _as_bytes]
    else:
        processors += [structlog.processors.TimeStamper("iso"), _as_json]
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        logger_factory=structlog.BytesLoggerFactory(out),
        cache_logger_on_first_use=False,  # a reload may configure again
    )
    log: FilteringBoundLogger = structlog.get_logger().bind()
    return log


def request_line(log: FilteringBoundLogger, line: RequestLine) -> None:
    """Say what became of a request. Costs about 10 µs as JSON, nearly nothing when off."""
    with contextlib.suppress(OSError):  # a full disk or a closed pipe costs no request
        log.info("request", **msgspec.to_builtins(line))


_encode = msgspec.json.Encoder(enc_hook=repr).encode


def _as_json(_logger: WrappedLogger, _method: str, event: EventDict) -> bytes:
    return _encode(event)


def _as_bytes(_logger: WrappedLogger, _method: str, text: str) -> bytes:
    return text.encode("utf-8", "replace")
