"""What is left of a client that went away, or does not read?"""

from __future__ import annotations

import asyncio
import gc
import json

import aiohttp
import pytest
from scripted import DONE, ROLE, SSE, Act, always, answer, event, in_turn, scripted, stream, token

from paceline.engines.emulated import EngineSettings, emulated_engines
from paceline.gateway.exchange import Exchange
from paceline.gateway.link import Timeouts
from paceline.gateway.relay import Relay
from paceline.kernel import Settings
from paceline.wire.http1 import chunk
from paceline.wire.server import HttpRequest, Limits, ServerConnection
from stand import CHAT, Client, Stand, live_gateway, on_loop, post, until

STREAM = post({"messages": [], "stream": True})
TINY = EngineSettings(profile="tiny", model="m")
LONG = {"prompt": [1] * 100, "max_tokens": 3000, "ignore_eos": True}


async def left_while(gateway: Stand, request: bytes, seen: bytes = b"") -> None:
    """A client asks, sees so much of the answer, and leaves."""
    client = await gateway.client()
    client.write(request)
    if seen:
        await client.wait_for(seen)
    else:
        await until(lambda: gateway.host.exchanges)
        await asyncio.sleep(0.02)
    client.leave()


@pytest.mark.parametrize(
    ("request_", "seen"),
    [
        (post({**LONG, "stream": True}, "/v1/completions"), b"data: "),
        (post(LONG, "/v1/completions"), b""),
    ],
    ids=["mid-stream", "not streamed"],
)
@on_loop
async def test_a_client_that_leaves_frees_its_slot_at_once(request_: bytes, seen: bytes) -> None:
    async with emulated_engines([TINY]) as (engine,), live_gateway(engine.url) as gateway:
        await left_while(gateway, request_, seen)
        await until(lambda: engine.state()["running"] == 0 and engine.state()["waiting"] == 0)
        await gateway.settled()
        assert gateway.outcomes[0].status == (200 if seen else 499)
        assert gateway.outcomes[0].error == "the client left"
        assert gateway.host.kernel.workers["w0"].failures == 0


@pytest.mark.parametrize("said", [[], [SSE, ROLE]], ids=["nothing", "the role"])
@on_loop
async def test_a_client_that_leaves_before_the_first_token_frees_its_slot(
    said: list[bytes],
) -> None:
    async with scripted(always(*said, Act.HANG)) as (engine,), live_gateway(engine.url) as gateway:
        await left_while(gateway, STREAM)
        await until(lambda: engine.opened and not engine.open)
        await gateway.settled()


@on_loop
async def test_a_client_that_leaves_while_it_is_held_is_forgotten() -> None:
    settings = Settings(hold_s=60.0)
    async with (
        scripted(always(stream())) as (engine,),
        live_gateway(engine.url, settings=settings, ready=False) as gateway,
    ):
        client = await gateway.client()
        client.write(STREAM)
        await until(lambda: gateway.left_over.get("held"))
        client.leave()
        await gateway.settled()
        gateway.adapters[0].healthy = True
        assert (await gateway.stream()).text == "hihihi"
        assert len(engine.asked) == 1


@on_loop
async def test_a_client_that_is_held_is_served_when_a_worker_comes_up() -> None:
    settings = Settings(hold_s=60.0)
    async with (
        scripted(always(stream())) as (engine,),
        live_gateway(engine.url, settings=settings, ready=False) as gateway,
    ):
        asking = asyncio.create_task(gateway.stream())
        await until(lambda: gateway.left_over.get("held"))
        gateway.adapters[0].healthy = True
        assert (await asking).text == "hihihi"


@on_loop
async def test_without_any_worker_a_client_is_told_so_in_time() -> None:
    async with live_gateway("http://127.0.0.1:1", ready=False) as gateway:
        reply = await gateway.stream()
        assert (reply.status, reply.error["code"]) == (503, "unavailable")
        assert int(reply.headers["retry-after"]) >= 1


@on_loop
async def test_a_thousand_clients_that_come_and_leave_leave_nothing() -> None:
    gc.collect()
    kinds = (Exchange, Relay, HttpRequest, ServerConnection)

    def alive() -> int:
        return sum(isinstance(o, kinds) for o in gc.get_objects())

    async with emulated_engines([TINY]) as (engine,), live_gateway(engine.url) as gateway:
        request = post({**LONG, "stream": True}, "/v1/completions")
        await left_while(gateway, request, b"data: ")
        await gateway.settled()
        tasks = len(asyncio.all_tasks())
        before = alive()
        gate = asyncio.Semaphore(100)

        async def come_and_go() -> None:
            async with gate:
                await left_while(gateway, request, b"data: ")

        gc.disable()  # what reference counts do not free counts as left
        try:
            await asyncio.gather(*(come_and_go() for _ in range(1000)))
            await gateway.settled()
            await until(lambda: not gateway.server.connections)
            await until(lambda: engine.state()["running"] == 0)
            await until(lambda: len(asyncio.all_tasks()) <= tasks)
            await asyncio.sleep(0.05)
            assert alive() == before
        finally:
            gc.enable()
        assert len(gateway.outcomes) == 1001
        await until(lambda: gateway.host._deadline == float("inf"))


@on_loop
async def test_a_whole_answer_leaves_nothing_but_its_connection() -> None:
    def alive(kind: type) -> int:
        return sum(isinstance(o, kind) for o in gc.get_objects())

    async with (
        scripted(always(stream())) as (engine,),
        live_gateway(engine.url) as gateway,
        await gateway.client() as client,
    ):
        gc.collect()
        before = alive(Exchange), alive(Relay)
        gc.disable()
        try:
            for _ in range(5):
                client.write(STREAM)
                assert (await client.reply()).text == "hihihi"
            assert (alive(Exchange), alive(Relay)) == before
        finally:
            gc.enable()


BULK = chunk(event({"choices": [{"delta": {"content": "x" * 50_000}}]}).partition(b"\r\n")[2][:-2])


async def stuck(gateway: Stand) -> Client:
    """A client that asks for a stream and reads none of it."""
    client = await gateway.client(limit=1024)
    client.writer.transport.pause_reading()  # type: ignore[attr-defined]
    client.write(STREAM)
    return client


def paused(gateway: Stand) -> bool:
    relays = [exchange._relay for exchange in gateway.host.exchanges.values()]
    return any(relay is not None and relay.paused for relay in relays)


@on_loop
async def test_a_client_that_does_not_read_holds_its_engine_back_and_nobody_else() -> None:
    bulk = [BULK] * 400  # 20 MB
    script = in_turn([SSE, *bulk, DONE], [stream()])
    async with scripted(script) as (engine,), live_gateway(engine.url) as gateway:
        slow = await stuck(gateway)
        await until(lambda: paused(gateway))
        (connection,) = gateway.server.connections
        transport = connection._transport
        assert transport is not None
        assert transport.get_write_buffer_size() < 2_000_000
        assert len(engine.asked) == 1
        assert (await gateway.stream()).text == "hihihi"
        assert paused(gateway)
        slow.writer.transport.resume_reading()  # type: ignore[attr-defined]
        reply = await slow.reply()
        assert len(reply.text) == 50_000 * 400
        assert reply.whole
        await gateway.settled()


@on_loop
async def test_a_client_that_does_not_read_is_cut_off_in_time() -> None:
    script = always(SSE, *[BULK] * 400, DONE)
    limits = Limits(write_timeout_s=0.2)
    timeouts = Timeouts(first_token_s=0.1, stall_s=0.1)
    async with (
        scripted(script) as (engine,),
        live_gateway(engine.url, limits=limits, timeouts=timeouts) as gateway,
    ):
        await stuck(gateway)
        await until(lambda: gateway.outcomes)
        assert gateway.outcomes[0].error == "the client left"
        assert gateway.host.kernel.workers["w0"].failures == 0
        await gateway.settled()
        await until(lambda: not engine.open)
        assert not gateway.server.connections


@on_loop
async def test_the_time_of_a_slow_client_is_not_its_engine_s() -> None:
    script = always(SSE, token(), *[BULK] * 400, DONE)
    async with scripted(script) as (engine,), live_gateway(engine.url) as gateway:
        slow = await stuck(gateway)
        await until(lambda: paused(gateway))
        await asyncio.sleep(1.0)
        slow.writer.transport.resume_reading()  # type: ignore[attr-defined]
        await slow.reply()
        (outcome,) = gateway.outcomes
        assert outcome.seconds >= 1.0
        assert outcome.stall_s < 0.8
        assert outcome.itl_s * outcome.output_tokens < outcome.seconds - 0.8


@on_loop
async def test_a_connection_that_ended_an_answer_while_paused_serves_the_next() -> None:
    script = in_turn([SSE, *[BULK] * 60, DONE], [stream()])
    async with scripted(script) as (engine,), live_gateway(engine.url) as gateway:
        slow = await stuck(gateway)
        await asyncio.sleep(0.1)
        slow.writer.transport.resume_reading()  # type: ignore[attr-defined]
        assert (await slow.reply()).whole
        assert (await gateway.stream()).text == "hihihi"


@on_loop
async def test_draining_lets_streams_finish_and_takes_no_more() -> None:
    go = asyncio.Event()
    script = always(SSE, token(), go, token(), DONE)
    async with scripted(script) as (engine,), live_gateway(engine.url) as gateway:
        asking = asyncio.create_task(gateway.stream())
        async with await gateway.client() as idle:
            await until(lambda: gateway.host.exchanges)
            draining = asyncio.create_task(gateway.server.drain(10.0))
            assert await idle.closed() == b""
            with pytest.raises(ConnectionRefusedError):
                await gateway.client()
            go.set()
            reply = await asking
            assert (reply.text, reply.whole) == ("hihi", True)
            await draining


@on_loop
async def test_every_fault_of_the_emulated_engine_is_survived() -> None:
    kinds = ("error500", "close_mid_header", "broken_chunk", "close_mid_stream", "no_answer")
    timeouts = Timeouts(first_token_s=0.5, stall_s=0.5)
    fast = EngineSettings(profile="tiny", model="m", speed=20.0)
    async with (
        emulated_engines([fast, fast]) as (bad, good),
        live_gateway(bad.url, good.url, timeouts=timeouts) as gateway,
        aiohttp.ClientSession() as http,
    ):
        body = {"messages": [{"role": "user", "content": "x"}], "stream": True, "max_tokens": 20}
        for kind in kinds:
            order = {"kind": kind}
            async with http.post(bad.url + "/emulate/fault", json=order) as ordered:
                assert ordered.status == 200
            faults = bad.state()["faults"]
            replies = []
            while faults == bad.state()["faults"]:
                replies.append(await gateway.ask({**body, "ignore_eos": True}, CHAT))
            for reply in replies:
                whole = reply.events and reply.events[-1] == "[DONE]"
                assert whole or "error" in reply.events[-1], (kind, reply)
                assert whole or kind in ("broken_chunk", "close_mid_stream")
            await gateway.settled()
        assert json.dumps(bad.state()["faults"]) == "{}"


@on_loop
async def test_a_slow_answer_that_is_no_stream_is_not_taken_for_a_hang() -> None:
    timeouts = Timeouts(first_token_s=5.0, stall_s=0.1)
    async with (
        scripted(always(asyncio.Event(), answer())) as (engine,),
        live_gateway(engine.url, timeouts=timeouts) as gateway,
    ):
        asking = asyncio.create_task(gateway.ask())
        await asyncio.sleep(0.3)
        assert not asking.done()
        asking.cancel()
