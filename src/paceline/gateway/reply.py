"""How does an answer look to its client, by the HTTP that this client speaks?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from paceline.domain.errors import PacelineError
from paceline.gateway.flavors import FLAVORS, OTHER
from paceline.wire.http1 import HOP_BY_HOP, LAST_CHUNK, ResponseHead, chunk, response_head
from paceline.wire.server import HttpRequest, ServerConnection

RETRYABLE = frozenset((401, 403, 408, 429, *range(500, 600)))
"""Engine statuses that another engine may not give: overload, breakage, or our own wrong key."""
BLAMELESS = frozenset((408, 429))


def answer_head(
    http: HttpRequest,
    head: ResponseHead,
    own: Sequence[tuple[str, str]],
    spent_s: Mapping[str, float],
) -> bytes:
    """The engine's head as this client gets to read it: framing is ours, and so are some fields.

    `spent_s`: where the time until now went, for `Server-Timing`.
    """
    timing = ", ".join(f"{name};dur={seconds * 1e3:.1f}" for name, seconds in spent_s.items())
    headers = [(n, v) for n, v in head.headers if n not in HOP_BY_HOP and n != "x-request-id"]
    headers += [*own, ("server-timing", timing)]
    if http.version == "1.0":
        http.keep_alive = False
    elif head.length is None:
        headers.append(("transfer-encoding", "chunked"))
    if head.length is not None and head.status not in (204, 304):
        headers.append(("content-length", str(head.length)))
    if not http.keep_alive:
        headers.append(("connection", "close"))
    return response_head(head.status, headers)


def last_events(http: HttpRequest, events: bytes) -> bytes:
    """The end of a stream, with its last events if there are any."""
    if http.version == "1.0":
        return events
    return (chunk(events) if events else b"") + LAST_CHUNK


def cut(
    client: ServerConnection, http: HttpRequest, error: PacelineError, within_tokens: bool
) -> None:
    """End an answer within: by an event that says so, else by a broken connection."""
    if not within_tokens:
        client.abort()
        return
    event = FLAVORS.get(http.path, OTHER).error_event(error.to_openai())
    client.send(last_events(http, event))
    client.finish()


def refusal(status: int, started: bytes) -> str:
    """Why an engine refused, in its own words as far as they have come."""
    if status in (401, 403):  # such a body may quote the engine's key
        return f"HTTP {status}"
    words = started[:300].decode("utf-8", "replace").strip()
    return f"HTTP {status}: {words}" if words else f"HTTP {status}"
