"""Does a prompt of token ids go to the engine that has its beginning, whoever sent it there?"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any
from unittest import mock

import aiohttp
import pytest
import structlog.testing
from live import free_port

from paceline.domain.facts import Fact
from paceline.domain.kvevents import BlockForm, BlocksChanged
from paceline.engines.emulated import EngineSettings, emulated_engines
from paceline.engines.emulated.server import EmulatedEngine
from paceline.gateway.intake import exact_blocks, read
from paceline.kernel import Settings
from paceline.kernel.blocks import BlockIndex
from stand import Stand, on_loop, until
from stand import live_gateway as gateway_before

BLOCK = 16
PROMPT = [7 * i % 1000 for i in range(20 * BLOCK)]
COMPLETIONS = "/v1/completions"


def engine(publishes: bool = True) -> EngineSettings:
    endpoints = {
        f"kv_events_{name}": f"tcp://127.0.0.1:{free_port()}"
        for name in ("endpoint", "replay_endpoint")
        if publishes
    }
    return EngineSettings(profile="tiny", model="m", speed=50.0, **endpoints)  # type: ignore[arg-type]


@asynccontextmanager
async def engines(count: int = 2, publish: bool = True) -> AsyncIterator[list[EmulatedEngine]]:
    async with emulated_engines([engine(publish) for _ in range(count)]) as running:
        yield list(running)


def live_gateway(*urls: str) -> AbstractAsyncContextManager[Stand]:
    """By a policy that always prefers the cached, also among idle and unknown engines."""
    return gateway_before(*urls, kind="vllm", settings=Settings(policy="kv-cost"))


def listeners() -> list[str]:
    return [t.get_name() for t in asyncio.all_tasks() if t.get_name().startswith("KV events")]


def index(stand: Stand) -> BlockIndex:
    return stand.host.kernel.pools["m"].blocks


async def listening(stand: Stand) -> None:
    """Until all is known of each engine's cache."""
    places = range(len(stand.host.engines))
    await until(lambda: all(index(stand).follows(place) for place in places))


async def asked(url: str, prompt: list[int], **fields: Any) -> int:
    """How much of it the engine had cached."""
    body = {"model": "m", "prompt": prompt, "max_tokens": 2, "ignore_eos": True, **fields}
    async with aiohttp.ClientSession() as http, http.post(url + COMPLETIONS, json=body) as answer:
        assert answer.status == 200
        usage = (await answer.json())["usage"]
    return int((usage["prompt_tokens_details"] or {}).get("cached_tokens", 0))


@pytest.mark.parametrize("holder", [0, 1])
def test_a_prompt_goes_where_another_gateway_has_sent_it(holder: int) -> None:
    @on_loop
    async def test() -> None:
        async with engines() as running:
            urls = [each.url for each in running]
            async with live_gateway(*urls) as ours:
                await listening(ours)
                async with live_gateway(urls[holder]) as theirs:
                    await asked(theirs.url, PROMPT)
                await until(lambda: index(ours).size(holder) >= len(PROMPT) // BLOCK)
                for _ in range(3):
                    assert await asked(ours.url, PROMPT) == len(PROMPT) - BLOCK
                assert {outcome.worker for outcome in ours.outcomes} == {f"w{holder}"}

    test()


@on_loop
async def test_a_gateway_that_comes_later_learns_what_is_cached_by_replay() -> None:
    async with engines() as running:
        await asked(running[1].url, PROMPT)
        async with live_gateway(*(each.url for each in running)) as stand:
            await listening(stand)
            assert await asked(stand.url, PROMPT) == len(PROMPT) - BLOCK


@on_loop
async def test_a_salt_keeps_caches_apart() -> None:
    async with engines() as running, live_gateway(*(each.url for each in running)) as stand:
        await listening(stand)
        await asked(running[0].url, PROMPT, cache_salt="ours")
        await until(lambda: index(stand).size(0) >= len(PROMPT) // BLOCK)
        salted = exact_blocks(
            read(json.dumps({"prompt": PROMPT, "cache_salt": "ours"}).encode()), [BlockForm(16)]
        )
        plain = exact_blocks(read(json.dumps({"prompt": PROMPT}).encode()), [BlockForm(16)])
        assert index(stand).depths(salted[0].names) == {0: len(PROMPT) // BLOCK}
        assert index(stand).depths(plain[0].names) == {}
        assert await asked(stand.url, PROMPT, cache_salt="ours") == len(PROMPT) - BLOCK


@on_loop
async def test_engines_that_tell_nothing_are_served_as_before() -> None:
    async with (
        engines(publish=False) as running,
        live_gateway(*(each.url for each in running)) as stand,
    ):
        for _ in range(3):
            await asked(stand.url, PROMPT)
        assert len({outcome.worker for outcome in stand.outcomes}) == 1
        assert not any(outcome.request.token_blocks for outcome in stand.outcomes)


@on_loop
async def test_nobody_listens_for_a_worker_that_has_left() -> None:
    async with engines() as running, live_gateway(*(each.url for each in running)) as stand:
        await listening(stand)
        assert len(listeners()) == 2
        stand.host.remove("w0")
        await until(lambda: listeners() == ["KV events of w1, rank 0"])


@on_loop
async def test_an_engine_that_comes_back_silent_is_not_taken_at_its_old_word() -> None:
    async with engines(1) as running, live_gateway(running[0].url) as stand:
        await listening(stand)
        stand.adapters[0].healthy = False
        await until(lambda: not stand.host.ready)
        assert len(listeners()) == 1  # it may have been away for a moment only
        with mock.patch.object(EmulatedEngine, "_kv_event_sources", return_value={}):
            stand.adapters[0].healthy = True
            await until(lambda: not listeners())
        assert not index(stand).follows(0)


@on_loop
async def test_a_bug_at_an_event_is_told_and_costs_only_what_was_known() -> None:
    async with engines() as running, live_gateway(*(each.url for each in running)) as stand:
        await listening(stand)
        handle = stand.host.kernel.handle
        bugs: list[Fact] = []

        def stumbling(fact: Fact, now: float) -> Any:
            if isinstance(fact, BlocksChanged) and not bugs:
                bugs.append(fact)
                raise RuntimeError("a bug")
            return handle(fact, now)

        with (
            structlog.testing.capture_logs() as logs,
            mock.patch.object(stand.host.kernel, "handle", stumbling),
        ):
            await asked(running[0].url, PROMPT)
            await until(lambda: bugs)
            assert not index(stand).follows(0)
            await asked(running[0].url, PROMPT[::-1])
            await until(lambda: index(stand).size(0) > 0)
        assert [x["event"] for x in logs if x["log_level"] == "error"] == [
            "KV events were not understood"
        ]


@on_loop
async def test_an_address_that_makes_no_sense_is_told_and_its_worker_serves() -> None:
    source = {"enable_kv_cache_events": True, "endpoint": "nonsense"}
    with (
        structlog.testing.capture_logs() as logs,
        mock.patch.object(EmulatedEngine, "_kv_event_sources", return_value={0: source}),
    ):
        async with engines(1) as running, live_gateway(running[0].url) as stand:
            await until(lambda: any(x["log_level"] == "error" for x in logs))
            await asked(stand.url, PROMPT)
    assert [x["event"] for x in logs if x["log_level"] == "error"] == ["KV events cannot be heard"]


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "text"},
        {"prompt": [1, "2", 3, 4]},
        {"prompt": [[1, 2, 3, 4]]},
        {"prompt": [1, -2, 3, 4]},
        {"prompt": [1, 2**32, 3, 4]},
        {"prompt": [1, 2, 3]},
        {"input": [1, 2, 3, 4]},
        {},
    ],
)
def test_what_is_no_prompt_of_token_ids_or_too_short_has_no_exact_blocks(body: Any) -> None:
    assert exact_blocks(read(json.dumps(body).encode()), [BlockForm(4)]) == ()


def test_blocks_are_named_for_each_size_that_the_prompt_fills() -> None:
    body = read(json.dumps({"prompt": PROMPT[:40]}).encode())
    found = exact_blocks(body, [BlockForm(16), BlockForm(32), BlockForm(64)])
    assert [(blocks.size, len(blocks.names)) for blocks in found] == [(16, 2), (32, 1)]


def test_a_gateway_before_engines_that_tell_nothing_does_not_load_zeromq() -> None:
    code = "import sys, paceline.app; sys.exit('zmq' in sys.modules)"

    async def run() -> int:
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", code)
        return await process.wait()

    assert asyncio.run(run()) == 0
