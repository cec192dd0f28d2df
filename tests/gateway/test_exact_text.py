"""Do prompts of text go to the engine that has their beginning, by the tokens that it sees?"""

from __future__ import annotations

import asyncio
import threading
from array import array
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
import structlog.testing
from live import free_port

from paceline.engines.emulated import EngineSettings, emulated_engines
from paceline.engines.emulated.tokens import encode
from paceline.kernel import Settings
from paceline.tokens import Prompts
from paceline.tokens.service import MISTAKES, MOST_WAITING
from paceline.tokens.template import ChatTemplate
from stand import Stand, live_gateway, on_loop, post, until

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
        """It tokenises while this is set."""
        self.free.set()

    def ids(self, text: str, with_special: bool = False) -> array[int]:
        self.asked += 1
        self.free.wait(10)
        return array("I", encode(text))


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


@asynccontextmanager
async def fleet(
    tokenizer: Emulated, count: int = 2, publishes: bool = True
) -> AsyncIterator[Stand]:
    settings = [engine(publishes) for _ in range(count)]
    async with emulated_engines(settings) as running:
        urls = [each.url for each in running]
        gateway = live_gateway(
            *urls, kind="vllm", settings=Settings(), prompts=Prompts({"m": tokenizer})
        )
        async with gateway as stand:
            if publishes:
                index = stand.host.kernel.pools["m"].blocks
                await until(lambda: all(index.follows(place) for place in range(count)))
                for url in urls:  # something is cached: from now on prompts are worth naming
                    await told(stand, partial(warm, url))
            yield stand


async def warm(url: str) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
    writer.write(post({"prompt": [1] * 2 * BLOCK, "max_tokens": 1}, COMPLETIONS))
    await reader.readuntil(b"\r\n\r\n")
    writer.close()


async def told(stand: Stand, work: Callable[[], Any]) -> Any:
    """Do something, until its engine has told of it."""
    index = stand.host.kernel.pools["m"].blocks
    before = index.heard
    answer = await work()
    await until(lambda: index.heard > before)
    return answer


async def chat(stand: Stand, messages: list[dict[str, Any]], **fields: Any) -> str:
    body = {"messages": messages, "max_tokens": 40, "ignore_eos": True, **fields}
    reply = await told(stand, lambda: stand.ask(body))
    assert reply.status == 200, reply.body
    return str(reply.json["choices"][0]["message"]["content"])


def known(stand: Stand, since: int = 0) -> list[tuple[int | None, int | None]]:
    """Of each request the cached tokens, as predicted and as its engine told."""
    return [
        (outcome.predicted.cached_tokens if outcome.predicted else None, outcome.cached_tokens)
        for outcome in stand.outcomes[since:]
    ]


@on_loop
async def test_what_is_cached_of_a_growing_chat_is_known_before_each_turn() -> None:
    async with fleet(Emulated()) as stand:
        messages = [SYSTEM]
        for turn in range(6):
            messages.append({"role": "user", "content": f"And what about {turn}? " * 9})
            messages.append({"role": "assistant", "content": await chat(stand, messages)})
        found = known(stand)
        assert [predicted for predicted, _ in found] == [engine for _, engine in found]
        assert found[0] == (0, 0)
        assert min(predicted or 0 for predicted, _ in found[1:]) > 800
        assert len({outcome.worker for outcome in stand.outcomes}) == 1
        assert all(o.request.prompt_tokens == o.prompt_tokens for o in stand.outcomes)


@on_loop
async def test_completions_of_text_are_known_too_and_a_salt_keeps_caches_apart() -> None:
    async with fleet(Emulated()) as stand:
        for i, salt in enumerate((None, None, "a", "a")):
            body = {"prompt": LONG + str(i) * 80, "max_tokens": 2, "cache_salt": salt}
            await told(stand, partial(stand.ask, body, COMPLETIONS))
        predicted, cached = zip(*known(stand), strict=True)
        assert predicted == cached
        assert [n > 0 for n in cached] == [False, True, False, True]


@on_loop
async def test_nothing_is_tokenised_where_it_changes_no_decision() -> None:
    for count, publishes in ((1, True), (2, False)):
        tokenizer = Emulated()
        async with fleet(tokenizer, count, publishes) as stand:
            assert (await stand.ask({"messages": [SYSTEM]})).status == 200
        assert tokenizer.asked == 0
    tokenizer = Emulated()
    async with fleet(tokenizer) as stand:
        assert (await stand.ask({"messages": [{"role": "user", "content": "hi"}]})).status == 200
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
        async with fleet(Emulated()) as stand:
            assert (await stand.ask({"max_tokens": 1, **fields})).status == 200
            assert not stand.outcomes[0].request.token_blocks
            assert stand.outcomes[0].request.prompt_tokens is None

    test()


@on_loop
async def test_a_request_goes_on_without_its_tokens_when_they_take_too_long() -> None:
    tokenizer = Emulated()
    async with fleet(tokenizer) as stand:
        tokenizer.free.clear()
        try:
            assert (await stand.ask({"messages": [SYSTEM], "max_tokens": 1})).status == 200
            assert not stand.outcomes[0].request.token_blocks
            assert stand.outcomes[0].queued_s > 0
        finally:
            tokenizer.free.set()


@on_loop
async def test_a_crowd_of_prompts_does_not_wait_for_a_slow_tokenizer() -> None:
    tokenizer = Emulated()
    async with fleet(tokenizer) as stand:
        tokenizer.free.clear()
        try:
            crowd = [stand.ask({"messages": [SYSTEM]}) for _ in range(2 * MOST_WAITING)]
            replies = await asyncio.gather(*crowd)
        finally:
            tokenizer.free.set()
        assert {reply.status for reply in replies} == {200}
        assert tokenizer.asked <= MOST_WAITING
        await stand.settled()


@on_loop
async def test_a_client_that_leaves_while_its_prompt_is_tokenised_leaves_nothing() -> None:
    tokenizer = Emulated()
    async with fleet(tokenizer) as stand:
        tokenizer.free.clear()
        client = await stand.client()
        client.write(post({"messages": [SYSTEM]}))
        await until(lambda: tokenizer.asked)
        assert len(stand.host.exchanges) == 1
        assert not stand.host.kernel.requests
        client.writer.close()
        await stand.settled()
        tokenizer.free.set()
        assert [outcome.status for outcome in stand.outcomes] == [499]
        assert (await stand.ask({"messages": [SYSTEM], "max_tokens": 1})).status == 200


@on_loop
async def test_a_tokenizer_that_counts_otherwise_than_the_engine_is_given_up_once() -> None:
    with structlog.testing.capture_logs() as logs:
        tokenizer = Stranger()
        async with fleet(tokenizer) as stand:
            for _ in range(MISTAKES + 3):
                assert (await stand.ask({"messages": [SYSTEM], "max_tokens": 1})).status == 200
            assert tokenizer.asked == MISTAKES
            assert [bool(o.request.token_blocks) for o in stand.outcomes] == [True] * 3 + [
                False
            ] * 3
            body = {"prompt": LONG, "max_tokens": 1}  # of them it has not been wrong yet
            assert (await stand.ask(body, COMPLETIONS)).status == 200
            assert tokenizer.asked == MISTAKES + 1
    warnings = [entry for entry in logs if entry["log_level"] == "warning"]
    assert [entry["event"].split(":")[0] for entry in warnings] == [
        "the tokenizer is not the engine's"
    ]


@on_loop
async def test_the_promise_counts_from_arrival_while_a_prompt_is_tokenised() -> None:
    tokenizer = Emulated()
    async with fleet(tokenizer) as stand:
        waits: list[float] = []
        handle = stand.host.kernel.handle

        def listening(fact: Any, now: float) -> Any:
            if type(fact).__name__ == "RequestArrived":
                commands = handle(fact, now)
                waits.append(now - stand.host.kernel.requests[fact.request.id].arrived_at)
                return commands
            return handle(fact, now)

        stand.host.kernel.handle = listening  # type: ignore[method-assign]
        tokenizer.free.clear()
        try:
            await stand.ask({"messages": [SYSTEM], "max_tokens": 1})
        finally:
            tokenizer.free.set()
        assert waits[0] >= 0.005
