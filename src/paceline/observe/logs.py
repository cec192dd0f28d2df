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
    return log


def request_line(log: FilteringBoundLogger, outcome: Outcome) -> None:
    """Say what became of a request; fields of which nothing is known are left out.

    Nothing here reads headers or text: no key and no word of a client can get into a log. A line
    costs less than 20 µs as JSON.
    """
    if not log.is_enabled_for(logging.INFO):
        return
    request, predicted, given = outcome.request, outcome.predicted, outcome.degraded_to
    fields = {
        "id": request.id,
        "tenant": request.tenant,
        "tier": request.tier,
        "model": request.model,
        "to_tier": given.tier if given is not None else None,
        "to_model": given.model if given is not None else None,
        "worker": outcome.worker,
        "prefilled_at": outcome.prefilled_at,
        "prefill_s": outcome.prefill_s or None,
        "status": outcome.status,
        "error": outcome.error,
        "because": outcome.because,
        "attempts": outcome.attempts,
        "moved": outcome.moved or None,
        "paused": outcome.paused or None,
        "kept": outcome.kept,
        "queued_s": outcome.queued_s,
        "predicted_ttft_s": predicted.ttft_s if predicted else None,
        "ttft_s": outcome.ttft_s,
        "predicted_itl_s": predicted.itl_s if predicted else None,
        "itl_s": outcome.itl_s,
        "stall_s": outcome.stall_s,
        "seconds": outcome.seconds,
        "prompt_bytes": request.prompt_bytes,
        "prompt_tokens": outcome.prompt_tokens,
        "cached_tokens": outcome.cached_tokens,
        "output_tokens": outcome.output_tokens,
    }
    known = {
        name: round(value, 6) if isinstance(value, float) else value  # digits after µs are noise
        for name, value in fields.items()
        if value is not None and value != ""
    }
    with contextlib.suppress(OSError):  # a full disk or a closed pipe costs no request
        log.info("request", **known)


_encode = msgspec.json.Encoder(enc_hook=repr).encode


def _as_json(_logger: WrappedLogger, _method: str, event: EventDict) -> bytes:
    return _encode(event)


def _as_bytes(_logger: WrappedLogger, _method: str, text: str) -> bytes:
    return text.encode("utf-8", "replace")
