"""Does whoever listens to an engine know its cache, whatever is missed on the way?"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from typing import Any
from unittest import mock

import aiohttp
import msgspec
import pytest
import zmq
import zmq.asyncio
from live import free_port

from paceline.domain.kvevents import BlocksChanged, BlocksUnknown, short, token_blocks
from paceline.engines.emulated import EngineSettings, emulated_engines
from paceline.engines.emulated.server import EmulatedEngine
from paceline.engines.kvevents import Batch, KvEventStream, Source, sources
from paceline.kernel.blocks import BlockIndex

BLOCK = 16
PLACE = 0


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - what is waited for comes by the network
            await asyncio.sleep(0.005)


def settings(replay: bool = True, **others: Any) -> EngineSettings:
    """An engine with room for 64 blocks, so that it gives up many."""
    return EngineSettings(
        profile="tiny",
        model="m",
        speed=50.0,
        kv_tokens=64 * BLOCK,
        max_model_len=64 * BLOCK,
        kv_events_endpoint=f"tcp://127.0.0.1:{free_port()}",
        kv_events_replay_endpoint=f"tcp://127.0.0.1:{free_port()}" if replay else "",
        **others,
    )


class Listener:
    """An engine, and what is known of its cache by listening."""

    def __init__(self, engine: EmulatedEngine, http: aiohttp.ClientSession) -> None:
        self.engine = engine
        self.http = http
        self.index = BlockIndex()
        self.told: list[str] = []
        """Why the view was begun anew."""
        self.rng = random.Random(7)
        told = engine.settings
        source = Source(told.kv_events_endpoint, told.kv_events_replay_endpoint)
        self.stream = KvEventStream("w", source, self.tell)

    def tell(self, fact: BlocksChanged | BlocksUnknown) -> None:
        if isinstance(fact, BlocksUnknown):
            self.told.append(fact.because)
            self.index.begin(PLACE, fact.rank, fact.whole)
        else:
            self.index.change(PLACE, fact.events, fact.rank, fact.unreadable)

    @property
    def missing(self) -> set[int]:
        """Blocks of the engine that the index has not, or the other way round."""
        publisher = self.engine._engine.kv_events
        assert publisher is not None
        cached = {short(name) for name in publisher.cached}
        return cached ^ self.index.held(PLACE).keys()

    async def agree(self) -> None:
        await until(lambda: not self.missing)

    async def ask(self, prompt: list[int], tokens: int = 3, salt: str | None = None) -> int:
        """The prompt's cached tokens, as the engine tells them with its answer."""
        body = {"prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "cache_salt": salt}
        async with self.http.post(self.engine.url + "/v1/completions", json=body) as answer:
            usage = (await answer.json())["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    def prompt(self) -> list[int]:
        """One of texts that have beginnings of different lengths in common."""
        kind, length = self.rng.randrange(4), self.rng.randrange(1, 12 * BLOCK)
        own = [self.rng.randrange(1000) for _ in range(self.rng.randrange(40))]
        return [kind * 1000 + i for i in range(length)] + own

    async def load(self, requests: int = 20) -> None:
        """Some requests at once, and more after them."""
        for _ in range(2):
            asked = (
                self.ask(self.prompt(), self.rng.randrange(1, 50)) for _ in range(requests // 2)
            )
            await asyncio.gather(*asked)

    async def post(self, path: str, **body: Any) -> bytes:
        async with self.http.post(self.engine.url + path, json=body) as answer:
            assert answer.status == 200
            return await answer.read()


@asynccontextmanager
async def listening(
    made: EngineSettings, before: Callable[[Listener], Awaitable[None]] | None = None
) -> AsyncIterator[Listener]:
    async with emulated_engines([made]) as (engine,), aiohttp.ClientSession() as http:
        listener = Listener(engine, http)
        if before is not None:
            await before(listener)
        task = asyncio.create_task(listener.stream.run(), name="kv events")
        try:
            yield listener
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert task.cancelled()


@asynccontextmanager
async def deaf_to(stream: KvEventStream, numbers: Collection[int]) -> AsyncIterator[None]:
    """The network loses these batches as they are published."""
    live = stream._live

    async def some(number: int, batch: Batch) -> None:
        if number not in numbers:
            await live(number, batch)

    with mock.patch.object(stream, "_live", some):
        yield


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await test()

    asyncio.run(bounded())


def test_the_index_has_what_the_engine_has_after_any_load() -> None:
    async def test() -> None:
        async with listening(settings()) as listener:
            await listener.load(40)
            await listener.agree()
            assert listener.index.follows(PLACE)
            assert len(listener.index) > 40
            assert listener.stream.counts.lost == 0
            assert listener.index.strangers == listener.index.orphans == 0

    run(test)


def test_what_will_be_cached_of_a_prompt_is_known_before_it_is_sent() -> None:
    async def test() -> None:
        async with listening(settings()) as listener:
            hits = 0
            for i in range(60):
                prompt, salt = listener.prompt(), ("", "pepper")[i % 5 == 0]
                await listener.agree()
                blocks = token_blocks(prompt, BLOCK, salt=salt)
                expected = listener.index.cached_tokens(blocks, len(prompt))
                cached = await listener.ask(prompt, salt=salt or None)
                assert cached == expected.get(PLACE, 0)
                hits += bool(cached)
            assert hits > 10

    run(test)


def test_a_late_listener_hears_the_story_from_its_beginning() -> None:
    async def test() -> None:
        async with listening(settings(), before=Listener.load) as listener:
            await listener.agree()
            assert listener.index.follows(PLACE)

    run(test)


def test_a_late_listener_without_replay_knows_that_it_knows_little() -> None:
    async def test() -> None:
        async with listening(settings(replay=False), before=Listener.load) as listener:
            await asyncio.sleep(0.2)
            await listener.load(2)
            await until(lambda: listener.stream.counts.batches)
            assert listener.told == ["events are lost"]
            assert not listener.index.follows(PLACE)
            await listener.post("/reset_prefix_cache")
            await listener.load()
            await listener.agree()
            assert listener.index.follows(PLACE)

    run(test)


def test_an_engine_that_has_cached_nothing_is_known_to_have_nothing() -> None:
    async def test() -> None:
        async with listening(settings()) as listener:
            await until(lambda: listener.index.follows(PLACE))
            assert listener.told == ["its engine has cached nothing yet"]

    run(test)


def test_what_the_network_loses_is_heard_again() -> None:
    async def test() -> None:
        async with listening(settings()) as listener:
            await listener.ask([1] * BLOCK)
            await listener.agree()
            async with deaf_to(listener.stream, range(3, 40, 7)):
                await listener.load()
                await listener.load()
            await listener.ask([2] * 3 * BLOCK)
            await listener.agree()
            counts = listener.stream.counts
            assert counts.gaps
            assert (counts.lost, counts.restarts) == (0, 0)
            assert listener.index.follows(PLACE)

    run(test)


def test_what_the_engine_no_longer_remembers_is_not_believed() -> None:
    async def test() -> None:
        async with listening(settings(kv_events_buffer=2)) as listener:
            await listener.ask([1] * BLOCK)
            await listener.agree()
            async with deaf_to(listener.stream, range(1, 9)):
                for i in range(12):
                    await listener.ask([3 + i] * BLOCK)
            await until(lambda: listener.stream.counts.lost)
            assert "events are lost" in listener.told
            assert not listener.index.follows(PLACE)
            assert listener.index.depths(token_blocks([1] * BLOCK, BLOCK).names) == {}

    run(test)


@pytest.mark.parametrize("replay", [True, False])
def test_a_restarted_engine_has_only_what_it_has_cached_since(replay: bool) -> None:
    async def test() -> None:
        async with listening(settings(replay)) as listener:
            await listener.load()
            await listener.ask([1] * 3 * BLOCK)
            await listener.agree()
            await listener.post("/emulate/crash", restart_after_s=0.05)
            listener.engine.listening.clear()
            await listener.engine.listening.wait()
            if not replay:
                await asyncio.sleep(0.5)  # until it is connected again
            await listener.load(4)
            await listener.agree()
            assert listener.told[-1] == "its engine has started"
            assert listener.index.follows(PLACE)
            assert listener.index.depths(token_blocks([1] * BLOCK, BLOCK).names) == {}

    run(test)


def test_a_cleared_cache_is_empty() -> None:
    async def test() -> None:
        async with listening(settings()) as listener:
            await listener.load()
            await listener.agree()
            assert msgspec.json.decode(await listener.post("/reset_prefix_cache")) == {
                "success": True
            }
            await listener.agree()
            assert len(listener.index) == 0
            await listener.load()
            await listener.agree()

    run(test)


def test_a_listener_may_be_there_before_the_engine() -> None:
    async def test() -> None:
        made = settings()
        source = Source(made.kv_events_endpoint, made.kv_events_replay_endpoint)
        heard: list[BlocksChanged | BlocksUnknown] = []
        task = asyncio.create_task(KvEventStream("w", source, heard.append).run())
        await asyncio.sleep(0.1)
        async with emulated_engines([made]) as (engine,), aiohttp.ClientSession() as http:
            listener = Listener(engine, http)
            await listener.ask([1] * 40)
            await until(lambda: len(heard) >= 2)
        task.cancel()
        assert isinstance(heard[0], BlocksUnknown)
        assert heard[0].whole
        assert isinstance(heard[1], BlocksChanged)

    run(test)


def test_messages_that_are_none_are_counted_and_passed_over() -> None:
    async def test() -> None:
        port = free_port()
        publisher = zmq.asyncio.Context.instance().socket(zmq.PUB)
        publisher.bind(f"tcp://127.0.0.1:{port}")
        heard: list[BlocksChanged | BlocksUnknown] = []
        stream = KvEventStream("w", Source(f"tcp://127.0.0.1:{port}"), heard.append)
        task = asyncio.create_task(stream.run())
        good = msgspec.msgpack.encode([1.0, [{"type": "AllBlocksCleared"}]])
        async with asyncio.timeout(20):
            while stream.counts.spoilt < 3 or not heard:
                await publisher.send_multipart([b"", bytes(8), b"\xc1"])
                await publisher.send_multipart([b"", b"seven", good])
                await publisher.send_multipart([good])
                await publisher.send_multipart([b"", bytes(8), good])
                await asyncio.sleep(0.01)
        task.cancel()
        publisher.close(linger=0)
        assert heard[0] == BlocksUnknown("w", "its engine has started", whole=True)

    run(test)


def test_an_engine_says_where_it_tells() -> None:
    async def test() -> None:
        port, replay = free_port(), free_port()
        made = EngineSettings(
            profile="tiny",
            kv_events_endpoint=f"tcp://*:{port}",
            kv_events_replay_endpoint=f"tcp://*:{replay}",
            kv_events_topic="kv@node",
        )
        silent = EngineSettings(profile="tiny")
        async with (
            emulated_engines([made, silent]) as (engine, other),
            aiohttp.ClientSession() as http,
        ):
            assert await sources(http, engine.url) == [
                Source(f"tcp://127.0.0.1:{port}", f"tcp://127.0.0.1:{replay}", "kv@node")
            ]
            assert await sources(http, other.url) == []
        async with aiohttp.ClientSession() as http:
            assert await sources(http, engine.url) == []

    run(test)
