"""Hundreds of clients at once: how do they ask, and how do they misbehave?"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager, suppress

from answers import CHAT, COMPLETIONS, Answer, Question, judge


async def until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    """Wait for what other processes bring about."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.01)


class Client(asyncio.Protocol):
    """One client with one question. It keeps what comes, and reads none of it."""

    def __init__(self, question: Question) -> None:
        self.question = question
        self.raw = bytearray()
        self.events = 0
        self.over = False
        self.stops_at: int | None = None
        """Events after which it reads no more, till told to."""
        self._transport: asyncio.Transport | None = None

    async def ask(self, port: int, narrow: bool = False) -> None:
        """Connect and send the question. Whoever cannot connect has no answer.

        `narrow`: so that little of the answer is on its way when it is not read. Else the buffers
        of both ends, which grow with the segments, would take in all of it.
        """
        wire = socket.socket()
        wire.setblocking(False)
        if narrow:
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
        loop = asyncio.get_running_loop()
        try:
            await loop.sock_connect(wire, ("127.0.0.1", port))
            await loop.create_connection(lambda: self, sock=wire)
        except OSError:
            wire.close()
            self.over = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment] # uvloop's is no subclass
        self._transport.write(self.question.http())  # type: ignore[union-attr]

    def data_received(self, data: bytes) -> None:
        self.raw += data
        self.events += data.count(b"data: ")
        if self.stops_at is not None and self.events >= self.stops_at:
            self._transport.pause_reading()  # type: ignore[union-attr]

    def connection_lost(self, exc: Exception | None) -> None:
        self.over = True

    def read_on(self) -> None:
        self.stops_at = None
        if self._transport is not None and not self.over:
            self._transport.resume_reading()

    def leave(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def answer(self) -> Answer:
        return judge(self.question, bytes(self.raw), self.over)


async def all_over(clients: Collection[Client], within_s: float = 20.0) -> list[Answer]:
    """Their answers, once all have ended; those that have not by then hang."""
    with suppress(TimeoutError):
        await until(lambda: all(client.over for client in clients), within_s)
    return [client.answer() for client in clients]


class Crowd:
    """Clients that ask alike: chat and text completions by turns, every third without usage."""

    def __init__(self, port: int, count: int, tokens: int, narrow: bool = False) -> None:
        self._port = port
        self._narrow = narrow
        self.clients = [
            Client(Question(i, tokens, COMPLETIONS if i % 2 else CHAT, usage=i % 3 > 0))
            for i in range(count)
        ]

    async def ask(self, over_s: float = 0.0) -> None:
        """All ask, one after the other within so many seconds."""
        gap_s = over_s / len(self.clients)
        for client in self.clients:
            await client.ask(self._port, self._narrow)
            await asyncio.sleep(gap_s)

    async def flowing(self, events: int = 4) -> None:
        """Wait until each has so many events, or an end."""
        await until(lambda: all(c.over or c.events >= events for c in self.clients))

    async def stop_reading(self, events: int = 4) -> None:
        """Each reads no more once it has so many events. Wait until all have."""
        for client in self.clients:
            client.stops_at = events
        await self.flowing(events)

    def read_on(self) -> None:
        for client in self.clients:
            client.read_on()

    async def answers(self) -> list[Answer]:
        """What each has got in the end."""
        return await all_over(self.clients)

    def leave(self) -> None:
        for client in self.clients:
            client.leave()


@asynccontextmanager
async def crowd(
    port: int, count: int, tokens: int, over_s: float = 0.0, narrow: bool = False
) -> AsyncIterator[Crowd]:
    """A crowd that has asked, and of which nobody stays behind."""
    gathered = Crowd(port, count, tokens, narrow)
    try:
        await gathered.ask(over_s)
        yield gathered
    finally:
        gathered.leave()
