"""Do prompts of text go to the engine that has their beginning, by the tokens that it sees?"""

from __future__ import annotations

import asyncio
import threading
from array import array
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext
from typing import Any
from unittest import mock

import pytest
import structlog.testing
from live import free_port

from paceline.domain.commands import Command
from paceline.domain.errors import Unavailable
from paceline.domain.facts import Fact, RequestArrived
from paceline.engines.emulated import EngineSettings, emulated_engines
from paceline.engines.emulated.server import EmulatedEngine
from paceline.engines.emulated.tokens import encode
from paceline.gateway import server
from paceline.kernel import Settings
from paceline.tokens import Prompts
from paceline.tokens.service import MISTAKES, MOST_WAITING
from paceline.tokens.template import ChatTemplate
from stand import CHAT, Reply, Stand, live_gateway, on_loop, post, until

BLOCK = 16
COMPLETIONS = "/v1/completions"
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
LONG = "All of this was said before, and it will be said again. " * 60
SYSTEM = {"role": "system", "content": LONG}


class Emulated:
    """The tokenizer of emulated engines."""

    template = ChatTemplate(TEMPLATE, {})

    def __init__(self) -> None:
        self.asked = 0
        self.free = threading.Event()
        self.free.set()

    def ids(self, text: str, with_special: bool = False) -> array[int]:
        self.asked += 1
        self.free.wait(10)
        return array("I", encode(text))

    @contextmanager
    def stuck(self) -> Iterator[None]:
        """It does not come to an end in this."""
        self.free.clear()
        try:
            yield
        finally:
            self.free.set()


class Stranger(Emulated):
    """Another model's."""

    def ids(self, text: str, with_special: bool = False) -> array[int]:
        return super().ids(text)[1:]


def engine(publishes: bool = True) -> EngineSettings:
    endpoints = {
        f"kv_events_{name}": f"tcp://127.0.0.1:{free_port()}"
        for name in ("endpoint", "replay_endpoint")
        if publishes
    }
    return EngineSettings(profile="tiny", model="m", speed=50.0, **endpoints)  # type: ignore[arg-type]


class Fleet:
    """A gateway and its engines."""

    def __init__(self, stand: Stand, engines: list[EmulatedEngine]) -> None:
        self.stand = stand
        self.engines = engines

    async def heard(self) -> None:
        """Until the gateway knows all that the engines have cached."""
        index = self.stand.host.kernel.pools["m"].blocks
        pools = [engine._engine.scheduler.pool for engine in self.engines]
        await until(
            lambda: all(index.follows(i) and index.size(i) == p.cached for i, p in enumerate(pools))
        )

    async def ask(self, body: dict[str, Any], path: str = CHAT) -> Reply:
        reply = await self.stand.ask({"max_tokens": 1, "ignore_eos": True, **body}, path)
        assert reply.status == 200, reply.body
        return reply


@asynccontextmanager
async def fleet(
    tokenizer: Emulated, count: int = 2, publishes: bool = True, patient: bool = True
) -> AsyncIterator[Fleet]:
    """`patient`: prompts wait for their tokens, however busy the machine is."""
    settings = [engine(publishes) for _ in range(count)]
    async with emulated_engines(settings) as running:
        urls = [each.url for each in running]
        gateway = live_gateway(
            *urls, kind="vllm", settings=Settings(), prompts=Prompts({"m": tokenizer})
        )
        waits = patience() if patient else nullcontext()
        async with gateway as stand:
            fleet = Fleet(stand, list(running))
            for url in urls:  # something is cached: from now on prompts are worth naming
                await warm(url)
            if publishes:
                await fleet.heard()
            with waits:
                yield fleet


@contextmanager
def patience() -> Iterator[None]:
    with mock.patch.multiple(server, LEAST_WAIT_S=10.0, MOST_WAIT_S=10.0):
        yield


async def warm(url: str) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
    writer.write(post({"prompt": [1] * 2 * BLOCK, "max_tokens": 1}, COMPLETIONS))
    assert b"200 OK" in await reader.readuntil(b"\r\n\r\n")
    writer.close()


def known(stand: Stand, since: int = 0) -> list[tuple[int | None, int | None]]:
    """Of each request the cached tokens, as predicted and as its engine told."""
    return [
        (outcome.predicted.cached_tokens if outcome.predicted else None, outcome.cached_tokens)
        for outcome in stand.outcomes[since:]
    ]


@on_loop
async def test_what_is_cached_of_a_growing_chat_is_known_before_each_turn() -> None:
    async with fleet(Emulated()) as each:
        messages = [SYSTEM]
        for turn in range(6):
            messages.append({"role": "user", "content": f"And what about {turn}? " * 9})
            reply = await each.ask({"messages": messages, "max_tokens": 40})
            messages.append(reply.json["choices"][0]["message"])
            await each.heard()
        found = known(each.stand)
        assert [predicted for predicted, _ in found] == [engine for _, engine in found]
        assert found[0] == (0, 0)
        assert min(predicted or 0 for predicted, _ in found[1:]) > 800
        outcomes = each.stand.outcomes
        assert len({outcome.worker for outcome in outcomes}) == 1
        assert all(o.request.prompt_tokens == o.prompt_tokens for o in outcomes)


@on_loop
async def test_completions_of_text_are_known_too_and_a_salt_keeps_caches_apart() -> None:
    async with fleet(Emulated()) as each:
        for i, salt in enumerate((None, None, "a", "a")):
            await each.ask({"prompt": LONG + str(i) * 80, "cache_salt": salt}, COMPLETIONS)
            await each.heard()
        predicted, cached = zip(*known(each.stand), strict=True)
        assert predicted == cached
        assert [n > 0 for n in cached] == [False, True, False, True]


@on_loop
async def test_nothing_is_tokenised_where_it_changes_no_decision() -> None:
    for count, publishes in ((1, True), (2, False)):
        tokenizer = Emulated()
        async with fleet(tokenizer, count, publishes) as each:
            await each.ask({"messages": [SYSTEM]})
        assert tokenizer.asked == 0
    tokenizer = Emulated()
    async with fleet(tokenizer) as each:
        await each.ask({"messages": [{"role": "user", "content": "hi"}]})
    assert tokenizer.asked == 0


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [{"role": "user", "content": [{"type": "image_url", "text": LONG}]}]},
        {"messages": [SYSTEM], "chat_template": "{{ messages }}"},
        {"messages": [SYSTEM], "truncate_prompt_tokens": 5},
    ],
)
def test_what_only_the_engine_can_read_goes_by_the_guess(fields: dict[str, Any]) -> None:
    @on_loop
    async def test() -> None:
        async with fleet(Emulated()) as each:
            await each.ask(fields)
            (outcome,) = each.stand.outcomes
            assert not outcome.request.token_blocks
            assert outcome.request.prompt_tokens is None

    test()


@on_loop
async def test_a_request_goes_on_without_its_tokens_when_they_take_too_long() -> None:
    tokenizer = Emulated()
    async with fleet(tokenizer, patient=False) as each:
        with tokenizer.stuck():
            await each.ask({"messages": [SYSTEM]})
            (outcome,) = each.stand.outcomes
            assert not outcome.request.token_blocks


@on_loop
async def test_a_crowd_of_prompts_does_not_wait_for_a_slow_tokenizer() -> None:
    tokenizer = Emulated()
    async with fleet(tokenizer, patient=False) as each:
        with tokenizer.stuck():
            crowd = [each.ask({"messages": [SYSTEM]}) for _ in range(2 * MOST_WAITING)]
            await asyncio.gather(*crowd)
        assert tokenizer.asked <= MOST_WAITING
        await each.stand.settled()


@on_loop
async def test_a_client_that_leaves_while_its_prompt_is_tokenised_leaves_nothing() -> None:
    tokenizer = Emulated()
    async with fleet(tokenizer) as each:
        stand = each.stand
        with tokenizer.stuck():
            client = await stand.client()
            client.write(post({"messages": [SYSTEM]}))
            await until(lambda: tokenizer.asked)
            assert len(stand.host.exchanges) == 1
            assert not stand.host.kernel.requests
            client.writer.close()
            await stand.settled()
        assert [outcome.status for outcome in stand.outcomes] == [499]
        await each.ask({"messages": [SYSTEM]})


@on_loop
async def test_a_gateway_that_ends_answers_those_whose_prompt_is_being_tokenised() -> None:
    tokenizer = Emulated()
    async with fleet(tokenizer) as each:
        with tokenizer.stuck():
            asked = asyncio.create_task(each.stand.ask({"messages": [SYSTEM]}))
            await until(lambda: tokenizer.asked)
            assert each.stand.host.end(Unavailable("the end", retry_after_s=1.0)) == 1
            assert (await asked).status == 503
        await each.stand.settled()


@on_loop
async def test_a_tokenizer_that_counts_otherwise_than_the_engine_is_given_up_once() -> None:
    with structlog.testing.capture_logs() as logs:
        tokenizer = Stranger()
        async with fleet(tokenizer) as each:
            for _ in range(MISTAKES + 3):
                await each.ask({"messages": [SYSTEM]})
            assert tokenizer.asked == MISTAKES
            named = [bool(outcome.request.token_blocks) for outcome in each.stand.outcomes]
            assert named == [True] * MISTAKES + [False] * 3
            await each.ask({"prompt": LONG}, COMPLETIONS)  # with those it was not wrong yet
            assert tokenizer.asked == MISTAKES + 1
    warnings = [entry["event"] for entry in logs if entry["log_level"] == "warning"]
    assert [event.split(":")[0] for event in warnings] == ["the tokenizer is not the engine's"]


@on_loop
async def test_the_promise_counts_from_arrival_while_a_prompt_is_tokenised() -> None:
    tokenizer = Emulated()
    async with fleet(tokenizer, patient=False) as each:
        kernel, waits = each.stand.host.kernel, list[float]()
        handle = kernel.handle

        def listening(fact: Fact, now: float) -> list[Command]:
            commands = handle(fact, now)
            if isinstance(fact, RequestArrived):
                waits.append(now - kernel.requests[fact.request.id].arrived_at)
            return commands

        with tokenizer.stuck(), mock.patch.object(kernel, "handle", listening):
            await each.ask({"messages": [SYSTEM]})
        assert waits[0] >= server.LEAST_WAIT_S
