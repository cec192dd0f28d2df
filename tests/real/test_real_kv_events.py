"""Is all that a real engine caches known from its events?

vLLM with room for 40 blocks, so that it gives up many. Its own view is that of the events, folded
here without any of Paceline's code, and the cached tokens that it tells with each answer.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from collections.abc import Iterator

import aiohttp
import msgspec
import pytest
import uvloop
import zmq
import zmq.asyncio
from install import tiny_hf, vllm_is_ready
from live import free_port
from servers import Engine, vllm_server

from paceline.domain.kvevents import BlocksChanged, BlocksUnknown, short, token_blocks
from paceline.engines.kvevents import KvEventStream, Source, sources
from paceline.kernel.blocks import BlockIndex

pytestmark = [
    pytest.mark.real,
    pytest.mark.timeout(400),
    pytest.mark.skipif(
        not vllm_is_ready() and os.environ.get("PACELINE_REAL") != "1",
        reason="engines are not installed: python tests/real/install.py all",
    ),
]

BLOCK = 32
BLOCKS = 40
PLACE = 0
VOCABULARY = 40_000


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    events = {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": f"tcp://*:{free_port()}",
        "replay_endpoint": f"tcp://*:{free_port()}",
        "topic": "kv@node",
    }
    extra = ["--kv-events-config", msgspec.json.encode(events).decode()]
    extra += ["--block-size", str(BLOCK), "--num-gpu-blocks-override", str(BLOCKS)]
    extra += ["--max-model-len", "1024"]
    environment = {"VLLM_SERVER_DEV_MODE": "1"}  # for /reset_prefix_cache
    with vllm_server(free_port(), 0, extra=extra, model=tiny_hf(), env=environment) as started:
        yield started


class Listener:
    """The engine, and what is known of its cache by listening."""

    def __init__(self, engine: Engine, source: Source, http: aiohttp.ClientSession) -> None:
        self.engine = engine
        self.source = source
        self.http = http
        self.index = BlockIndex()
        self.rng = random.Random(11)
        self.stream = KvEventStream("w", source, self.tell)

    def tell(self, fact: BlocksChanged | BlocksUnknown) -> None:
        if isinstance(fact, BlocksUnknown):
            self.index.begin(PLACE, fact.rank, fact.whole)
        else:
            self.index.change(PLACE, fact.events, fact.rank, fact.unreadable)

    async def ask(self, prompt: list[int], tokens: int = 1, salt: str | None = None) -> int:
        """The prompt's cached tokens, as the engine tells them with its answer."""
        body = {"model": "m", "prompt": prompt, "max_tokens": tokens, "ignore_eos": True}
        body |= {"temperature": 0, "cache_salt": salt} if salt else {"temperature": 0}
        async with self.http.post(f"{self.engine.url}/v1/completions", json=body) as answer:
            assert answer.status == 200, await answer.text()
            usage = (await answer.json())["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    def prompt(self) -> list[int]:
        """One of three texts up to somewhere, and then something of its own."""
        kind, length = self.rng.randrange(3), self.rng.randrange(1, 16 * BLOCK)
        own = [self.rng.randrange(VOCABULARY) for _ in range(self.rng.randrange(3 * BLOCK))]
        return [1000 * kind + i for i in range(length)] + own

    async def load(self, requests: int) -> None:
        """In crowds of four, with prompts in common, so that blocks are cached twice."""
        for _ in range(requests // 4):
            prompts = [self.prompt() for _ in range(2)] * 2
            await asyncio.gather(*(self.ask(p, self.rng.randrange(1, 40)) for p in prompts))

    async def agrees(self) -> None:
        """Wait until the index has what the engine has; the test's own timeout bounds it."""
        while self.index.held(PLACE).keys() != await self.cached():  # noqa: ASYNC110
            await asyncio.sleep(0.05)

    async def cached(self) -> set[int]:
        """What the engine has by all events of its life."""
        socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
        socket.connect(self.source.replay_endpoint)
        await socket.send_multipart([b"", bytes(8)])
        copies: Counter[int] = Counter()
        while (frames := await socket.recv_multipart())[-1]:
            for event in msgspec.msgpack.decode(frames[-1])[1]:
                if event["type"] == "BlockStored":
                    copies.update(event["block_hashes"])
                elif event["type"] == "BlockRemoved":
                    copies.subtract(event["block_hashes"])
                else:
                    copies.clear()
        socket.close(linger=0)
        assert min(copies.values(), default=0) >= 0
        return {short(block) for block, count in copies.items() if count}


async def listen(engine: Engine) -> tuple[Listener, asyncio.Task[None], aiohttp.ClientSession]:
    http = aiohttp.ClientSession()
    (source,) = await sources(http, engine.url)
    listener = Listener(engine, source, http)
    task = asyncio.create_task(listener.stream.run(), name="kv events")
    while not listener.index.follows(PLACE):  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    return listener, task, http


def test_the_index_is_the_engines_view_after_a_random_workload(engine: Engine) -> None:
    async def run() -> None:
        listener, task, http = await listen(engine)
        await listener.load(80)
        await listener.agrees()
        index = listener.index
        assert 0 < len(index) < BLOCKS
        assert (index.orphans, index.strangers, listener.stream.counts.lost) == (0, 0, 0)
        assert index.follows(PLACE)
        task.cancel()
        await http.close()

    uvloop.run(run())


def test_cached_tokens_are_known_before_each_prompt_is_sent(engine: Engine) -> None:
    async def run() -> None:
        listener, task, http = await listen(engine)  # comes late, and hears all from the beginning
        hits = 0
        for i in range(60):
            prompt, salt = listener.prompt(), "pepper" if i % 5 == 0 else ""
            await listener.agrees()
            blocks = token_blocks(prompt, BLOCK, salt=salt)
            expected = listener.index.cached_tokens(blocks, len(prompt)).get(PLACE, 0)
            assert await listener.ask(prompt, salt=salt) == expected
            hits += expected > 0
        assert hits > 10
        task.cancel()
        await http.close()

    uvloop.run(run())


def test_a_cleared_cache_is_empty(engine: Engine) -> None:
    async def run() -> None:
        listener, task, http = await listen(engine)
        before = list(range(5 * BLOCK))
        await listener.ask(before)
        async with http.post(f"{engine.url}/reset_prefix_cache") as answer:
            assert (await answer.json())["success"]
        await listener.ask([9] * 2 * BLOCK)  # vLLM tells of it with its next step
        await listener.agrees()
        while len(listener.index) > 2:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        assert listener.index.depths(token_blocks(before, BLOCK).names) == {}
        task.cancel()
        await http.close()

    uvloop.run(run())
