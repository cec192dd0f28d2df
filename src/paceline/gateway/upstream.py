"""How do bytes travel between the gateway and an engine?"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from math import inf
from time import monotonic
from typing import Protocol, cast


class Reader(Protocol):
    """Who reads the answer that comes over a connection."""

    def on_bytes(self, data: bytes) -> None: ...
    def on_closed(self, because: str, clean: bool) -> None: ...
    def on_bug(self) -> None:
        """One of the above raised what it should not have."""
        ...


class EngineConnection(asyncio.Protocol):
    """One connection to an engine: kept alive, and carrying one request at a time."""

    __slots__ = (
        "_closed",
        "_on_idle_close",
        "_out",
        "_transport",
        "_until",
        "carried",
        "connecting",
        "reader",
    )

    def __init__(self, on_idle_close: Callable[[EngineConnection], None]) -> None:
        self._on_idle_close = on_idle_close
        self._transport: asyncio.Transport | None = None
        self._closed = False
        self._out = b""
        self._until = inf
        self.reader: Reader | None = None
        self.carried = 0
        """Requests so far. After the first, an early close may be the keep-alive's end."""
        self.connecting: asyncio.Task[None] | None = None
        """The task that runs `connect`, until it has."""

    async def connect(self, host: str, port: int, tls: ssl.SSLContext | None) -> None:
        """Connect; trouble goes to the reader."""
        try:
            loop = asyncio.get_running_loop()
            await loop.create_connection(lambda: self, host, port, ssl=tls)
        except (OSError, ValueError) as error:  # ValueError: a host name that cannot be one
            self._lost(f"cannot connect: {error}", clean=False)
        finally:
            self.connecting = None

    def start(self, reader: Reader, request: bytes, until: float = inf) -> None:
        """Send a request; its answer goes to `reader`. After `until` it is not sent any more."""
        self.carried += 1
        self._until = until
        self.reader = reader
        if self._transport is None:
            self._out = request
        else:
            self._transport.write(request)

    def pause(self) -> None:
        """Read no more for now: TCP slows the engine down."""
        if self._transport is not None and not self._closed:
            self._transport.pause_reading()

    def resume(self) -> None:
        if self._transport is not None and not self._closed:
            self._transport.resume_reading()

    def close(self) -> None:
        """Close at once. The engine sees it and frees the request's slot."""
        self._closed = True
        self.reader = None
        if self.connecting is not None:
            self.connecting.cancel()
        if self._transport is not None:
            self._transport.abort()

    # The transport calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = wire = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        if self._closed:
            wire.abort()
        elif monotonic() > self._until:
            wire.abort()
            self._lost("it was reached too late", clean=False)
        else:
            wire.write(self._out)
            self._out = b""

    def data_received(self, data: bytes) -> None:
        reader = self.reader
        if reader is None:
            self.close()  # nobody asked
            self._on_idle_close(self)
            return
        try:
            reader.on_bytes(data)
        except Exception:
            reader.on_bug()  # it costs one request, not the others

    def connection_lost(self, exc: Exception | None) -> None:
        because = f"connection lost: {exc}" if exc else "the engine closed the connection"
        self._lost(because, clean=exc is None)

    def _lost(self, because: str, clean: bool) -> None:
        if self._closed:
            return
        self._closed = True
        reader, self.reader = self.reader, None
        if reader is None:
            self._on_idle_close(self)
            return
        try:
            reader.on_closed(because, clean)
        except Exception:
            reader.on_bug()
