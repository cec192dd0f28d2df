"""What does a client see of an engine's troubles?"""

from __future__ import annotations

import asyncio
import contextlib
import socket

import pytest
from scripted import (
    DONE,
    END,
    ROLE,
    SSE,
    Act,
    Part,
    Script,
    always,
    answer,
    counted,
    event,
    in_turn,
    scripted,
    stream,
    token,
)

from paceline.gateway.link import Timeouts
from paceline.kernel import Settings
from stand import CHAT, live_gateway, on_loop, post, until

IMPATIENT = Timeouts(connect_s=0.5, first_token_s=0.5, stall_s=0.5)

SILENT: list[list[Part]] = [[Act.HANG], [SSE, ROLE, Act.HANG]]
TROUBLES: dict[str, list[Part]] = {
    "answers 500": [answer(b'{"error":"x"}', 500)],
    "answers 503 at length": [b"HTTP/1.1 503 X\r\ncontent-length: 900\r\n\r\nbusy"],
    "answers 429": [answer(b"{}", 429)],
    "wants another key": [answer(b'{"key":"sk-engine"}', 401)],
    "closes at once": [Act.CLOSE],
    "resets": [Act.RESET],
    "closes within the head": [b"HTTP/1.1 200 OK\r\ncontent-ty", Act.CLOSE],
    "does not speak HTTP": [b"SSH-2.0-OpenSSH_9.6\r\n\r\n"],
    "closes within its role": [SSE, ROLE, Act.CLOSE],
    "sends a broken chunk": [SSE, b"no size\r\n", Act.HANG],
    "reports an error": [SSE, ROLE, event({"error": {"message": "x"}}), Act.HANG],
    "never answers": SILENT[0],
    "never has a token": SILENT[1],
    "closes within a short body": [answer(b"half", 200)[:-2], Act.CLOSE],
}


@pytest.mark.parametrize("trouble", TROUBLES.values(), ids=TROUBLES.keys())
@on_loop
async def test_trouble_before_the_first_token_is_met_by_another_worker(trouble: list[Part]) -> None:
    async with (
        scripted(always(*trouble), always(stream(3))) as (bad, good),
        live_gateway(bad.url, good.url, timeouts=IMPATIENT) as gateway,
    ):
        replies = [await gateway.stream() for _ in range(4)]
        assert [(r.status, r.text) for r in replies] == [(200, "hihihi")] * 4
        assert {r.headers["x-paceline-worker"] for r in replies} == {"w1"}
        assert bad.asked
        assert any(outcome.attempts > 1 for outcome in gateway.outcomes)
        await gateway.settled()
        await until(lambda: not bad.open)


@pytest.mark.parametrize("trouble", TROUBLES.values(), ids=TROUBLES.keys())
@on_loop
async def test_with_no_other_worker_the_client_is_told_in_openai_s_shape(
    trouble: list[Part],
) -> None:
    async with (
        scripted(always(*trouble)) as (bad,),
        live_gateway(bad.url, timeouts=IMPATIENT) as gateway,
    ):
        reply = await gateway.stream()
        overloaded = trouble is TROUBLES["answers 429"]
        assert reply.status == (429 if overloaded else 504 if trouble in SILENT else 502)
        assert reply.error["type"] == ("rate_limit_error" if overloaded else "server_error")
        assert ("retry-after" in reply.headers) == overloaded
        assert len(bad.asked) <= 3
        assert b"sk-engine" not in reply.body
        await gateway.settled()


@on_loop
async def test_a_worker_that_refuses_connections_costs_no_request() -> None:
    async with (
        scripted(always(stream())) as (good,),
        live_gateway("http://127.0.0.1:1", good.url) as gateway,
    ):
        assert [(await gateway.stream()).text for _ in range(4)] == ["hihihi"] * 4
        await gateway.settled()


@on_loop
async def test_a_host_name_that_cannot_be_one_costs_no_request() -> None:
    async with (
        scripted(always(stream())) as (good,),
        live_gateway(f"http://{'a' * 70}.test", good.url) as gateway,
    ):
        assert [(await gateway.stream()).text for _ in range(4)] == ["hihihi"] * 4


@on_loop
async def test_a_worker_whose_connection_never_stands_is_given_up() -> None:
    with socket.socket() as full, contextlib.ExitStack() as waiting:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(4):  # nobody accepts these, and the kernel answers no others
            other = waiting.enter_context(socket.socket())
            other.setblocking(False)
            other.connect_ex(full.getsockname())
        async with (
            scripted(always(stream())) as (good,),
            live_gateway(
                f"http://127.0.0.1:{full.getsockname()[1]}", good.url, timeouts=IMPATIENT
            ) as gateway,
        ):
            assert [(await gateway.stream()).text for _ in range(2)] == ["hihihi"] * 2
            assert any(outcome.attempts == 2 for outcome in gateway.outcomes)
            await gateway.settled()


BREAKS: dict[str, list[Part]] = {
    "closes": [Act.CLOSE],
    "resets": [Act.RESET],
    "sends a broken chunk": [b"xyz\r\n"],
    "stops in the middle of a chunk": [b"40\r\ndata: {", Act.CLOSE],
    "falls silent": [Act.HANG],
}


@pytest.mark.parametrize("breaks", BREAKS.values(), ids=BREAKS.keys())
@on_loop
async def test_a_stream_that_breaks_ends_with_an_error_and_never_as_if_whole(
    breaks: list[Part],
) -> None:
    script = always(SSE, ROLE, token("a"), token("b"), Act.PAUSE, *breaks)
    async with (
        scripted(script, script) as (one, two),
        live_gateway(one.url, two.url, timeouts=IMPATIENT) as gateway,
    ):
        reply = await gateway.stream()
        assert reply.text == "ab"
        assert reply.whole
        assert reply.events[-1]["error"]["code"] == "upstream_failed"
        assert "[DONE]" not in reply.events
        assert len(one.asked + two.asked) == 1
        (outcome,) = gateway.outcomes
        assert outcome.error
        assert not outcome.kept
        await gateway.settled()


@on_loop
async def test_each_endpoint_s_clients_are_told_of_a_break_in_their_own_events() -> None:
    delta = b'event: content_block_delta\ndata: {"type":"content_block_delta"}\n\n'
    script = always(SSE, b"%x\r\n%b\r\n" % (len(delta), delta), Act.PAUSE, Act.CLOSE)
    async with scripted(script) as (engine,), live_gateway(engine.url) as gateway:
        reply = await gateway.stream("/v1/messages")
        assert b"\n\nevent: error\ndata: " in reply.body
        assert reply.events[-1]["type"] == "error"
        assert reply.events[-1]["error"]["message"]


@on_loop
async def test_an_error_event_passes_where_nobody_else_could_go_on() -> None:
    script = always(SSE, ROLE, token(), Act.PAUSE, event({"error": {"message": "oom"}}), DONE)
    async with scripted(script) as (engine,), live_gateway(engine.url) as gateway:
        reply = await gateway.stream(logprobs=True)
        assert {"error": {"message": "oom"}} in reply.events
        assert gateway.outcomes[0].error
        await gateway.settled()


@pytest.mark.parametrize(
    "head", [b"content-length: 20000000\r\n", b"transfer-encoding: chunked\r\n", b""]
)
@on_loop
async def test_a_plain_answer_that_breaks_is_never_taken_for_whole(head: bytes) -> None:
    begun = b"HTTP/1.1 200 OK\r\n" + head + b"\r\n" + b"5\r\nhello\r\n" * 10
    async with (
        scripted(always(begun, asyncio.Event(), Act.RESET)) as (engine,),
        live_gateway(engine.url, timeouts=IMPATIENT) as gateway,
    ):
        reply = await gateway.ask()
        assert reply.status == 200
        assert not reply.whole
        await gateway.settled()


@on_loop
async def test_an_http_1_0_client_sees_a_broken_stream_too() -> None:
    script = always(SSE, ROLE, token("a"), Act.PAUSE, Act.CLOSE)
    async with scripted(script) as (engine,), live_gateway(engine.url) as gateway:
        reply = await gateway.raw(post({"stream": True, "messages": []}, CHAT, "1.0"))
        assert "error" in reply.events[-1]


def closing_when_idle(turns: list[bool]) -> Script:
    """Answers whole, and closes behind it without saying so beforehand."""

    def script(asked: object) -> list[Part]:
        turns.append(True)
        return [stream(2), Act.CLOSE]

    return script


@on_loop
async def test_engines_that_close_idle_connections_cost_nothing_and_leak_nothing() -> None:
    turns: list[bool] = []
    async with scripted(closing_when_idle(turns)) as (engine,), live_gateway(engine.url) as gateway:
        for _ in range(20):
            assert (await gateway.stream()).text == "hihi"
        await gateway.settled()
        assert [o.attempts for o in gateway.outcomes] == [1] * 20
        await until(lambda: not engine.open)
        link = gateway.host.link("w0")
        await until(lambda: not link._idle)


@on_loop
async def test_a_kept_alive_connection_that_dies_under_a_request_is_no_failure() -> None:
    script = in_turn([stream(1)], [Act.CLOSE], [stream(2)])
    async with scripted(script) as (engine,), live_gateway(engine.url) as gateway:
        assert (await gateway.stream()).text == "hi"
        assert (await gateway.stream()).text == "hihi"
        assert (len(engine.asked), engine.opened) == (3, 2)
        assert [o.attempts for o in gateway.outcomes] == [1, 1]
        assert gateway.host.kernel.workers["w0"].failures == 0


@on_loop
async def test_connections_are_used_again() -> None:
    async with scripted(always(stream())) as (engine,), live_gateway(engine.url) as gateway:
        for _ in range(10):
            await gateway.stream()
        assert engine.opened == 1


@on_loop
async def test_a_connection_with_surplus_bytes_is_not_used_again() -> None:
    script = always(stream() + b"HTTP/1.1 200 OK\r\n")
    async with scripted(script) as (engine,), live_gateway(engine.url) as gateway:
        assert [(await gateway.stream()).text for _ in range(2)] == ["hihihi"] * 2
        assert engine.opened == 2


@on_loop
async def test_the_retry_budget_bounds_the_attempts() -> None:
    bad = [always(answer(b"{}", 500))] * 5
    async with (
        scripted(*bad) as engines,
        live_gateway(*(e.url for e in engines), settings=Settings(attempts=3)) as gateway,
    ):
        reply = await gateway.ask()
        assert reply.status == 502
        assert sum(len(e.asked) for e in engines) == 3


@pytest.mark.parametrize("status", [400, 404, 422])
@on_loop
async def test_what_the_client_did_wrong_is_the_engine_s_to_say(status: int) -> None:
    body = b'{"error":{"message":"too long"}}'
    async with (
        scripted(always(answer(body, status)), always(answer(body, status))) as engines,
        live_gateway(*(e.url for e in engines)) as gateway,
    ):
        reply = await gateway.stream()
        assert (reply.status, reply.body) == (status, body)
        assert sum(len(e.asked) for e in engines) == 1


@on_loop
async def test_a_bug_in_one_request_ends_that_one_alone(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from paceline.gateway.exchange import Exchange

    whole = Exchange.on_answer

    def broken(self: Exchange, now: float, token: bool) -> bytes:
        if self.request.id == "buggy":
            raise ZeroDivisionError
        return whole(self, now, token)

    monkeypatch.setattr(Exchange, "on_answer", broken)
    async with scripted(always(stream())) as (engine,), live_gateway(engine.url) as gateway:
        body = {"messages": [], "stream": True}
        bug, fine = await asyncio.gather(
            gateway.ask(body, x_request_id="buggy"), gateway.ask(body, x_request_id="fine")
        )
        assert (bug.status, bug.error["code"]) == (500, "internal_error")
        assert fine.text == "hihihi"
        await gateway.settled()
        assert gateway.host.kernel.workers["w0"].failures == 0


@pytest.mark.parametrize("place", ["dispatch", "expire", "on_head"])
@on_loop
async def test_a_bug_anywhere_leaves_the_gateway_up(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from paceline.gateway.exchange import Exchange

    def broken(*_: object) -> None:
        raise ZeroDivisionError

    first: dict[str, list[Part]] = {"expire": [Act.HANG], "on_head": [answer(b"{}", 500)]}
    script = in_turn(*(turn for turn in (first.get(place), [stream()]) if turn))
    async with scripted(script) as (engine,), live_gateway(engine.url) as gateway:
        with monkeypatch.context() as patched:
            patched.setattr(Exchange, place, broken)
            assert (await gateway.ask()).status == 500
        await gateway.settled()
        assert (await gateway.stream()).text == "hihihi"


@on_loop
async def test_usage_is_asked_for_always_and_shown_only_if_wanted() -> None:
    script = always(SSE, ROLE, token(), counted(1), END)
    async with scripted(script) as (engine,), live_gateway(engine.url) as gateway:
        hidden = await gateway.stream()
        shown = await gateway.stream(stream_options={"include_usage": True})
        assert all(a.json["stream_options"]["include_usage"] for a in engine.asked)
        assert "usage" not in hidden.events[-1]
        assert shown.events[-1]["usage"]["completion_tokens"] == 1
        assert [(o.prompt_tokens, o.output_tokens) for o in gateway.outcomes] == [(5, 1)] * 2
