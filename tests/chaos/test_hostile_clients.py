"""What can clients do to the gateway, and to each other?"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest
from answers import CHAT, nothing_failed, survives
from processes import Fleet, on_loop, running

MEMORY_MB = 10.0
"""What a gateway may grow by with a thousand clients more."""
HEAD = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\n".encode()
CHUNKED = HEAD + b"transfer-encoding: chunked\r\n\r\n"
BODY = b'{"model": "m", "messages": [], "max_tokens": 2}'
SMUGGLED = b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n"


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with running(tmp_path_factory.mktemp("hostile"), engines=2, engine={"speed": 1.0}) as fleet:
        yield fleet


@pytest.fixture
def fleet(started: Fleet) -> Fleet:
    on_loop(started.up)()
    return started


@asynccontextmanager
async def others(fleet: Fleet) -> AsyncIterator[None]:
    """Meanwhile everybody else is served, and nothing is left behind."""
    async with fleet.crowd(20, 300) as crowd:
        await crowd.flowing()
        yield
        nothing_failed(await crowd.answers())
    async with fleet.crowd(20, 5) as crowd:
        nothing_failed(await crowd.answers())
    await fleet.settled()


async def said(fleet: Fleet, *pieces: bytes, every_s: float = 0.0) -> bytes:
    """All that the gateway answers to these bytes until it closes, as it must."""
    reader, writer = await asyncio.open_connection("127.0.0.1", fleet.gateway.port)

    async def send() -> None:
        for piece in pieces:
            writer.write(piece)
            await asyncio.sleep(every_s)

    sending, answer = asyncio.create_task(send()), bytearray()
    try:
        async with asyncio.timeout(20):
            while data := await reader.read(65536):
                answer += data
    except ConnectionError:
        pass
    finally:
        sending.cancel()
        writer.transport.abort()
    return bytes(answer)


def sized(body: bytes) -> bytes:
    return HEAD + b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(body) + body


@on_loop
async def test_slow_readers_lose_nothing_and_cost_nobody_else(fleet: Fleet) -> None:
    async with fleet.crowd(10, 1000, narrow=True) as slow:
        await slow.stop_reading()
        async with others(fleet):
            await fleet.idle_engines()
            assert await fleet.left_over(), "the gateway should have what they have not read"
            slow.read_on()
            nothing_failed(await slow.answers())


@on_loop
async def test_slow_readers_of_an_engine_that_dies_lose_nothing(fleet: Fleet) -> None:
    async with fleet.crowd(10, 1000, narrow=True) as slow:
        await slow.stop_reading()
        await asyncio.sleep(0.3)
        fleet.engines[0].kill()
        await asyncio.sleep(0.3)
        slow.read_on()
        survives(await slow.answers())
    await fleet.settled()


@on_loop
async def test_clients_that_leave_while_their_streams_move_free_everything(fleet: Fleet) -> None:
    for pause_s in (0.0, 0.01):
        async with fleet.crowd(50, 2000) as crowd:
            await crowd.flowing()
            await fleet.engines[0].order("cut")
            await asyncio.sleep(pause_s)
        await fleet.settled()


@on_loop
async def test_a_thousand_clients_that_leave_midway_free_everything(fleet: Fleet) -> None:
    async def come_and_leave() -> None:
        async with fleet.crowd(200, 2000) as crowd:
            await crowd.flowing()

    async with others(fleet):
        await come_and_leave()
        await fleet.settled()
        before = fleet.gateway.memory_mb
        for _ in range(5):
            await come_and_leave()
        await fleet.settled()
        assert fleet.gateway.memory_mb < before + MEMORY_MB


@on_loop
async def test_clients_that_leave_before_anything_is_said_free_everything(fleet: Fleet) -> None:
    async with others(fleet):
        for pause_s in (0.0, 0.001, 0.005, 0.02):
            async with fleet.crowd(50, 2000):
                await asyncio.sleep(pause_s)


@on_loop
async def test_clients_that_drip_are_told_to_hurry(fleet: Fleet) -> None:
    dripping = [
        [b"GET /v1/models HTTP/1.1\r\n", *[b"x: y\r\n"] * 100],
        [HEAD + b"content-length: 100\r\n\r\n", *[b" "] * 100],
        [CHUNKED, *[b"1\r\n \r\n"] * 100],
    ]
    async with others(fleet):
        answers = await asyncio.gather(
            *(said(fleet, *pieces, every_s=0.1) for pieces in dripping for _ in range(50))
        )
    assert all(answer.startswith(b"HTTP/1.1 408 ") for answer in answers)


BAD: dict[str, tuple[bytes, int]] = {
    "endless path": (b"GET /" + b"x" * 200_000, 431),
    "many headers": (b"GET / HTTP/1.1\r\nhost: x\r\n" + b"a: b\r\n" * 50_000, 431),
    "endless header": (b"GET / HTTP/1.1\r\nlong: " + b"x" * 1_000_000, 431),
    "large body announced": (HEAD + b"content-length: 2000000\r\n\r\n", 413),
    "absurd body announced": (HEAD + b"content-length: " + b"9" * 30 + b"\r\n\r\n", 400),
    "large chunk": (CHUNKED + b"200000\r\n" + b" " * 0x200000, 413),
    "absurd chunk": (CHUNKED + b"fffffffffffffffff\r\n", 400),
    "negative chunk": (CHUNKED + b"-5\r\n{}", 400),
    "chunk in C's notation": (CHUNKED + b"0x5\r\n{}", 400),
    "NUL in the path": (b"GET /v1/mod\x00els HTTP/1.1\r\n\r\n", 400),
    "NUL in a header": (b"GET /v1/models HTTP/1.1\r\nname: va\x00lue\r\n\r\n", 400),
    "nothing but NUL": (b"\x00" * 1000, 400),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 100, 400),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    "body of NUL": (sized(b"\x00" * 1000), 400),
    "NUL in a string": (sized(b'{"model": "m", "messages": "\x00"}'), 400),
    "number of 100,000 digits": (sized(b'{"max_tokens": ' + b"9" * 100_000 + b"}"), 400),
    "endless model": (sized(b'{"model": "' + b"m" * 900_000 + b'"}'), 404),
}
DEEP = {
    "unclosed": sized(b'{"messages": ' + b"[" * 100_000),
    "list": sized(b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "object": sized(b'{"x":' * 50_000 + b"1" + b"}" * 50_000),
}


@pytest.mark.parametrize("sent", DEEP.values(), ids=DEEP)
@on_loop
async def test_json_that_is_nested_too_deeply_is_refused_by_name(fleet: Fleet, sent: bytes) -> None:
    await refused(fleet, sent, 400)


@pytest.mark.parametrize(("sent", "status"), BAD.values(), ids=BAD)
@on_loop
async def test_what_cannot_be_a_request_is_refused_by_name(
    fleet: Fleet, sent: bytes, status: int
) -> None:
    await refused(fleet, sent, status)


async def refused(fleet: Fleet, sent: bytes, status: int) -> None:
    """The gateway answers to these bytes with an error in OpenAI's shape, and leaves it at that."""
    answer = await said(fleet, sent)
    assert answer.startswith(b"HTTP/1.1 %d " % status), answer[:300]
    error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert answer.count(b"HTTP/1.1 ") == 1
    await fleet.settled()


@pytest.mark.parametrize(
    "framing",
    [
        b"content-length: 5\r\ntransfer-encoding: chunked",
        b"transfer-encoding: chunked\r\ncontent-length: 5",
        b"content-length: 5\r\ncontent-length: 6",
        b"content-length: 5, 6",
        b"content-length: +5",
        b"content-length: 5 5",
        b"content-length:\r\n 5",
        b"transfer-encoding: xchunked",
        b"transfer-encoding: chunked, identity",
        b"transfer-encoding: identity",
        b"transfer-encoding : chunked",
        b"transfer-encoding:\x0bchunked",
        b"transfer-encoding: chunked\r\ntransfer-encoding: x",
        b"x: y\rtransfer-encoding: chunked",
    ],
)
@on_loop
async def test_a_request_whose_length_is_in_doubt_smuggles_nothing(
    fleet: Fleet, framing: bytes
) -> None:
    answer = await said(fleet, HEAD + framing + b"\r\n\r\n0\r\n\r\n" + SMUGGLED)
    assert answer.startswith(b"HTTP/1.1 400 "), answer[:300]
    assert answer.count(b"HTTP/1.1 ") == 1


@on_loop
async def test_ten_thousand_requests_at_once_on_one_connection_are_too_many(fleet: Fleet) -> None:
    request = HEAD + b"content-length: %d\r\n\r\n" % len(BODY) + BODY
    async with others(fleet):
        answer = await said(fleet, request * 10_000)
    answers = answer.count(b"HTTP/1.1 ")
    assert 1 <= answers <= 20
    assert answer.count(b"HTTP/1.1 400 ") == answers or b"ahead of their answers" in answer
