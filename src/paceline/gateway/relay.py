"""How does one engine's answer pass to the client? The hot path.

Until the first token everything is held back, so that a request whose engine fails can be sent
elsewhere and nobody sees a broken answer. From then on the engine's bytes go on as they are, chunk
frames included: they are measured off, counted and timed in place, and cut out only where the usage
that Paceline asked for is not the client's business.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from time import monotonic
from typing import Protocol

from paceline.gateway.flavors import ERROR
from paceline.gateway.refused import in_openai_shape
from paceline.gateway.sieve import Sieve
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
MAX_SETUP = 64 * 1024
"""Bytes of events without a token after which the stream passes all the same."""
TAIL = 4096
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

    def on_first_token(self, now: float) -> None:
        """The first token has been passed on. What this leads to may end the relay."""
        ...

    def on_complete(self, now: float) -> None: ...
    def on_trouble(self, because: str) -> None: ...
    def on_bug(self) -> None: ...


class Relay:
    """One attempt of one request on one connection."""

    __slots__ = (
        "_burst",
        "_carry",
        "_chunks",
        "_client",
        "_gaps",
        "_keeps",
        "_left",
        "_live",
        "_mark",
        "_missing",
        "_owner",
        "_paused_at",
        "_sieve",
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
        sieve: Sieve,
        now: float,
    ) -> None:
        self._owner = owner
        self._client = client
        self.connection = connection
        self._watch = watch
        self._gaps = gaps
        self._sieve = sieve
        self._keeps = sieve.produced is not None
        self._chunks = Chunks()
        self._carry: list[bytes] = []  # bytes that are no whole part of the answer yet
        self._missing = 0  # how many more are wanted before it is worth looking at them
        self._left = 0
        self._live = False  # counted among the watch's live streams
        self._burst = 0
        self._mark = b""  # what this engine's tokens show, and nothing else
        self._paused_at = 0.0
        self.mode: Mode = self._head
        self.head: ResponseHead | None = None
        self.heard = False
        """A byte of the answer has come."""
        self.first_at = 0.0
        """When the first token, or body, came; 0: not yet. Time stands still while paused."""
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
            self._carry.append(data)
            self._missing -= len(data)
            if self._missing > 0:  # nor are they joined before: a large chunk comes in many pieces
                self.last_at = now
                return
            data = b"".join(self._carry)
            self._carry.clear()
        try:
            self.mode(data, now)
        except WireError as error:
            self._owner.on_trouble(f"broken answer: {error}")

    def on_closed(self, because: str, clean: bool) -> None:
        """The connection is gone; `clean`: the engine closed it in order."""
        if clean and self.mode == self._until_close:
            self._client.send(b"" if self._sieve.plain else LAST_CHUNK)
            self._owner.on_complete(self.last_at)
        else:
            self._owner.on_trouble(because)

    def on_bug(self) -> None:
        """Reading the answer met a bug of ours."""
        self._owner.on_bug()

    # One method for each part of the answer.

    def _head(self, data: bytes, now: float) -> None:
        found = parse_response_head(data)
        while found is not None and found[0].status < 200:  # "100 Continue" and the like
            data = data[found[1] :]
            found = parse_response_head(data)
        if found is None:
            self._hold(data)
            return
        head, end = found
        self.head = head
        self.last_at = now
        rest = data[end:]
        if head.status >= 300 and not self._owner.on_head(head, rest):
            return
        events = head.get("content-type").lower().startswith("text/event-stream")
        if self._sieve.seam is not None and not (events and head.chunked):
            raise WireError("this is no stream to go on with")
        if head.status >= 400 and not events and (head.chunked or head.length is not None):
            self.mode = self._refusal
        elif head.chunked:
            self.mode = self._before_token if events else self._chunked
        elif head.length is not None:
            self._left = head.length
            self.mode = self._sized
        else:
            self.mode = self._until_close
            self._client.send(self._owner.on_answer(now, token=False))
        if rest or head.length == 0:
            self.mode(rest, now)

    def _before_token(self, data: bytes, now: float) -> None:
        """Hold role and set-up events back until there is a token, or the end."""
        chunks, sieve = self._chunks, self._sieve
        end = chunks.walk(data)
        payload = b"".join(payloads(data[:end]))
        if b"\r\n\r\n" in payload:
            sieve.separator = b"\r\n\r\n"
        events = payload[: sieve.end_of_events(payload)]
        first = sieve.flavor.first.search(events)
        if (first is None or chunks.done) and (error := ERROR.search(events)):
            words = events[error.start() :][:300].decode("utf-8", "replace")
            raise WireError(f"error in the stream: {words.strip()}")
        if (first is None or not end) and not chunks.done and end < MAX_SETUP:
            self.last_at = now
            self._hold(data, chunks.missing)
            return
        begun = events.rfind(sieve.separator, 0, first.start()) + 1 if first else len(events)
        tokens = sieve.flavor.token.findall(events, begun)
        self._mark = tokens[0] if tokens else b"data:"
        self.tokens = len(tokens)
        passed, sound = self._sifted(data[:end])
        if sieve.trouble and not sound:
            raise WireError(sieve.trouble)
        self.first_at = self.token_at = self.last_at = now
        head = self._owner.on_answer(now, token=True)
        self.mode = self._events if sieve.plain or sieve.seam is not None else self._tokens
        self._send(head + passed)
        self._owner.on_first_token(now)
        if self.mode is not _ignore and not self._paused_at:
            self._live = True
            self._burst = self._watch.first(now)
        self._go_on(data, end, now)

    def _tokens(self, data: bytes, now: float) -> None:
        """Each chunk of each stream comes through here: count, time, pass on."""
        chunks = self._chunks
        end = chunks.walk(data)
        tokens = data.count(self._mark, 0, end)
        odd = chunks.uneven or chunks.done
        if not tokens or odd or tokens != data.count(b"\n\n", 0, end):
            self._look_closer(data, end, now)
            return
        self.last_at = now
        self.tail = data
        whole = end == len(data)
        passed = data if whole else data[:end]
        if self._keeps:
            passed = self._sieve.tokens(passed)
        self._send(passed)
        self._count(tokens, now)
        if not whole:
            self._go_on(data, end, now)

    def _events(self, data: bytes, now: float) -> None:
        """A stream whose events must be told apart: its chunks cut them, or the client has none."""
        self._look_closer(data, self._chunks.walk(data), now)

    def _look_closer(self, data: bytes, end: int, now: float) -> None:
        """Not each event is a token: the usage, an error, a comment, the end."""
        self.last_at = now
        if end:
            passed, tokens = self._sifted(data[:end])
            if passed:
                self._send(passed)
            if tokens:
                self._count(tokens, now)
        self._go_on(data, end, now)

    def _go_on(self, data: bytes, end: int, now: float) -> None:
        """What lies behind `end` is no whole chunk yet, or not ours."""
        if self.mode is _ignore:  # what was told has taken the request elsewhere
            return
        if self._sieve.trouble:
            raise WireError(self._sieve.trouble)
        if end < len(data):
            self._hold(data[end:], self._chunks.missing)
        if self._chunks.done:
            self._complete(now)

    def _sifted(self, frames: bytes) -> tuple[bytes, int]:
        passed, tokens = self._sieve.sift(frames, self._chunks)
        if self._sieve.counted:
            self.tail, self._sieve.counted = self._sieve.counted, b""
        return passed, tokens

    def _count(self, tokens: int, now: float) -> None:
        gap_s = now - self.token_at
        self.token_at = now
        if gap_s > self.stall_s:
            self.stall_s = gap_s
        self.tokens += tokens
        if self._live:
            self._gaps[bisect_left(GAP_BOUNDS, gap_s / tokens)] += tokens
            self._burst = self._watch.token(self._burst, tokens, gap_s, now)

    def _chunked(self, data: bytes, now: float) -> None:
        """A chunked body that is no event stream."""
        end = self._chunks.walk(data)
        self.last_at = now
        if end:
            frames = data[:end]
            self.tail = (self.tail + frames)[-TAIL:]
            passed = b"".join(payloads(frames)) if self._sieve.plain else frames
            self._send(self._answer_head(now) + passed)
        self._go_on(data, end, now)

    def _sized(self, data: bytes, now: float) -> None:
        """A body of known length: collected whole if it fits, so that it can still be retried."""
        self.last_at = now
        missing = self._left - len(data)
        if missing > 0 and not self.first_at and self._left <= MAX_HELD:
            self._hold(data, missing)
            return
        body = data[: self._left]
        self._left -= len(body)
        self.tail = (self.tail + body)[-TAIL:]
        self._send(self._answer_head(now) + body)
        if not self._left:
            self._carry = [data[len(body) :]] if missing < 0 else []
            self._complete(now)

    def _refusal(self, data: bytes, now: float) -> None:
        """An error is collected whole: not all engines say it as clients expect it."""
        head, chunks = self.head, self._chunks
        assert head is not None
        self.last_at = now
        if head.chunked:
            end = chunks.walk(data)
            whole, missing = chunks.done, chunks.missing
        else:
            end = head.length or 0
            whole, missing = len(data) >= end, end - len(data)
        if not whole:
            self._hold(data, missing)
            return
        body = b"".join(payloads(data[:end])) if head.chunked else data[:end]
        body = in_openai_shape(head, body)
        head.length = len(body)
        self._send(self._answer_head(now) + body)
        self._carry = [data[end:]] if end < len(data) else []
        self._complete(now)

    def _until_close(self, data: bytes, now: float) -> None:
        """A body that ends with the connection: the client gets chunks."""
        self.first_at = self.first_at or now
        self.last_at = now
        self.tail = (self.tail + data)[-TAIL:]
        self._send(data if self._sieve.plain else chunk(data))

    def _answer_head(self, now: float) -> bytes:
        """The head of an answer that is no event stream, with the first of its body."""
        if self.first_at:
            return b""
        self.first_at = now
        return self._owner.on_answer(now, token=False)

    def _hold(self, data: bytes, missing: int = 0) -> None:
        """Keep what is no whole part yet, until `missing` bytes more are there, or any."""
        if len(data) + missing > MAX_HELD:
            raise WireError("a part of the answer is too large")
        self._carry = [data] if data else []
        self._missing = missing

    def _complete(self, now: float) -> None:
        if self._carry:
            assert self.head is not None
            self.head.keep_alive = False  # more came than was announced
        self._owner.on_complete(now)

    # Towards the client.

    def _send(self, data: bytes) -> None:
        if not self._client.send(data) and not self._paused_at:
            self._paused_at = self.last_at
            self._leave_watch()  # when its chunks come from here on says little of the engine
            self.connection.pause()

    def resume(self, now: float) -> None:
        """The client reads again. What it cost does not count against the engine."""
        if self._paused_at:
            paused_s = now - self._paused_at
            self.first_at += paused_s
            self.token_at += paused_s
            self.last_at = now
            self._paused_at = 0.0
            self.connection.resume()

    @property
    def rewritten(self) -> int:
        """Tokens that the client had, and the engine was asked to write again."""
        return self._sieve.seam.rewritten if self._sieve.seam is not None else 0

    @property
    def failed(self) -> bool:
        """The engine reported an error within the stream."""
        return self._sieve.failed

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
        self._leave_watch()
        if self._paused_at:
            self.connection.resume()
        self.mode = _ignore

    def _leave_watch(self) -> None:
        if self._live:
            self._live = False
            self._watch.gone(self._burst)


def _ignore(data: bytes, now: float) -> None:
    """Nothing is expected any more. (A function, so that a relay leaves no cycle behind.)"""
