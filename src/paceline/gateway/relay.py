"""How does one engine's answer pass to the client? The hot path.

Until the first token everything is held back, so that a request whose engine fails can be sent
elsewhere and nobody sees a broken answer. From then on the engine's bytes go on as they are, chunk
frames included: they are measured off, counted and timed in place, and cut out only where the usage
that Paceline asked for is not the client's business.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable
from time import monotonic
from typing import Protocol

from paceline.gateway.flavors import Flavor
from paceline.gateway.steps import StepWatch
from paceline.gateway.upstream import EngineConnection
from paceline.wire.http1 import (
    LAST_CHUNK,
    Chunks,
    ResponseHead,
    WireError,
    chunk,
    parse_response_head,
    payloads,
)
from paceline.wire.server import ServerConnection

MAX_HELD = 16 * 1024 * 1024
"""Bytes that may be held back: an answer collected whole, or one unfinished chunk."""
TAIL = 4096
ERROR = re.compile(rb'\ndata: \{"error"')
GAP_BOUNDS = tuple(0.001 * 2 ** (i / 2) for i in range(-2, 29))
"""Upper bounds in seconds of the ITL histogram: 0.5 ms to 16 s, two a doubling."""


Mode = Callable[[bytes, float], None]


class Owner(Protocol):
    """Who is told how the relay fares."""

    def on_head(self, head: ResponseHead, started: bytes) -> bool:
        """An answer that is no success came; True: it shall pass, False: the relay is abandoned."""
        ...

    def on_answer(self, now: float, token: bool) -> bytes:
        """The answer begins, with its first token or not; gives the head for the client."""
        ...

    def on_complete(self, now: float) -> None: ...
    def on_trouble(self, because: str) -> None: ...


class Relay:
    """One attempt of one request on one connection."""

    __slots__ = (
        "_burst",
        "_carry",
        "_chunks",
        "_client",
        "_flavor",
        "_gaps",
        "_left",
        "_live",
        "_owner",
        "_paused_at",
        "_plain",
        "_separator",
        "_strip",
        "_watch",
        "connection",
        "first_at",
        "head",
        "heard",
        "last_at",
        "mode",
        "stall_s",
        "tail",
        "token_at",
        "tokens",
    )

    def __init__(
        self,
        owner: Owner,
        client: ServerConnection,
        connection: EngineConnection,
        watch: StepWatch,
        gaps: list[int],
        flavor: Flavor,
        strip: bool,
        plain: bool,
        now: float,
    ) -> None:
        self._owner = owner
        self._client = client
        self.connection = connection
        self._watch = watch
        self._gaps = gaps
        self._flavor = flavor
        self._strip = strip
        self._plain = plain  # the client cannot read chunks (HTTP/1.0)
        self._chunks = Chunks()
        self._carry = b""
        self._left = 0
        self._live = False  # counted among the watch's live streams
        self._burst = 0
        self._separator = b"\n\n"
        self._paused_at = 0.0
        self.mode: Mode = self._head
        self.head: ResponseHead | None = None
        self.heard = False
        """A byte of the answer has come."""
        self.first_at = 0.0
        """When the first token came; 0: not yet."""
        self.token_at = 0.0
        """When the newest token came."""
        self.last_at = now
        """When anything was heard last, or sent."""
        self.stall_s = 0.0
        self.tokens = 0
        self.tail = b""
        """The last part of the answer, where the usage stands."""

    def on_bytes(self, data: bytes) -> None:
        """Bytes came from the engine."""
        now = monotonic()
        self.heard = True
        if self._carry:
            data, self._carry = self._carry + data, b""
        try:
            self.mode(data, now)
        except WireError as error:
            self._owner.on_trouble(f"broken answer: {error}")

    def on_closed(self, because: str) -> None:
        """The connection is gone."""
        if self.head is not None and self.mode == self._until_close:
            self._client.send(b"" if self._plain else LAST_CHUNK)
            self._owner.on_complete(self.last_at)
        else:
            self._owner.on_trouble(because)

    # One method for each part of the answer.

    def _head(self, data: bytes, now: float) -> None:
        found = parse_response_head(data)
        if found is None:
            self._carry = data
            return
        head, end = found
        if head.status == 100:
            self._carry = data[end:]
            return
        self.head = head
        self.last_at = now
        if head.status >= 300 and not self._owner.on_head(head, data[end:]):
            return
        if head.chunked:
            streaming = head.get("content-type").startswith("text/event-stream")
            self.mode = self._before_token if streaming else self._chunked
        elif head.length is not None:
            self._left = head.length
            self.mode = self._sized
        else:
            self.mode = self._until_close
            self._client.send(self._owner.on_answer(now, token=False))
        rest = data[end:]
        if rest or head.length == 0:
            self.mode(rest, now)

    def _before_token(self, data: bytes, now: float) -> None:
        """Hold role and set-up events back until there is a token, or the end."""
        end = self._chunks.walk(data)
        events = data[: self._chunks.payload_end]
        if not self._chunks.done and not self._flavor.first.search(events):
            self._carry = data
            self._chunks.done = False
            if len(data) > MAX_HELD:
                raise WireError("too much before the first token")
            self.last_at = now
            return
        if b"\r\n\r\n\r\n" in events:
            self._separator = b"\r\n\r\n"  # events end so, then the chunk
        if self._chunks.done and ERROR.search(events):
            raise WireError(f"error in the stream: {events[:200].decode('utf-8', 'replace')}")
        self.first_at = self.token_at = self.last_at = now
        self.tokens = 1
        head = self._owner.on_answer(now, token=True)
        self._live = True
        self._burst = self._watch.first(now)
        self.mode = self._tokens
        if self._chunks.done or data.find(self._flavor.last, 0, end) >= 0:
            self._client.send(head)
            self._tokens(data, now)
            return
        self._send(head + self._framed(data[:end]))
        self._carry = data[end:]

    def _tokens(self, data: bytes, now: float) -> None:
        """Each chunk of each stream comes through here: count, time, pass on."""
        chunks = self._chunks
        end = chunks.walk(data)
        if end < len(data):
            self._carry = data[end:]
            if len(self._carry) > MAX_HELD:
                raise WireError("chunk too large")
        payload_end = chunks.payload_end
        self.last_at = now
        if self.tail:
            self.tail += data[:end]
        elif data.find(self._flavor.last, 0, payload_end) >= 0:
            self.tail = data[:end]
            self._count(data.count(self._separator, 0, payload_end) - 2, now)
        else:
            self._count(data.count(self._separator, 0, payload_end), now)
        if self._plain or (self._strip and self.tail):
            self._send(self._framed(data[:end]))
        elif end:
            self._send(data[:end])  # no copy where all of it is whole
        if chunks.done:
            self.tail = self.tail or data[:end]
            self._complete(now)

    def _count(self, tokens: int, now: float) -> None:
        if tokens <= 0 or now == self.token_at:
            return
        gap_s = now - self.token_at
        self.token_at = now
        if gap_s > self.stall_s:
            self.stall_s = gap_s
        self.tokens += tokens
        self._gaps[bisect_left(GAP_BOUNDS, gap_s / tokens)] += tokens
        self._burst = self._watch.token(self._burst, tokens, gap_s, now)

    def _chunked(self, data: bytes, now: float) -> None:
        """A chunked body that is no event stream."""
        end = self._chunks.walk(data)
        self._carry = data[end:]
        if len(self._carry) > MAX_HELD:
            raise WireError("chunk too large")
        self.last_at = now
        self.tail = (self.tail + data[:end])[-TAIL:]
        if not self.first_at:
            self.first_at = now
            self._client.send(self._owner.on_answer(now, token=False))
        self._send(self._framed(data[:end]))
        if self._chunks.done:
            self._complete(now)

    def _sized(self, data: bytes, now: float) -> None:
        """A body of known length: collected whole if it fits, so that it can still be retried."""
        assert self.head is not None
        assert self.head.length is not None
        self.last_at = now
        if not self.first_at and self.head.length <= MAX_HELD:
            if len(data) < self._left:
                self._carry = data
                return
            body = data[: self._left]
            self.tail = body[-TAIL:]
            self._send(self._owner.on_answer(now, token=False) + body)
            self._left = len(data) - self._left
            self._complete(now)
            return
        if not self.first_at:
            self.first_at = now
            self._client.send(self._owner.on_answer(now, token=False))
        self._left -= len(data)
        self._send(data)
        if self._left <= 0:
            self._complete(now)

    def _until_close(self, data: bytes, now: float) -> None:
        """A body that ends with the connection: the client gets chunks."""
        self.first_at = self.first_at or now
        self.last_at = now
        self.tail = (self.tail + data)[-TAIL:]
        self._send(data if self._plain else chunk(data))

    def _complete(self, now: float) -> None:
        if self._carry or self._left:
            assert self.head is not None
            self.head.keep_alive = False  # more came than was announced
        self._owner.on_complete(now)

    # Towards the client.

    def _framed(self, data: bytes) -> bytes:
        """Whole chunks as this client shall see them."""
        if not self._plain and not (self._strip and self.tail):
            return data
        payload = b"".join(payloads(data))
        if self._strip and self.tail:
            parts = payload.split(self._separator)
            payload = self._separator.join(part for part in parts if self._flavor.last not in part)
        if self._plain:
            return payload
        ending = LAST_CHUNK if self._chunks.done else b""
        return (chunk(payload) if payload else b"") + ending

    def _send(self, data: bytes) -> None:
        if not self._client.send(data) and not self._paused_at:
            self._paused_at = self.last_at
            self.connection.pause()

    def resume(self, now: float) -> None:
        """The client reads again. What it cost does not count against the engine."""
        if self._paused_at:
            self.token_at += now - self._paused_at
            self.last_at = now
            self._paused_at = 0.0
            self.connection.resume()

    @property
    def paused(self) -> bool:
        """The client does not keep up."""
        return self._paused_at > 0

    def abandon(self) -> None:
        """Give up: closing the connection frees the engine's slot at once."""
        self.connection.close()
        self.release()

    def release(self) -> None:
        """The answer is no longer this relay's business."""
        if self._live:
            self._live = False
            self._watch.gone(self._burst)
        self.mode = _ignore

    @property
    def failed(self) -> bool:
        """The engine reported an error within the stream."""
        return bool(ERROR.search(self.tail))


def _ignore(data: bytes, now: float) -> None:
    """Nothing is expected any more. (A function, so that a relay leaves no cycle behind.)"""
