"""What does an engine answer where the answer is for Paceline itself, not for a client?"""

from __future__ import annotations

from time import monotonic
from typing import Protocol

from paceline.gateway.link import EngineLink
from paceline.gateway.upstream import EngineConnection
from paceline.wire.http1 import Chunks, ResponseHead, WireError, parse_response_head, payloads

MAX_BYTES = 16 * 1024 * 1024


class Sender(Protocol):
    """Who is told how an errand ends: by one of these, once, unless it is abandoned."""

    def on_told(self, errand: Errand, now: float) -> None:
        """The answer is there, whatever its status."""
        ...

    def on_untold(self, errand: Errand, because: str) -> None:
        """It will not come."""
        ...

    def on_bug(self) -> None: ...


class Errand:
    """One request to one engine. Its answer is collected whole."""

    __slots__ = (
        "_body",
        "_chunks",
        "_connection",
        "_data",
        "_head",
        "_link",
        "_message",
        "_sender",
        "since",
    )

    def __init__(self, link: EngineLink, message: bytes, sender: Sender, now: float) -> None:
        self._link = link
        self._message = message
        self._sender: Sender | None = sender
        self._data = b""
        self._body = bytearray()
        self._head: ResponseHead | None = None
        self._chunks = Chunks()
        self.since = now
        """When it was sent, or anything was heard last."""
        self._connection = self._go(fresh=False)

    def _go(self, fresh: bool) -> EngineConnection:
        connection = self._link.connection(fresh)
        connection.start(self, self._message)
        return connection

    @property
    def connecting(self) -> bool:
        return self._connection.connecting is not None

    @property
    def status(self) -> int:
        """HTTP status of the answer."""
        return self._head.status if self._head is not None else 0

    @property
    def body(self) -> bytes:
        return bytes(self._body)

    def abandon(self) -> None:
        """Nobody wants it any more; closing the connection has the engine stop at once."""
        self._sender = None
        self._connection.close()

    def on_bytes(self, data: bytes) -> None:
        if self._sender is None:
            return
        self.since = monotonic()
        try:
            whole = self._take(self._data + data)
        except WireError as error:
            self._fail(f"broken answer: {error}")
            return
        if whole:
            self._done(keep=True)

    def on_closed(self, because: str, clean: bool) -> None:
        head = self._head
        if head is not None and clean and not head.chunked and head.length is None:
            self._done(keep=False)
        elif self._connection.carried > 1 and not self._data and head is None:
            self._connection = self._go(fresh=True)  # the kept-alive connection had ended unseen
        else:
            self._fail(because)

    def on_bug(self) -> None:
        if self._sender is not None:
            self._sender.on_bug()

    def _take(self, data: bytes) -> bool:
        """Read what has come. Is the answer whole?"""
        while self._head is None:
            found = parse_response_head(data)
            if found is None:
                self._data = data
                return False
            head, end = found
            data = data[end:]
            if head.status >= 200:
                self._head = head
        head = self._head
        if len(self._body) + len(data) > MAX_BYTES:
            raise WireError("it is too large")
        if head.chunked:
            end = self._chunks.walk(data)
            self._body += b"".join(payloads(data[:end]))
            self._data = data[end:]
            return self._chunks.done
        end = len(data) if head.length is None else head.length - len(self._body)
        self._body += data[:end]
        self._data = data[end:]
        return len(self._body) == head.length

    def _done(self, keep: bool) -> None:
        assert self._head is not None
        sender, self._sender = self._sender, None
        if keep and self._head.keep_alive and not self._data:
            self._link.keep(self._connection)
        else:
            self._connection.close()
        if sender is not None:
            sender.on_told(self, self.since)

    def _fail(self, because: str) -> None:
        sender, self._sender = self._sender, None
        self._connection.close()
        if sender is not None:
            sender.on_untold(self, because)
