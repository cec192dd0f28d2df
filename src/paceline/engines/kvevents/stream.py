"""How is an engine's story of its KV cache heard whole?

Batches come numbered from a publisher that waits for nobody. So they are counted, and what was
missed is asked for again: when the connection is made, when it is made anew, when a number is
skipped, and when nothing comes for a while. The engine repeats from the last batch known; if it has
another one by that number, or none, it has restarted. What it no longer remembers makes its cache
one of which too little is known.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

import msgspec
import structlog
import zmq
import zmq.asyncio

from paceline.domain.kvevents import BlocksChanged, BlocksUnknown, Follows, Position
from paceline.engines.kvevents.decode import Batch, Decoder
from paceline.engines.kvevents.sources import Source

REPLAY_S = 5.0
"""Silence after which a replay is given up. vLLM looks for such wishes ten times a second."""
QUIET_S = 2.0
"""Without news for so long, ask whether there were any: the last batch may be lost like another."""
QUEUED = 100_000
"""Batches that may wait to be read, as at the publisher; more are dropped, and asked for again."""
MOST_BYTES = 64 * 1024 * 1024
"""The largest frame that is read."""
AT_ONCE = 32
"""Batches read before others get the loop."""
END = -1
"""The number of the batch that ends a replay."""

Told = Callable[[BlocksChanged | BlocksUnknown], None]
log = structlog.get_logger("paceline")


class Counts(msgspec.Struct):
    """What was met so far."""

    batches: int = 0
    gaps: int = 0
    """Times that batches were missing."""
    lost: int = 0
    """Of them, those that a replay did not mend."""
    restarts: int = 0
    spoilt: int = 0
    """Messages that are no batch."""


class KvEventStream:
    """Listens to one cache, and tells in order. `run` it in a task group."""

    def __init__(self, worker_id: str, source: Source, tell: Told) -> None:
        self.counts = Counts()
        self.decoder = Decoder()
        self._worker_id = worker_id
        self._source = source
        self._tell = tell
        self._at = Position()
        self._empty = False
        """It was told that nothing is cached, and that still holds."""
        self._answered = True
        """The last wish for a replay was granted."""
        self._context = zmq.asyncio.Context.instance()

    async def run(self) -> None:
        """Until cancelled. An engine that is not there yet, or no more, is waited for."""
        socket = self._socket(zmq.SUB)
        socket.setsockopt_string(zmq.SUBSCRIBE, self._source.topic)
        connected = socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
        socket.connect(self._source.endpoint)
        poller = zmq.asyncio.Poller()
        poller.register(connected, zmq.POLLIN)
        poller.register(socket, zmq.POLLIN)
        try:
            while True:
                ready = dict(await poller.poll(1000 * QUIET_S))
                if connected in ready:
                    await connected.recv_multipart()
                if connected in ready or not ready:
                    await self._catch_up()
                if socket in ready:
                    await self._read(socket)
                await asyncio.sleep(0)
        finally:
            socket.disable_monitor()
            connected.close(linger=0)
            socket.close(linger=0)

    async def _read(self, socket: zmq.asyncio.Socket) -> None:
        """What has come."""
        for _ in range(AT_ONCE):
            try:
                frames = await socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if (heard := self._heard(frames)) is not None:
                await self._live(*heard)

    def _heard(self, frames: list[bytes]) -> tuple[int, Batch] | None:
        """A message's number, and what it says."""
        if len(frames) < 3 or len(frames[-2]) != 8:
            self.counts.spoilt += 1
            return None
        number = int.from_bytes(frames[-2], "big", signed=True)
        if number == END:
            return number, Batch(0.0)
        try:
            return number, self.decoder.decode(frames[-1])
        except msgspec.MsgspecError:
            self.counts.spoilt += 1
            return None  # the next one will miss it

    async def _live(self, number: int, batch: Batch) -> None:
        follows = self._at.followed_by(number, batch.at)
        if follows is Follows.RESTARTED:
            self._at = Position()
            follows = self._at.followed_by(number, batch.at)
        if follows is Follows.GAP:
            self.counts.gaps += self._at.number >= 0
            await self._catch_up()
        self._take(number, batch)

    def _take(self, number: int, batch: Batch) -> None:
        """Tell a batch, and before it what is wrong with the story so far."""
        follows = self._at.followed_by(number, batch.at)
        if follows is Follows.REPEATED:
            return
        if number == 0:
            self.counts.restarts += self.counts.batches > 0
            self._begin("its engine has started", whole=True)
        elif follows is not Follows.NEXT:
            self.counts.lost += 1
            self._begin("events are lost")
        self._at = Position(number, batch.at)
        self._empty = False
        self.counts.batches += 1
        if batch.events or batch.unreadable:
            worker, rank = self._worker_id, self._source.rank
            self._tell(BlocksChanged(worker, batch.events, rank, batch.unreadable))

    def _begin(self, because: str, whole: bool = False) -> None:
        self._tell(BlocksUnknown(self._worker_id, because, self._source.rank, whole))

    # Replay.

    async def _catch_up(self) -> None:
        """Hear what was missed, all of it if the engine is not the one that was known."""
        if not self._source.replay_endpoint:
            return
        try:
            if not await self._replay():
                self._at = Position()  # another story: from its beginning
                await self._replay()
            self._answered = True
        except TimeoutError:
            if self._answered:
                log.warning("KV events are not repeated", worker=self._worker_id, of=self._source)
            self._answered = False

    async def _replay(self) -> bool:
        """Take what the engine repeats. False: it does not know the last batch that we know."""
        known = self._at
        to_meet = known.number >= 0
        async with aclosing(self._repeated(max(known.number, 0))) as repeated:
            async for number, batch in repeated:
                if to_meet and known.followed_by(number, batch.at) is not Follows.REPEATED:
                    return False
                to_meet = False
                self._take(number, batch)
        if self._at.number < 0 and not self._empty and not self.counts.spoilt:
            self._empty = True
            self._begin("its engine has cached nothing yet", whole=True)
        return not to_meet

    async def _repeated(self, first: int) -> AsyncGenerator[tuple[int, Batch], None]:
        """The batches from that number on, as far as the engine remembers them."""
        socket = self._socket(zmq.DEALER)
        socket.connect(self._source.replay_endpoint)
        try:
            await socket.send_multipart([b"", first.to_bytes(8, "big")])
            while True:
                for _ in range(AT_ONCE):
                    async with asyncio.timeout(REPLAY_S):
                        frames = await socket.recv_multipart()
                    heard = self._heard(frames)
                    if heard is not None and heard[0] == END:
                        return
                    if heard is not None:
                        yield heard
                await asyncio.sleep(0)
        finally:
            socket.close(linger=0)

    def _socket(self, kind: int) -> zmq.asyncio.Socket:
        socket = self._context.socket(kind)
        socket.setsockopt(zmq.RCVHWM, QUEUED)
        socket.setsockopt(zmq.MAXMSGSIZE, MOST_BYTES)
        socket.setsockopt(zmq.LINGER, 0)
        return socket
