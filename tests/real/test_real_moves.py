"""Do answers of real engines go on elsewhere as if nothing had happened?

Two engines with the same weights and a gateway before them. What an engine answers alone, at
temperature 0, is what the client must get when the answer has been written by both.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from time import monotonic
from typing import Any

import aiohttp
import msgspec
import pytest
import uvloop
from install import gguf_is_ready, vllm_is_ready
from live import free_port
from openai import AsyncOpenAI
from servers import Engine, llamacpp_server, together, vllm_server

from paceline.domain.commands import Move, Pause
from paceline.engines.adapter import Adapter, make_adapter
from paceline.gateway.exchange import Exchange
from stand import MODEL, Stand, live_gateway, until

pytestmark = [
    pytest.mark.real,
    pytest.mark.timeout(300),
    pytest.mark.skipif(
        not (vllm_is_ready() and gguf_is_ready()) and os.environ.get("PACELINE_REAL") != "1",
        reason="engines are not installed: python tests/real/install.py all",
    ),
]

CHAT, TEXT = "chat", "text"
TOKENS = 28
PROMPTS = {
    TEXT: [
        "Once upon a time, in a village by the sea,",
        "def fibonacci(n):",
        "How do I boil an egg? 🥚 ",
        "Ingredients: flour,",
    ],
    CHAT: [
        "What are the three laws of motion?",
        "Write a Python function that adds two numbers.",
        "List the days of the week.",
        "Write an email to my boss.",
    ],
}
ASKS = [(kind, prompt) for kind, prompts in PROMPTS.items() for prompt in prompts]


class Answer(msgspec.Struct, frozen=True):
    """A stream, as OpenAI's client reads it."""

    text: str
    prompt_tokens: int
    tokens: int
    finish_reason: str
    ids: frozenset[str]
    """Names that its chunks gave it."""


async def ask(client: AsyncOpenAI, kind: str, prompt: str, tokens: int = TOKENS) -> Answer:
    how: dict[str, Any] = {
        "model": MODEL,
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if kind == CHAT:
        how["messages"] = [{"role": "user", "content": prompt}]
        stream = await client.chat.completions.create(**how)
    else:
        stream = await client.completions.create(prompt=prompt, **how)
    chunks = [chunk async for chunk in stream]
    usage = chunks[-1].usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    choices = [choice for chunk in chunks for choice in chunk.choices]
    texts = [c.delta.content if kind == CHAT else c.text for c in choices]
    return Answer(
        "".join(text or "" for text in texts),
        usage.prompt_tokens,
        usage.completion_tokens,
        choices[-1].finish_reason,
        frozenset(chunk.id for chunk in chunks),
    )


def client_of(url: str, retries: int = 0) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=retries)


class Pair(msgspec.Struct, frozen=True):
    """Two engines of one kind and model, each on its own core."""

    kind: str
    engines: list[Engine]

    def adapter(self, place: int) -> Adapter:
        return make_adapter(self.kind, self.engines[place].url, MODEL, "")

    async def running(self, place: int) -> int | None:
        """Requests that an engine itself says it has."""
        async with aiohttp.ClientSession() as session:
            return (await self.adapter(place).report(session)).running

    async def idle(self, place: int) -> None:
        """Wait until it has none; the test's own timeout bounds it."""
        while await self.running(place):  # noqa: ASYNC110 - an engine tells nobody
            await asyncio.sleep(0.02)


@pytest.fixture(scope="module", params=["vllm", "llamacpp"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    start = vllm_server if request.param == "vllm" else llamacpp_server
    with together(*(start(free_port(), core) for core in range(2))) as engines:
        yield Pair(request.param, engines)


@pytest.fixture(scope="module")
def alone(pair: Pair) -> list[Answer]:
    """What one engine answers to each of `ASKS`, with nothing else to do."""

    async def every_other(place: int) -> list[Answer]:
        # llama.cpp closes a connection some requests after it has promised to keep it.
        async with client_of(pair.engines[place].url, retries=2) as client:
            return [await ask(client, *asked) for asked in ASKS[place::2]]

    async def run() -> list[Answer]:
        halves = await asyncio.gather(every_other(0), every_other(1))
        return [answer for both in zip(*halves, strict=True) for answer in both]

    return uvloop.run(run())


@asynccontextmanager
async def gateway_before(pair: Pair) -> AsyncIterator[Stand]:
    async with live_gateway(*(engine.url for engine in pair.engines)) as gateway:
        for place, link in enumerate(gateway.host.links.values()):
            link.dialect = pair.adapter(place)
        yield gateway
        await gateway.settled()


def written(exchange: Exchange) -> int:
    """Tokens that the client has of an answer that flows; 0 while none does."""
    relay = exchange._relay
    return exchange.answer.tokens + relay.tokens if relay is not None and exchange._flows else 0


def check(pair: Pair, answers: list[Answer], alone: list[Answer]) -> None:
    for answer, expected, (kind, prompt) in zip(answers, alone, ASKS, strict=True):
        assert answer.text == expected.text, prompt
        assert answer.tokens == expected.tokens, prompt
        assert answer.finish_reason == expected.finish_reason
        assert len(answer.ids) == 1
        # Text that goes on may be a token more or less to the next worker, which counts it as
        # prompt: a blank line is one token, and two before a digit.
        drift = 0 if (pair.kind, kind) == ("vllm", TEXT) else 2
        assert abs(answer.prompt_tokens - expected.prompt_tokens) <= drift, prompt


async def taken_off_thrice(exchange: Exchange) -> None:
    for tokens, command in ((3, Pause), (11, Move), (20, Pause)):
        while written(exchange) < tokens and not exchange.done_at:  # noqa: ASYNC110 - as `until`
            await asyncio.sleep(0.002)
        exchange.stop(command(exchange.request.id, "told so"), monotonic())


def test_answers_paused_and_moved_stay_the_same(pair: Pair, alone: list[Answer]) -> None:
    async def run() -> None:
        async with gateway_before(pair) as gateway, client_of(gateway.url) as client:
            asked = [asyncio.create_task(ask(client, *what)) for what in ASKS]
            await until(lambda: len(gateway.host.exchanges) == len(ASKS))
            await asyncio.gather(*map(taken_off_thrice, gateway.host.exchanges.values()))
            check(pair, await asyncio.gather(*asked), alone)
            assert [outcome.attempts for outcome in gateway.outcomes] == [4] * len(ASKS)

    uvloop.run(run())


def test_a_stream_that_has_moved_away_takes_no_slot_any_more(pair: Pair) -> None:
    async def run() -> None:
        async with gateway_before(pair) as gateway, client_of(gateway.url) as client:
            asked = asyncio.create_task(ask(client, TEXT, "One, two,", tokens=60))
            await until(lambda: any(map(written, gateway.host.exchanges.values())))
            (exchange,) = gateway.host.exchanges.values()
            left = ("w0", "w1").index(exchange.worker_id)
            exchange.stop(Move(exchange.request.id, "told so"), monotonic())
            await until(lambda: exchange.worker_id == f"w{1 - left}" and written(exchange))
            await pair.idle(left)
            assert await pair.running(1 - left) == 1
            assert (await asked).tokens == 60
            await pair.idle(1 - left)

    uvloop.run(run())


def test_an_engine_killed_within_its_answers_costs_none_of_them(  # the last: it stays dead
    pair: Pair, alone: list[Answer]
) -> None:
    async def run() -> None:
        async with gateway_before(pair) as gateway, client_of(gateway.url) as client:
            asked = [asyncio.create_task(ask(client, *what)) for what in ASKS]
            await until(lambda: len(gateway.host.exchanges) == len(ASKS))
            await until(lambda: all(written(e) > 8 for e in gateway.host.exchanges.values()))
            os.killpg(pair.engines[1].process_id, signal.SIGKILL)
            check(pair, await asyncio.gather(*asked), alone)
            moved = [outcome for outcome in gateway.outcomes if outcome.attempts > 1]
            assert len(moved) == len(ASKS) // 2
            assert not any(outcome.error for outcome in gateway.outcomes)

    uvloop.run(run())
