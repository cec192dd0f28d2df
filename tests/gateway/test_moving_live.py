"""Do streams move between engines that run, over sockets and through the kernel?"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from time import monotonic
from typing import Any

import aiohttp
import pytest

from paceline.domain.commands import Move, Pause
from paceline.engines.adapter import make_adapter
from paceline.engines.emulated import EngineSettings, emulated_engines
from paceline.engines.emulated.server import EmulatedEngine
from paceline.gateway.link import Timeouts
from stand import CHAT, MODEL, Reply, Stand, live_gateway, on_loop, until

TEXT = "/v1/completions"
TOKENS = 60
ENGINE = EngineSettings(profile="tiny", model=MODEL, speed=4.0)
ASKS: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "Count!"}]},
    TEXT: {"prompt": "Count!"},
}


@asynccontextmanager
async def fleet(
    engines: int = 2, **options: Any
) -> AsyncIterator[tuple[list[EmulatedEngine], Stand]]:
    """Emulated engines of vLLM's kind, and a gateway before them."""
    async with (
        emulated_engines([ENGINE] * engines) as emulated,
        live_gateway(*(engine.url for engine in emulated), **options) as gateway,
    ):
        for link in gateway.host.links.values():
            link.dialect = make_adapter("vllm", link.worker.url, MODEL, "")
        yield emulated, gateway


async def order(engine: EmulatedEngine, what: str, **how: Any) -> None:
    async with (
        aiohttp.ClientSession() as http,
        http.post(f"{engine.url}/emulate/{what}", json=how) as answer,
    ):
        assert answer.status == 200


def ask(gateway: Stand, path: str, **fields: Any) -> asyncio.Task[Reply]:
    body = {**ASKS[path], "stream": True, "max_tokens": TOKENS, "ignore_eos": True, **fields}
    return asyncio.create_task(gateway.ask(body, path))


def text(reply: Reply) -> str:
    choices = [c for e in reply.events if isinstance(e, dict) for c in e.get("choices", ())]
    return "".join(c.get("text") or c.get("delta", {}).get("content") or "" for c in choices)


def check(reply: Reply) -> None:
    assert text(reply) == "".join(f" t{i}" for i in range(TOKENS)), reply.events[-1]
    assert reply.whole
    *events, done = reply.events
    assert done == "[DONE]"
    assert len({(e["id"], e["created"]) for e in events}) == 1


async def flowing(gateway: Stand, streams: int = 1) -> None:
    def begun() -> bool:
        exchanges = gateway.host.exchanges.values()
        return sum(e._relay is not None and e._relay.tokens > 2 for e in exchanges) >= streams

    await until(begun)


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize(
    "kind",
    ["broken_chunk", "cut_chunk", "garbled_chunk", "error_event", "close_mid_stream"],
)
@on_loop
async def test_a_fault_within_a_stream_is_not_seen_by_its_client(path: str, kind: str) -> None:
    async with fleet() as (engines, gateway):
        await order(engines[0], "fault", kind=kind, after_tokens=7)
        for _ in range(2):
            check(await ask(gateway, path))
        attempts = sorted(outcome.attempts for outcome in gateway.outcomes)
        assert attempts == [1, 2]
        await gateway.settled()


@on_loop
async def test_a_crash_costs_none_of_many_streams() -> None:
    async with fleet(3) as (engines, gateway):
        asked = [ask(gateway, path) for path in (CHAT, TEXT) for _ in range(15)]
        await flowing(gateway, 30)
        await order(engines[0], "crash")
        for reply in await asyncio.gather(*asked):
            check(reply)
        assert max(outcome.attempts for outcome in gateway.outcomes) == 2
        assert not any(outcome.error for outcome in gateway.outcomes)
        await gateway.settled()


@on_loop
async def test_a_hung_engine_loses_its_streams_to_another() -> None:
    async with fleet(timeouts=Timeouts(stall_s=0.3)) as (engines, gateway):
        asked = ask(gateway, CHAT)
        await flowing(gateway)
        (exchange,) = gateway.host.exchanges.values()
        sick = engines[int(exchange.worker_id[1:])]
        await order(sick, "hang", seconds=20)
        check(await asked)
        assert gateway.outcomes[0].stall_s > 0.2
        await gateway.settled()


@pytest.mark.parametrize("command", [Pause, Move])
@pytest.mark.parametrize("path", [CHAT, TEXT])
@on_loop
async def test_a_stream_taken_off_its_worker_goes_on(
    path: str, command: type[Pause] | type[Move]
) -> None:
    async with fleet() as (engines, gateway):
        asked = ask(gateway, path, stream_options={"include_usage": True})
        for _ in range(3):
            await flowing(gateway)
            (exchange,) = gateway.host.exchanges.values()
            exchange.stop(command(exchange.request.id, "told so"), monotonic())
        reply = await asked
        check(reply)
        usage = reply.events[-2]["usage"]
        assert usage["completion_tokens"] == TOKENS
        assert usage["total_tokens"] == TOKENS + usage["prompt_tokens"]
        assert usage["prompt_tokens"] < 20
        await gateway.settled()
        await until(lambda: not any(engine.state()["running"] for engine in engines))


@on_loop
async def test_a_stream_that_finds_no_worker_any_more_ends_with_an_error() -> None:
    async with fleet(1) as (engines, gateway):
        asked = ask(gateway, CHAT)
        await flowing(gateway)
        await order(engines[0], "crash")
        reply = await asked
        assert reply.whole
        assert reply.events[-1]["error"]["code"] == "upstream_failed"
        await gateway.settled()
