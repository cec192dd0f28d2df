"""How does a server speak HTTP/1.1 with one client?

A connection hands whole requests to its handler and takes bytes for the answer, and tells when the
client reads them too slowly.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections import deque
from collections.abc import Callable
from enum import Enum
from math import inf
from typing import Protocol, cast

import httptools
import msgspec

from paceline.wire.http1 import Headers, response_head

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
SWEEP_S = 0.5


class Limits(msgspec.Struct, frozen=True):
    """Bounds on what one client may cost."""

    max_head_bytes: int = 64 * 1024
    max_body_bytes: int = 32 * 1024 * 1024
    max_connections: int = 20_000
    max_pipelined: int = 16
    head_timeout_s: float = 10.0
    body_timeout_s: float = 60.0
    idle_timeout_s: float = 75.0
    write_timeout_s: float = 60.0
    """How long a client may leave a full buffer unread."""


class HttpRequest:
    """A whole request. Header names are lower case."""

    __slots__ = ("body", "headers", "keep_alive", "method", "path", "query", "version")

    def __init__(self) -> None:
        self.method = ""
        self.path = ""
        self.query = ""
        self.version = "1.1"
        self.headers: dict[str, str] = {}
        self.body: bytes = b""
        self.keep_alive = True


class Handler(Protocol):
    """What a connection needs of those who answer."""

    def on_request(self, connection: ServerConnection, request: HttpRequest) -> None: ...
    def on_client_left(self, connection: ServerConnection) -> None: ...
    def on_writable(self, connection: ServerConnection) -> None: ...
    def on_refused(self, status: int, because: str) -> tuple[bytes, str]:
        """Body and content type for a request that never became one."""
        ...


class Phase(Enum):
    """What a connection waits for."""

    IDLE = "the next request"
    HEAD = "the request's head"
    BODY = "the request's body"
    BUSY = "the answer"


class ServerConnection(asyncio.Protocol):
    """One client connection: keep-alive, pipelining, limits, back-pressure."""

    __slots__ = (
        "_chunks",
        "_head_bytes",
        "_parser",
        "_received",
        "_request",
        "_server",
        "_size",
        "_transport",
        "_url",
        "_waiting",
        "context",
        "deadline",
        "paused",
        "phase",
    )

    def __init__(self, server: Server) -> None:
        self._server = server
        self._parser: httptools.HttpRequestParser | None = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._waiting: deque[HttpRequest] = deque()
        self._request: HttpRequest | None = None
        """The one that is being answered."""
        self._begin()
        self.phase = Phase.IDLE
        self.deadline = inf
        self.paused = False
        """The client reads too slowly: nothing more should be sent until `on_writable`."""
        self.context: object = None
        """The handler's own."""

    def _begin(self) -> None:
        self._received = HttpRequest()
        self._chunks: list[bytes] = []
        self._size = 0
        self._head_bytes = 0
        self._url = b""

    # The transport calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        if not self._server.admit(self):
            self.refuse(503, "too many connections")
            return
        self.deadline = self._server.now() + self._server.limits.head_timeout_s

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._parser = None
        self._waiting.clear()
        self._server.forget(self)
        if self.phase is Phase.BUSY:
            self._server.handler.on_client_left(self)

    def eof_received(self) -> bool:
        return False

    def pause_writing(self) -> None:
        self.paused = True
        self.deadline = self._server.now() + self._server.limits.write_timeout_s

    def resume_writing(self) -> None:
        self.paused = False
        self.deadline = inf if self.phase is Phase.BUSY else self.deadline
        if self.phase is Phase.BUSY:
            self._server.handler.on_writable(self)

    def data_received(self, data: bytes) -> None:
        if self._parser is None:
            return
        if self.phase in (Phase.IDLE, Phase.HEAD):
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass  # the request itself is served as HTTP/1.1; what follows it is not ours to read
        except httptools.HttpParserError as error:
            if self._parser is not None:
                self.refuse(400, f"malformed HTTP request: {error}")
            return
        if (
            self.phase in (Phase.IDLE, Phase.HEAD)
            and self._head_bytes > self._server.limits.max_head_bytes
        ):
            self.refuse(431, "request head too large")

    # The parser calls.

    def on_message_begin(self) -> None:
        self._begin()
        if self.phase is Phase.IDLE:
            self.phase = Phase.HEAD
            self.deadline = self._server.now() + self._server.limits.head_timeout_s

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._received.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        parser, request = self._parser, self._received
        assert parser is not None
        request.method = parser.get_method().decode("latin-1")
        request.version = parser.get_http_version()
        request.keep_alive = parser.should_keep_alive() and not parser.should_upgrade()
        path, _, request.query = self._url.decode("latin-1").partition("?")
        request.path = (
            path if path.startswith("/") else "/" + path.partition("://")[2].partition("/")[2]
        )
        self._head_bytes = 0
        if self.phase is Phase.HEAD:
            self.phase = Phase.BODY
            self.deadline = self._server.now() + self._server.limits.body_timeout_s
        length = request.headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self._server.limits.max_body_bytes:
            self.refuse(413, f"request body over {self._server.limits.max_body_bytes} bytes")
        elif (
            request.headers.get("expect", "").lower() == "100-continue" and self.phase is Phase.BODY
        ):
            self.send(CONTINUE)

    def on_body(self, body: bytes) -> None:
        self._size += len(body)
        if self._size > self._server.limits.max_body_bytes:
            self.refuse(413, f"request body over {self._server.limits.max_body_bytes} bytes")
            return
        self._chunks.append(body)

    def on_message_complete(self) -> None:
        if self._parser is None:
            return
        request = self._received
        request.body = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        self._begin()
        if self.phase is Phase.BUSY:
            self._waiting.append(request)
            if len(self._waiting) >= self._server.limits.max_pipelined:
                self.close()
        else:
            self._start(request)

    def _start(self, request: HttpRequest) -> None:
        self.phase = Phase.BUSY
        self.deadline = inf
        self._request = request
        self._server.handler.on_request(self, request)

    # The handler calls.

    def send(self, data: bytes) -> bool:
        """Send a piece of the answer. False: the client reads slowly, wait for `on_writable`."""
        if self._transport is not None:
            self._transport.write(data)
        return not self.paused

    def finish(self) -> None:
        """The answer is complete: serve the next request, or close."""
        request, self._request = self._request, None
        if request is None or not request.keep_alive or self._server.draining:
            self.phase = Phase.IDLE
            self.close()
            return
        self.context = None
        self.phase = Phase.IDLE
        self.deadline = self._server.now() + self._server.limits.idle_timeout_s
        if self._waiting:
            # Not from within the handler's own call, lest a pipeline become a recursion.
            asyncio.get_running_loop().call_soon(self._next)

    def _next(self) -> None:
        if self._waiting and self.phase is Phase.IDLE and self._transport is not None:
            self._start(self._waiting.popleft())

    def close(self) -> None:
        """Close once what was sent has left; a client that does not read it is cut off in time."""
        self._parser = None
        if self._transport is not None and not self._transport.is_closing():
            self.deadline = self._server.now() + 5.0
            self._transport.close()

    def abort(self) -> None:
        """Close at once: the answer ends in the middle and the client shall see that."""
        self._parser = None
        if self._transport is not None:
            self._transport.abort()

    def answer(
        self,
        status: int,
        body: bytes,
        content_type: str = "application/json",
        headers: Headers = (),
    ) -> None:
        """A whole answer."""
        request = self._request
        named = [*headers, ("content-type", content_type), ("content-length", str(len(body)))]
        if request is not None and (not request.keep_alive or self._server.draining):
            named.append(("connection", "close"))
        if request is not None and request.method == "HEAD":
            body = b""
        self.send(response_head(status, named) + body)
        self.finish()

    def refuse(self, status: int, because: str) -> None:
        """Answer a request that never became one, and close."""
        body, content_type = self._server.handler.on_refused(status, because)
        self._request = None
        self._parser = None
        self.phase = Phase.IDLE
        headers = [("content-type", content_type), ("content-length", str(len(body)))]
        self.send(response_head(status, [*headers, ("connection", "close")]) + body)
        self.close()

    def take_over(self, protocol: asyncio.Protocol) -> None:
        """Give the socket to another protocol; this connection is out of the game."""
        transport = self._transport
        assert transport is not None
        self.phase = Phase.IDLE
        self._transport = None
        self._parser = None
        self._server.forget(self)
        transport.set_protocol(protocol)
        protocol.connection_made(transport)

    def expire(self) -> None:
        """The deadline has passed."""
        if self.phase in (Phase.HEAD, Phase.BODY):
            self.refuse(408, f"timed out waiting for {self.phase.value}")
        else:
            self.abort()


class Server:
    """Listens, counts its connections, and ends those that outstay their deadline."""

    def __init__(self, handler: Handler, limits: Limits, now: Callable[[], float]) -> None:
        self.handler = handler
        self.limits = limits
        self.now = now
        self.draining = False
        self.connections: set[ServerConnection] = set()
        self._listener: asyncio.Server | None = None
        self._empty = asyncio.Event()

    def admit(self, connection: ServerConnection) -> bool:
        self.connections.add(connection)
        return len(self.connections) <= self.limits.max_connections

    def forget(self, connection: ServerConnection) -> None:
        self.connections.discard(connection)
        if self.draining and not self.connections:
            self._empty.set()

    async def listen(
        self, host: str, port: int, tls: ssl.SSLContext | None = None
    ) -> tuple[str, int]:
        """Listen; gives the address, with the port that port 0 became."""
        loop = asyncio.get_running_loop()
        self._listener = await loop.create_server(
            lambda: ServerConnection(self), host, port, ssl=tls, backlog=4096
        )
        name = self._listener.sockets[0].getsockname()
        return name[0], name[1]

    async def sweep(self) -> None:
        """Run for ever: end connections whose deadline has passed."""
        while True:
            await asyncio.sleep(SWEEP_S)
            now = self.now()
            for connection in [c for c in self.connections if c.deadline < now]:
                connection.expire()

    async def drain(self, grace_s: float) -> None:
        """Take no new connections, let answers finish within `grace_s`, then cut the rest."""
        self.draining = True
        if self._listener is not None:
            self._listener.close()
        for connection in list(self.connections):
            if connection.phase is not Phase.BUSY:
                connection.close()
        if not self.connections:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await self._empty.wait()
        for connection in list(self.connections):
            connection.abort()
