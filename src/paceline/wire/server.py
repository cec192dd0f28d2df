"""How does a server speak HTTP/1.1 with one client?

A connection hands whole requests to its handler and takes bytes for the answer, and tells when the
client reads them too slowly.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import struct
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
LINGER_S = 2.0
"""How long a refused client may go on sending before its connection is cut."""
RESET = struct.pack("ii", 1, 0)
"""SO_LINGER of no time at all: the peer gets a reset instead of an orderly end."""


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


class Refused(Exception):
    """What a client sends cannot become a request: a status, and why."""


class ServerConnection(asyncio.Protocol):
    """One client connection: keep-alive, pipelining, limits, back-pressure."""

    __slots__ = (
        "_ahead",
        "_chunks",
        "_head_bytes",
        "_parser",
        "_part",
        "_received",
        "_refusal",
        "_request",
        "_server",
        "_size",
        "_transport",
        "_url",
        "_waiting",
        "context",
        "deadline",
        "paused",
    )

    def __init__(self, server: Server) -> None:
        self._server = server
        self._parser: httptools.HttpRequestParser | None = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._waiting: deque[HttpRequest] = deque()
        self._request: HttpRequest | None = None
        """The one that is being answered."""
        self._refusal: Refused | None = None
        """The answer once those before it are given; nothing more is read."""
        self._ahead = 0
        """Bytes that came while an answer was under way."""
        self._begin()
        self.deadline = inf
        self.paused = False
        """The client reads too slowly: nothing more should be sent until `on_writable`."""
        self.context: object = None
        """The handler's own."""

    def _begin(self) -> None:
        self._part = Phase.IDLE
        self._received = HttpRequest()
        self._chunks: list[bytes] = []
        self._size = 0
        self._head_bytes = 0
        self._url = b""

    @property
    def phase(self) -> Phase:
        return Phase.BUSY if self._request is not None else self._part

    # The transport calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        self._expect_within(self._server.limits.head_timeout_s)
        if not self._server.admit(self):
            self._refuse(Refused(503, "too many connections"))

    def connection_lost(self, exc: Exception | None) -> None:
        busy = self.phase is Phase.BUSY
        self._transport = self._parser = self._request = None
        self._waiting.clear()
        self._server.forget(self)
        if busy:
            self._server.handler.on_client_left(self)
        self.context = None

    def eof_received(self) -> bool:
        return False

    def pause_writing(self) -> None:
        self.paused = True
        self._expect_within(self._server.limits.write_timeout_s)

    def resume_writing(self) -> None:
        self.paused = False
        self._rearm()
        if self.phase is Phase.BUSY:
            self._server.handler.on_writable(self)

    def data_received(self, data: bytes) -> None:
        if self._parser is None:
            return
        limits = self._server.limits
        if self._part is not Phase.BODY:
            self._head_bytes += len(data)
        if self.phase is Phase.BUSY:
            self._ahead += len(data)
        try:
            self._parser.feed_data(data)
            if self._part is not Phase.BODY and self._head_bytes > limits.max_head_bytes:
                raise Refused(431, "request head too large")
            if self._ahead > limits.max_body_bytes:
                raise Refused(413, "too much sent ahead of the answers")
        except httptools.HttpParserUpgrade:
            self._parser = None  # served as HTTP/1.1; what follows is not ours to read
        except (Refused, httptools.HttpParserError) as error:
            cause = error if isinstance(error, Refused) else error.__context__
            malformed = Refused(400, f"malformed HTTP request: {error}")
            self._refusal = cause if isinstance(cause, Refused) else malformed
            self._parser = None
        self._next()

    def _next(self) -> None:
        """Turn to the oldest request that waits, or refuse what could not become one."""
        if self.phase is Phase.BUSY or self._transport is None:
            return
        if self._waiting:
            self._request = self._waiting.popleft()
            self._rearm()
            self._server.handler.on_request(self, self._request)
        elif self._refusal is not None:
            self._refuse(self._refusal)

    # The parser calls. What they raise ends `feed_data`.

    def on_message_begin(self) -> None:
        self._part = Phase.HEAD
        self._rearm()

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._received.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        parser, request, limits = self._parser, self._received, self._server.limits
        assert parser is not None
        headers = request.headers
        request.method = parser.get_method().decode("latin-1")
        request.version = parser.get_http_version()
        request.keep_alive = parser.should_keep_alive() and not parser.should_upgrade()
        path, _, request.query = self._url.decode("latin-1").partition("?")
        request.path = (
            path if path.startswith("/") else "/" + path.partition("://")[2].partition("/")[2]
        )
        if len(self._url) + sum(map(len, (*headers, *headers.values()))) > limits.max_head_bytes:
            raise Refused(431, "request head too large")
        self._head_bytes = 0
        self._part = Phase.BODY
        self._rearm()
        length = headers.get("content-length", "")
        self._grow(int(length) if length.isdecimal() else 0)
        self._size = 0
        if headers.get("expect", "").lower() == "100-continue" and self._request is None:
            self.send(CONTINUE)

    def on_body(self, body: bytes) -> None:
        self._grow(len(body))
        self._chunks.append(body)

    def _grow(self, size: int) -> None:
        self._size += size
        if self._size > self._server.limits.max_body_bytes:
            raise Refused(413, f"request body over {self._server.limits.max_body_bytes} bytes")

    def on_message_complete(self) -> None:
        request = self._received
        request.body = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        self._waiting.append(request)
        self._begin()
        if len(self._waiting) > self._server.limits.max_pipelined:
            raise Refused(400, "too many requests sent ahead of their answers")

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
            self.close()
            return
        self.context = None
        self._ahead = 0
        self._rearm()
        if self._waiting or self._refusal is not None:
            # Not from within the handler's own call, lest a pipeline become a recursion.
            asyncio.get_running_loop().call_soon(self._next)

    def close(self) -> None:
        """Close once what was sent has left; a client that does not read it is cut off in time."""
        self._parser = None
        if self._transport is not None and not self._transport.is_closing():
            self._expect_within(self._server.limits.write_timeout_s)
            self._transport.close()

    def abort(self) -> None:
        """Close at once: the answer ends in the middle and the client shall see that."""
        self._parser = None
        if self._transport is not None:
            wire = self._transport.get_extra_info("socket")
            if wire is not None:  # a reset: an orderly end would look like the answer's own
                wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
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

    def _refuse(self, refused: Refused) -> None:
        """Answer what never became a request, and close."""
        status, because = refused.args
        body, content_type = self._server.handler.on_refused(status, because)
        self._parser = self._refusal = None
        self._part = Phase.IDLE
        headers = [("content-type", content_type), ("content-length", str(len(body)))]
        self.send(response_head(status, [*headers, ("connection", "close")]) + body)
        transport = self._transport
        if transport is not None and transport.can_write_eof():
            # Closing with bytes of the client unread would reset the connection, and it might
            # never see the answer: read on for a while, and drop what comes.
            self._expect_within(LINGER_S)
            transport.write_eof()
        else:
            self.close()

    def take_over(self, protocol: asyncio.Protocol) -> None:
        """Give the socket to another protocol; this connection is out of the game."""
        transport = self._transport
        assert transport is not None
        self._transport = self._parser = self._request = None
        self._waiting.clear()
        self._server.forget(self)
        transport.set_protocol(protocol)
        protocol.connection_made(transport)

    # Patience.

    def _expect_within(self, seconds: float) -> None:
        self.deadline = self._server.now() + seconds

    def _rearm(self) -> None:
        """Be patient for as long as befits what is waited for."""
        limits, phase = self._server.limits, self.phase
        if self.paused:
            return  # the write timeout runs
        if phase is Phase.BUSY:
            self.deadline = inf
        elif phase is Phase.HEAD:
            self._expect_within(limits.head_timeout_s)
        elif phase is Phase.BODY:
            self._expect_within(limits.body_timeout_s)
        else:
            self._expect_within(limits.idle_timeout_s)

    def expire(self) -> None:
        """The deadline has passed."""
        if self.phase in (Phase.HEAD, Phase.BODY) and not self.paused:
            self._refuse(Refused(408, f"timed out waiting for {self.phase.value}"))
        elif self.phase is Phase.IDLE and self._parser is not None:
            self.close()
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
            lambda: ServerConnection(self),
            host,
            port,
            ssl=tls,
            ssl_handshake_timeout=self.limits.head_timeout_s if tls else None,
            backlog=4096,
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
            if connection.phase is Phase.IDLE:
                connection.close()
        if not self.connections:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await self._empty.wait()
        for connection in list(self.connections):
            connection.abort()
