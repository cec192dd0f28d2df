"""What does the engine tell of its KV cache? The same as vLLM, in vLLM's form.

Batches on a ZeroMQ publisher, one a step that changed anything; the last ones again for whoever
asks the replay socket with the first number that it wants.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence

import msgspec
import zmq
import zmq.asyncio

from paceline.engines.emulated.settings import EngineSettings
from paceline.engines.emulated.tokens import BlockChain

HIGH_WATER = 100_000
END = (-1).to_bytes(8, "big", signed=True)


class BlockStored(msgspec.Struct, tag=True, omit_defaults=True):
    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: list[tuple[str] | None]
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None


class BlockRemoved(msgspec.Struct, tag=True, omit_defaults=True):
    block_hashes: list[int]
    medium: str | None
    group_idx: int | None = None


class AllBlocksCleared(msgspec.Struct, tag=True):
    pass


class KvEventPublisher:
    """The journal of an engine's block pool, made public."""

    def __init__(self, settings: EngineSettings, block_size: int) -> None:
        self.cached: dict[int, None] = {}
        """The hashes of all blocks that are cached, as told."""
        self._size = block_size
        self._topic = settings.kv_events_topic.encode()
        self._events: list[BlockStored | BlockRemoved | AllBlocksCleared] = []
        self._last: tuple[Sequence[int], int] | None = None
        """The text of the last event's last block, and its place there."""
        self._number = 0
        self._told: deque[tuple[bytes, bytes]] = deque(maxlen=settings.kv_events_buffer)
        self._encode = msgspec.msgpack.Encoder().encode
        context = zmq.asyncio.Context.instance()
        self._publisher = zmq.Socket(context, zmq.PUB)
        self._publisher.set_hwm(HIGH_WATER)
        self._publisher.bind(settings.kv_events_endpoint)
        self._replay: zmq.asyncio.Socket | None = None
        if settings.kv_events_replay_endpoint:
            self._replay = context.socket(zmq.ROUTER)
            self._replay.bind(settings.kv_events_replay_endpoint)

    # The pool's journal.

    def stored(self, names: Sequence[int], at: int) -> None:
        name = names[at]
        if name in self.cached:
            return
        self.cached[name] = None
        assert isinstance(names, BlockChain)
        tokens = names.tokens_of(at)
        salted = (names.salt,) if names.salt and not at else None
        event = self._events[-1] if self._events else None
        if isinstance(event, BlockStored) and self._last == (names, at - 1):
            event.block_hashes.append(name)
            event.token_ids += tokens
            event.extra_keys.append(salted)
        else:
            event = BlockStored(
                block_hashes=[name],
                parent_block_hash=names[at - 1] if at else None,
                token_ids=tokens,
                block_size=self._size,
                lora_id=None,
                medium="GPU",
                lora_name=None,
                extra_keys=[salted],
                group_idx=0,
                kv_cache_spec_kind="full_attention",
            )
            self._events.append(event)
        self._last = names, at

    def removed(self, name: int) -> None:
        del self.cached[name]
        self._events.append(BlockRemoved([name], "GPU", 0))

    def cleared(self) -> None:
        self.cached.clear()
        self._events.append(AllBlocksCleared())
        self.tell()

    # The wire.

    def tell(self) -> None:
        """Publish what has happened since the last time."""
        if not self._events:
            return
        number = self._number.to_bytes(8, "big")
        payload = self._encode([time.time(), self._events, 0])
        self._publisher.send_multipart((self._topic, number, payload))
        self._told.append((number, payload))
        self._number += 1
        self._events, self._last = [], None

    async def repeat(self) -> None:
        """Answer those who have missed something, for ever."""
        if self._replay is None:
            return
        while True:
            frames = await self._replay.recv_multipart()
            if len(frames) != 3:
                continue
            reader, _, first = frames
            for number, payload in [told for told in self._told if told[0] >= first]:
                await self._replay.send_multipart((reader, b"", self._topic, number, payload))
            await self._replay.send_multipart((reader, b"", b"", END, b""))
            await asyncio.sleep(0)

    def close(self) -> None:
        self._publisher.close(linger=0)
        if self._replay is not None:
            self._replay.close(linger=0)
