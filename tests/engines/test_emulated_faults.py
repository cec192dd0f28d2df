"""Do the emulated troubles trouble their clients, and nothing after them?"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import msgspec
import pytest

from paceline.engines.emulated import EngineSettings, emulated_engines
from paceline.engines.emulated.server import EmulatedEngine

FAST = EngineSettings(profile="tiny", model="m", speed=20.0)
ENDLESS = {"prompt": [1] * 100, "max_tokens": 3000, "ignore_eos": True, "stream": True}
SHORT = {"prompt": "Hi", "max_tokens": 10, "ignore_eos": True, "stream": True}

Test = Callable[[EmulatedEngine, aiohttp.ClientSession], Awaitable[None]]


def against(test: Test, settings: EngineSettings = FAST) -> None:
    async def run() -> None:
        async with (
            emulated_engines([settings]) as (engine,),
            aiohttp.ClientSession() as http,
        ):
            await test(engine, http)

    asyncio.run(run())


async def order(engine: EmulatedEngine, http: aiohttp.ClientSession, what: str, **how: Any) -> None:
    async with http.post(f"{engine.url}/emulate/{what}", json=how) as answer:
        assert answer.status == 200, await answer.text()


async def ask(engine: EmulatedEngine, http: aiohttp.ClientSession, body: Any) -> str:
    async with http.post(engine.url + "/v1/completions", json=body) as answer:
        answer.raise_for_status()
        return await answer.text()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - what is waited for is a server's state
            await asyncio.sleep(0.005)


def test_a_client_that_leaves_frees_its_blocks() -> None:
    async def test(engine: EmulatedEngine, http: aiohttp.ClientSession) -> None:
        async with http.post(engine.url + "/v1/completions", json=ENDLESS) as answer:
            await answer.content.readline()
            assert engine.state()["kv_blocks_used"] != 0
        await until(lambda: engine.state()["kv_blocks_used"] == 0)
        assert engine.state()["running"] == 0

    against(test, EngineSettings(profile="tiny"))


def test_a_slowdown_lasts_until_reset() -> None:
    async def test(engine: EmulatedEngine, http: aiohttp.ClientSession) -> None:
        await order(engine, http, "slowdown", factor=3.0, seconds=1000)
        assert engine.state()["slowdown"] == 3.0
        await order(engine, http, "reset")
        assert engine.state()["slowdown"] == 1.0
        await order(engine, http, "slowdown", factor=2.0, seconds=0.01)
        await until(lambda: engine.state()["slowdown"] == 1.0)

    against(test)


def test_a_hung_engine_answers_for_its_health_but_gives_no_token() -> None:
    async def test(engine: EmulatedEngine, http: aiohttp.ClientSession) -> None:
        await order(engine, http, "hang", seconds=0.3)
        asking = asyncio.create_task(ask(engine, http, SHORT))
        await until(lambda: engine.state()["running"] == 1)
        async with http.get(engine.url + "/health") as answer:
            assert answer.status == 200
        assert engine.state()["generated_tokens"] == 0
        assert " t9" in await asking

    against(test)


def test_a_reset_ends_a_hang_at_once() -> None:
    async def test(engine: EmulatedEngine, http: aiohttp.ClientSession) -> None:
        await order(engine, http, "hang", seconds=1000)
        asking = asyncio.create_task(ask(engine, http, SHORT))
        await until(lambda: engine.state()["running"] == 1)
        await asyncio.sleep(0.05)
        await order(engine, http, "reset")
        assert " t9" in await asking

    against(test)


def test_a_crash_breaks_streams_and_forgets_everything() -> None:
    async def test(engine: EmulatedEngine, http: aiohttp.ClientSession) -> None:
        async with http.post(engine.url + "/v1/completions", json=ENDLESS) as answer:
            await answer.content.readline()
            await order(engine, http, "crash", restart_after_s=0.05)
            with pytest.raises(aiohttp.ClientError):
                await answer.read()
        port = engine.port
        await until(lambda: not engine.listening.is_set())
        with pytest.raises(aiohttp.ClientError):
            await ask(engine, http, SHORT)
        await until(engine.listening.is_set)
        assert engine.port == port
        assert engine.state()["generated_tokens"] == 0
        assert " t9" in await ask(engine, http, SHORT)

    against(test, EngineSettings(profile="tiny"))


def test_a_crash_without_restart_is_for_good() -> None:
    async def test(engine: EmulatedEngine, http: aiohttp.ClientSession) -> None:
        await order(engine, http, "crash")
        await until(lambda: not engine.listening.is_set())
        with pytest.raises(aiohttp.ClientError):
            await ask(engine, http, SHORT)

    against(test)


CLOSING = (
    "error500",
    "close_mid_header",
    "close_mid_stream",
    "cut_chunk",
    "no_answer",
    "reset_mid_stream",
)


@pytest.mark.parametrize(
    ("kind", "stream"),
    [*((kind, stream) for kind in CLOSING for stream in (True, False)), ("broken_chunk", False)],
)
def test_a_fault_hits_as_many_requests_as_ordered(kind: str, stream: bool) -> None:
    async def test(engine: EmulatedEngine, http: aiohttp.ClientSession) -> None:
        body = {**SHORT, "stream": stream}
        await order(engine, http, "fault", kind=kind, count=2)
        for _ in range(2):
            with pytest.raises((aiohttp.ClientError, TimeoutError)):
                async with asyncio.timeout(0.2 if kind == "no_answer" else 20):
                    await ask(engine, http, body)
        assert " t9" in await ask(engine, http, body)
        await until(lambda: engine.state()["kv_blocks_used"] == 0)

    against(test)


@pytest.mark.parametrize("kind", ["close_mid_stream", "cut_chunk", "reset_mid_stream"])
@pytest.mark.parametrize("tokens", [1, 3, 7])
def test_a_stream_that_ends_midway_has_given_the_tokens_before(kind: str, tokens: int) -> None:
    async def test(engine: EmulatedEngine, http: aiohttp.ClientSession) -> None:
        await order(engine, http, "fault", kind=kind, after_tokens=tokens)
        seen = b""
        async with http.post(engine.url + "/v1/completions", json=SHORT) as answer:
            with contextlib.suppress(aiohttp.ClientError):
                async for part in answer.content.iter_any():
                    seen += part
        whole = [line for line in seen.split(b"\n\n") if line.endswith(b"}")]
        assert len(whole) == tokens

    against(test)


def test_a_garbled_chunk_stands_for_one_token_and_the_stream_goes_on() -> None:
    async def test(engine: EmulatedEngine, http: aiohttp.ClientSession) -> None:
        await order(engine, http, "fault", kind="garbled_chunk", after_tokens=2)
        events = (await ask(engine, http, SHORT)).split("\n\n")
        bad = [event for event in events if " t" in event and '"' not in event]
        assert len(bad) == 1
        assert " t2" in bad[0]
        assert " t9" in events[9]
        assert "[DONE]" in events[10]

    against(test)


def test_an_error_event_ends_the_stream_as_vllm_ends_it() -> None:
    async def test(engine: EmulatedEngine, http: aiohttp.ClientSession) -> None:
        await order(engine, http, "fault", kind="error_event")
        *tokens, error, done, nothing = (await ask(engine, http, SHORT)).split("\n\n")
        assert len(tokens) == 3
        assert msgspec.json.decode(error.removeprefix("data: "))["error"]["code"] == 500
        assert (done, nothing) == ("data: [DONE]", "")
        assert engine.state()["running"] == 0

    against(test)


def test_refused_connections_are_reset_while_those_that_stand_go_on() -> None:
    async def test(engine: EmulatedEngine, http: aiohttp.ClientSession) -> None:
        async with http.post(engine.url + "/v1/completions", json=ENDLESS) as answer:
            await answer.content.readline()
            await order(engine, http, "refuse", seconds=0.3)
            async with aiohttp.ClientSession() as stranger:
                with pytest.raises(aiohttp.ClientError):
                    await ask(engine, stranger, SHORT)
            assert await answer.content.read(1)
            assert engine.state()["running"] == 1
        await until(lambda: engine.state()["running"] == 0)
        await asyncio.sleep(0.3)
        assert " t9" in await ask(engine, http, SHORT)

    against(test, EngineSettings(profile="tiny"))


def test_a_cut_breaks_all_answers_under_way_and_nothing_else() -> None:
    async def test(engine: EmulatedEngine, http: aiohttp.ClientSession) -> None:
        asking = [asyncio.create_task(ask(engine, http, ENDLESS)) for _ in range(5)]
        await until(lambda: engine.state()["running"] == 5)
        await order(engine, http, "cut")
        broken = await asyncio.gather(*asking, return_exceptions=True)
        assert all(isinstance(one, aiohttp.ClientError) for one in broken)
        await until(lambda: engine.state()["kv_blocks_used"] == 0)
        assert " t9" in await ask(engine, http, SHORT)

    against(test, EngineSettings(profile="tiny"))


def test_a_broken_chunk_comes_after_the_first_tokens_and_ends_the_connection() -> None:
    async def test(engine: EmulatedEngine, http: aiohttp.ClientSession) -> None:
        await order(engine, http, "fault", kind="broken_chunk")
        reader, writer = await asyncio.open_connection(engine.host, engine.port)
        body = msgspec.json.encode(SHORT)  # by hand: aiohttp would wait for ever after the error
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nhost: e\r\ncontent-length: %d\r\n\r\n" % len(body)
        )
        writer.write(body)
        answer = await reader.read()
        writer.close()
        assert answer.count(b"data: ") == 3
        assert answer.endswith(b"\r\nno size\r\n")

    against(test)


def test_an_order_that_is_wrong_is_refused() -> None:
    async def test(engine: EmulatedEngine, http: aiohttp.ClientSession) -> None:
        for what, how in (
            ("slowdown", {"factor": 0}),
            ("slowdown", {"factro": 2}),
            ("hang", {}),
            ("fault", {"kind": "gremlins"}),
        ):
            async with http.post(f"{engine.url}/emulate/{what}", json=how) as answer:
                assert answer.status == 400

    against(test)


def test_several_engines_share_a_loop_but_nothing_else() -> None:
    async def run() -> None:
        settings = [EngineSettings(profile="tiny", model=name, speed=20.0) for name in "abc"]
        async with emulated_engines(settings) as engines, aiohttp.ClientSession() as http:
            await order(engines[0], http, "slowdown", factor=2.0)
            texts = await asyncio.gather(*(ask(engine, http, SHORT) for engine in engines))
            assert all(" t9" in text for text in texts)
            assert [engine.state()["slowdown"] for engine in engines] == [2.0, 1.0, 1.0]
            assert [engine.state()["model"] for engine in engines] == ["a", "b", "c"]

    asyncio.run(run())
