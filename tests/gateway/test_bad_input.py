"""What happens to clients that are slow, wrong, greedy or malicious?"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from scripted import DONE, ROLE, SSE, Act, ScriptedEngine, always, answer, scripted, stream, token

from paceline.wire.server import Limits
from stand import CHAT, MODEL, Stand, get, live_gateway, on_loop, post, tenant, until

SMALL = Limits(
    max_head_bytes=4096,
    max_body_bytes=20_000,
    max_pipelined=8,
    head_timeout_s=0.4,
    body_timeout_s=0.4,
    idle_timeout_s=0.4,
    write_timeout_s=0.4,
)
CHUNKED = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n", 408),
        (post(b"{}" + b" " * 50)[:-10], 408),
        (CHUNKED + b"5\r\n{", 408),
        (get("/health/live", junk="x" * 5000), 431),
        (b"GET /" + b"x" * 5000, 431),
        (b"\r\n" * 5000, 431),
        (get("/v1/models", **{f"h{i}": "x" for i in range(900)}), 431),
        (post(b" " * 21_000), 413),
        (post(b"{}", content_length="999999999"), 413),
        (CHUNKED + b"2000\r\n%b\r\n" % (b" " * 0x2000) * 3, 413),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
        (b"nonsense\r\n\r\n", 400),
        (b"GET / HTTP/9.9\r\n\r\n", 400),
        (b"GET /v1/a\x00b HTTP/1.1\r\n\r\n", 400),
        (get("/v1/models", transfer_encoding="chunked", content_length="3"), 400),
        (post(b"{}", content_length="-1"), 400),
        (post(b"{}", content_length="2, 2"), 400),
        (CHUNKED + b"xyz\r\n{}\r\n", 400),
        (post(b"", content_length="0"), 400),
        (post(b"{"), 400),
        (post(b"[]"), 400),
        (post(b'"text"'), 400),
        (post(b'{"stream": "yes"}'), 400),
        (post(b'{"model": 5}'), 400),
        (post(b"\xff\xfe"), 400),
        (post({"service_tier": "gold"}), 400),
        (post({}, x_slo_ttft_ms="soon"), 400),
        (post({"model": "other"}), 404),
        (post({}, path="/v2/chat"), 404),
        (post({}, path="/metrics"), 404),
        (get("/v1/models/other"), 404),
        (get("*", "OPTIONS"), 404),
        (b"CONNECT example.org:443 HTTP/1.1\r\nhost: x\r\n\r\n", 404),
        (get(CHAT, "PUT"), 405),
        (get(CHAT, "HEAD"), 405),
        (post({}, path="/v1/models"), 405),
        (post({}, path="/health/live"), 405),
    ],
)
@on_loop
async def test_bad_input_is_told_what_is_wrong_with_it(sent: bytes, status: int) -> None:
    async with (
        scripted(always(answer())) as (engine,),
        live_gateway(engine.url, limits=SMALL) as gateway,
    ):
        async with await gateway.client() as client:
            client.write(sent)
            method = sent.partition(b" ")[0].decode("latin-1")
            reply = await client.reply(method if method == "HEAD" else "POST")
            assert reply.status == status
            if method != "HEAD":
                assert reply.error["type"] == "invalid_request_error"
            if status in (408, 413, 431) or (status == 400 and b"\r\n\r\n" not in sent):
                assert reply.headers["connection"] == "close"
                assert await client.closed() == b""
        assert not engine.asked
        await until(lambda: not gateway.server.connections)
        assert not gateway.left_over


@on_loop
async def test_an_answer_reaches_a_client_that_goes_on_sending() -> None:
    async with live_gateway("http://127.0.0.1:1", limits=SMALL) as gateway:
        reply = await gateway.raw(post(b" " * 5_000_000))
        assert (reply.status, reply.whole) == (413, True)


@on_loop
async def test_idle_connections_are_closed_in_order() -> None:
    async with (
        live_gateway("http://127.0.0.1:1", limits=SMALL) as gateway,
        await gateway.client() as silent,
        await gateway.client() as used,
    ):
        used.write(post({"model": "other"}))
        assert (await used.reply()).status == 404
        assert await silent.closed() == b""
        assert await used.closed() == b""


@on_loop
async def test_no_more_connections_than_allowed_are_served() -> None:
    limits = Limits(max_connections=2)
    async with (
        live_gateway("http://127.0.0.1:1", limits=limits) as gateway,
        await gateway.client() as one,
        await gateway.client(),
    ):
        await until(lambda: len(gateway.server.connections) == 2)
        reply = await gateway.raw(b"")
        assert (reply.status, reply.error["code"]) == (503, "unavailable")
        one.leave()
        await until(lambda: len(gateway.server.connections) == 1)
        assert (await gateway.ask({"model": "other"})).status == 404


@on_loop
async def test_pipelined_requests_are_answered_in_order() -> None:
    async with scripted(lambda a: [answer(a.body)]) as (engine,), live_gateway(engine.url) as g:
        async with await g.client() as client:
            client.write(b"".join(post({"n": n}) for n in range(8)))
            assert [(await client.reply()).json["n"] for _ in range(8)] == list(range(8))
        await g.settled()


@on_loop
async def test_nonsense_behind_a_request_does_not_spoil_its_answer() -> None:
    go = asyncio.Event()
    script = always(SSE, ROLE, token(), go, token(), DONE)
    for nonsense in (b"nonsense\r\n\r\n", get("/", junk="y" * 9000)):
        go.clear()
        async with (
            scripted(script) as (engine,),
            live_gateway(engine.url, limits=SMALL) as gateway,
            await gateway.client() as client,
        ):
            client.write(post({"stream": True, "messages": []}) + nonsense)
            await until(lambda: gateway.host.exchanges)
            await asyncio.sleep(0.05)
            go.set()
            reply = await client.reply()
            assert (reply.text, reply.whole) == ("hihi", True)
            assert (await client.reply()).status in (400, 431)
            assert await client.closed() == b""


@on_loop
async def test_what_may_be_sent_ahead_is_bounded() -> None:
    async with (
        scripted(always(Act.HANG)) as (engine,),
        live_gateway(engine.url, limits=SMALL) as gateway,
        await gateway.client() as client,
    ):
        client.write(post({}) * 100)
        await until(lambda: gateway.host.exchanges)
        (connection,) = gateway.server.connections
        assert len(connection._waiting) <= 10
        assert connection._parser is None


@on_loop
async def test_continue_is_sent_to_a_client_that_waits_for_it() -> None:
    async with scripted(always(answer())) as (engine,), live_gateway(engine.url) as gateway:
        async with await gateway.client() as client:
            head, _, body = post({}, expect="100-continue").partition(b"\r\n\r\n")
            client.write(head + b"\r\n\r\n")
            await client.wait_for(b"HTTP/1.1 100 Continue\r\n\r\n")
            client.write(body)
            assert (await client.reply()).status == 200
        assert "expect" not in engine.asked[0].headers


@on_loop
async def test_a_chunked_request_reaches_the_engine_whole() -> None:
    async with scripted(always(answer())) as (engine,), live_gateway(engine.url) as gateway:
        reply = await gateway.raw(CHUNKED + b"1\r\n{\r\n" + b'9\r\n"a": "b"}\r\n' + b"0\r\n\r\n")
        assert reply.status == 200
        assert engine.asked[0].json["a"] == "b"


@pytest.mark.parametrize(
    "script", [stream(), answer(b"{}"), SSE.replace(b"event-stream", b"x") + DONE]
)
@on_loop
async def test_an_http_1_0_client_gets_its_answer_without_chunks(script: bytes) -> None:
    async with scripted(always(script)) as (engine,), live_gateway(engine.url) as gateway:
        body = {"stream": True, "messages": []}
        reply = await gateway.raw(post(body, CHAT, "1.0", connection="keep-alive"))
        assert reply.status == 200
        assert "transfer-encoding" not in reply.headers
        assert reply.headers["connection"] == "close"
        assert reply.body == b"{}" or reply.body.endswith(b"data: [DONE]\n\n")


@on_loop
async def test_health_answers_get_and_head() -> None:
    async with live_gateway("http://127.0.0.1:1") as gateway:
        for path in ("/health/live", "/health/ready"):
            assert (await gateway.raw(get(path))).status == 200
            async with await gateway.client() as client:
                client.write(get(path, "HEAD"))
                reply = await client.reply("HEAD")
                assert (reply.status, reply.body) == (200, b"")


@on_loop
async def test_two_requests_with_one_id_at_once_are_two_requests() -> None:
    async with scripted(always(Act.PAUSE, stream())) as (engine,), live_gateway(engine.url) as g:
        body = {"stream": True, "messages": []}
        one, two = await asyncio.gather(*(g.ask(body, x_request_id="same") for _ in range(2)))
        assert (one.text, two.text) == ("hihihi", "hihihi")
        ids = {one.headers["x-request-id"], two.headers["x-request-id"]}
        assert len(ids) == 2
        assert "same" in ids
        assert {a.headers["x-request-id"] for a in engine.asked} == ids
        await g.settled()


@pytest.mark.parametrize("request_id", ["a b", "ü", "x" * 129, "a\tb", ""])
@on_loop
async def test_an_id_that_would_not_fit_a_log_is_replaced(request_id: str) -> None:
    async with scripted(always(answer())) as (engine,), live_gateway(engine.url) as gateway:
        reply = await gateway.ask(x_request_id=request_id)
        assert reply.status == 200
        assert reply.headers["x-request-id"] not in ("", request_id)


@pytest.mark.parametrize(
    "path",
    [
        "/v1/x%0d%0aevil:%201",
        "/v1/x?q=%0d%0aevil:%201",
        "/v1/x\u00e9?\u00fc",
        "http://elsewhere.test/v1/x?evil:1",
        "/v1/../../x",
    ],
)
@on_loop
async def test_no_path_or_query_injects_a_header(path: str) -> None:
    async with scripted(always(answer())) as (engine,), live_gateway(engine.url) as gateway:
        await gateway.ask({}, path=path)
        for asked in engine.asked:
            assert set(asked.headers) == {"host", "x-request-id", "content-length", "content-type"}
            assert asked.target.startswith("/v1/")
            assert asked.headers["host"] == f"127.0.0.1:{engine.port}"


@on_loop
async def test_bare_line_ends_in_a_header_s_value_are_refused() -> None:
    async with live_gateway("http://127.0.0.1:1") as gateway:
        for value in ("a\nevil: 1", "a\revil: 1", "a\x00b"):
            assert (await gateway.ask({}, x_request_id=value)).status in (400, 404)


@on_loop
async def test_credentials_and_cookies_of_clients_never_reach_an_engine() -> None:
    secrets = {
        "authorization": "Bearer sk-client",
        "cookie": "session=sk-client",
        "x_api_key": "sk-client",
        "proxy_authorization": "Basic sk-client",
        "x_forwarded_for": "sk-client",
    }
    async with (
        scripted(always(answer())) as (engine,),
        live_gateway(engine.url, api_key="sk-engine") as gateway,
    ):
        reply = await gateway.ask({"messages": []}, **secrets)
        (asked,) = engine.asked
        assert b"sk-client" not in asked.raw + asked.body
        assert asked.headers["authorization"] == "Bearer sk-engine"
        assert b"sk-engine" not in reply.body + json.dumps(reply.headers).encode()


async def _statuses(gateway: Stand, *headers: dict[str, str]) -> list[int]:
    return [(await gateway.ask({}, **h)).status for h in headers]


@on_loop
async def test_keys_are_asked_for_where_tenants_have_them() -> None:
    right: dict[str, str] = {"authorization": "Bearer sk-right"}
    wrong: dict[str, str] = {"authorization": "Bearer sk-wrong"}
    tenants = [tenant("acme", "sk-right")]
    async with scripted(always(answer())) as (engine,):
        async with live_gateway(engine.url, tenants=tenants, anonymous=False) as gateway:
            assert await _statuses(gateway, right, {"x_api_key": "sk-right"}) == [200, 200]
            assert await _statuses(gateway, wrong, {}) == [401, 401]
            refused = await gateway.ask({})
            assert refused.error["code"] == "invalid_api_key"
            assert refused.headers["www-authenticate"] == "Bearer"
            assert gateway.outcomes[0].request.tenant == "acme"
        async with live_gateway(engine.url, tenants=tenants, anonymous=True) as gateway:
            assert await _statuses(gateway, right, {}, wrong) == [200, 200, 401]


async def _asked(engine: ScriptedEngine, body: Any, **options: Any) -> Any:
    async with live_gateway(engine.url, **options) as gateway:
        assert (await gateway.ask(body)).status == 200
        return engine.asked[-1].json


@on_loop
async def test_a_model_has_its_names_here_and_another_at_the_engine() -> None:
    names = {MODEL: MODEL, "alias": MODEL}
    async with scripted(always(answer())) as (engine,):
        for asked in (MODEL, "alias"):
            seen = await _asked(engine, {"model": asked, "x": 1.50}, names=names, serves_as="real")
            assert seen == {"model": "real", "x": 1.5}
        assert await _asked(engine, {"x": 1}) == {"x": 1}
        assert await _asked(engine, {"model": MODEL}) == {"model": MODEL}


@on_loop
async def test_a_client_never_overrides_what_the_gateway_sets() -> None:
    async with scripted(always(answer())) as (engine,), live_gateway(engine.url) as gateway:
        gateway.adapters[0].fields = {"priority": 3}
        await gateway.raw(post(b'{"priority": -9, "messages": []}'))
        await gateway.raw(post(b'{"pr\\u0069ority": -9, "messages": []}'))
        assert [a.json["priority"] for a in engine.asked] == [3, 3]
