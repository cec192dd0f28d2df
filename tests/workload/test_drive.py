from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from scripted_engine import Body, Cut, Hang, Reply, ScriptedEngine, answer, event, role, token

from paceline.workload.drive import DriveSettings, Progress, broken_at, drive, first_model
from paceline.workload.outcome import Outcome
from paceline.workload.traces import Arrival

NOW = Arrival(0.0, 20, 4)


def replayed(
    reply: Callable[[Body], Reply], *arrivals: Arrival, **settings: Any
) -> tuple[list[Outcome], ScriptedEngine]:
    async def main() -> tuple[list[Outcome], ScriptedEngine]:
        async with ScriptedEngine(reply).serving() as engine:
            chosen = DriveSettings(url=engine.url, model="m", **settings)
            return await drive(arrivals or (NOW,), chosen), engine

    return asyncio.run(main())


def whole(body: Body) -> Reply:
    return 200, [answer(body["max_tokens"])]


def always(*script: Any, status: int = 200) -> Callable[[Body], Reply]:
    return lambda body: (status, list(script))


def test_a_whole_answer_is_ok_and_fully_counted() -> None:
    (outcome,), _ = replayed(whole)
    assert outcome.ok
    assert (outcome.status, outcome.worker, outcome.model) == (200, "w1", "m")
    assert (outcome.prompt_tokens, outcome.output_tokens) == (7, 4)
    assert outcome.ttft_s is not None
    assert outcome.ttft_s >= outcome.behind_s >= 0


def test_outcomes_stand_in_the_order_of_the_trace() -> None:
    arrivals = [Arrival(i * 0.002, 20, 1 + i % 7) for i in range(200)]
    outcomes, _ = replayed(whole, *arrivals, check_tokens=True)
    assert [o.index for o in outcomes] == list(range(200))
    assert all(o.ok for o in outcomes)
    assert [o.output_tokens for o in outcomes] == [a.output_tokens for a in arrivals]


def test_requests_come_whether_or_not_earlier_ones_have_ended() -> None:
    outcomes, engine = replayed(always(role(), Hang), *[NOW] * 30, drain_s=0.5)
    assert len(engine.bodies) == 30
    assert {o.error for o in outcomes} == {"unfinished when the replay ended"}


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (always(b'{"error": {"message": "too busy"}}', status=429), "HTTP 429: too busy"),
        (always(b'{"detail": "x"}', status=404), "HTTP 404: an error without a message"),
        (always(b"<html>", status=502), "HTTP 502: <html>"),
        (always(token("a")), "the stream ended before the answer did"),
        (always(b"{}"), "the stream ended before the answer did"),
        (always(role(), event("[DONE]")), "the answer is empty"),
        (always(token("a"), event({"error": {"message": "oom"}})), "oom"),
        (always(token("a"), Cut), "ClientPayloadError"),
    ],
)
def test_every_failure_is_an_outcome_with_its_reason(
    reply: Callable[[Body], Reply], error: str
) -> None:
    (outcome,), _ = replayed(reply)
    assert not outcome.ok
    assert error in outcome.error
    assert outcome.refused == (outcome.status == 429)


def test_an_endpoint_that_is_not_there_is_an_outcome_too() -> None:
    settings = DriveSettings(url="http://127.0.0.1:9", model="m")
    (outcome,) = asyncio.run(drive([NOW], settings))
    assert outcome.status == 0
    assert "127.0.0.1:9" in outcome.error


def test_a_request_is_given_up_after_its_timeout() -> None:
    (outcome,), _ = replayed(always(token("a"), Hang), timeout_s=0.3)
    assert outcome.error == "not finished within 0.3 s"
    assert outcome.ttft_s is not None


def test_a_lost_or_doubled_token_is_found() -> None:
    lossy = token(" t0") + token(" t2") + answer(0).removeprefix(role())
    (outcome,), _ = replayed(always(lossy), check_tokens=True)
    assert outcome.error == "token 1 should be t1 and is t2: one was lost or doubled"
    assert broken_at(" t0 t1 t1") == "token 2 should be t2 and is t1: one was lost or doubled"
    assert broken_at(" t0 t1", 3) == "2 tokens came where the engine counted 3"
    assert broken_at(" t0 t1", 2) == ""


def test_bounded_concurrency_is_a_delay_and_no_loss() -> None:
    outcomes, _ = replayed(whole, *[NOW] * 20, max_in_flight=2)
    assert all(o.ok for o in outcomes)


def test_lengths_and_exact_counts_are_asked_for_where_wanted() -> None:
    _, engine = replayed(whole, force_lengths=True, exact_tokens=True)
    (body,) = engine.bodies
    assert (body["max_tokens"], body["min_tokens"], body["ignore_eos"]) == (4, 4, True)
    assert body["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}
    _, engine = replayed(whole)
    assert "ignore_eos" not in engine.bodies[0]


def test_completions_get_a_prompt_and_chats_get_messages() -> None:
    _, engine = replayed(whole, api="completions")
    assert len(engine.bodies[0]["prompt"]) == 80
    chat = Arrival(0.0, 1, 1, messages=({"role": "user", "content": "Hi"},))
    _, engine = replayed(whole, chat)
    assert engine.bodies[0]["messages"] == [{"role": "user", "content": "Hi"}]


def test_each_tenant_or_tier_comes_with_its_own_key() -> None:
    arrivals = [
        Arrival(0.0, 9, 1, tier="premium"),
        Arrival(0.05, 9, 1, tier="premium", tenant="acme"),
        Arrival(0.1, 9, 1),
    ]
    _, engine = replayed(whole, *arrivals, key="k", keys={"premium": "kp", "acme": "ka"})
    sent = {headers["authorization"] for headers in engine.headers}
    assert sent == {"Bearer kp", "Bearer ka", "Bearer k"}
    tiers = {headers.get("x-gateway-inference-objective") for headers in engine.headers}
    assert tiers == {"premium", None}


def test_a_request_says_of_which_batch_it_is() -> None:
    _, engine = replayed(whole, Arrival(0.0, 9, 1, batch="job-1"), NOW)
    sent = [headers.get("x-paceline-batch", "") for headers in engine.headers]
    assert sorted(sent) == ["", "job-1"]


def test_the_same_trace_and_salt_send_the_same_bytes() -> None:
    arrivals = [Arrival(i * 0.01, 700, 2, blocks=(1,)) for i in range(5)]
    first, again, other = (
        sorted(
            body["messages"][0]["content"] for body in replayed(whole, *arrivals, salt=s)[1].bodies
        )
        for s in ("0", "0", "1")
    )
    assert first == again
    assert not set(first) & set(other)


def test_progress_accounts_for_every_request_even_when_cancelled() -> None:
    seen: list[Progress] = []

    async def main() -> None:
        arrived = asyncio.Semaphore(0)

        def reply(body: Body) -> Reply:
            arrived.release()
            return 200, [token("a"), Hang]

        async with ScriptedEngine(reply).serving() as engine:
            arrivals = [NOW, NOW, Arrival(1e6, 1, 1)]
            settings = DriveSettings(url=engine.url, model="m")
            running = asyncio.create_task(drive(arrivals, settings, seen.append))
            await arrived.acquire()
            await arrived.acquire()
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running

    asyncio.run(main())
    last = seen[-1]
    assert (last.total, last.sent, last.in_flight, len(last.outcomes)) == (3, 2, 0, 2)
    assert {o.error for o in last.outcomes} == {"unfinished when the replay ended"}


def test_the_endpoint_says_which_model_it_has() -> None:
    async def main() -> str:
        async with ScriptedEngine(whole).serving() as engine:
            return await first_model(DriveSettings(url=f"{engine.url}/v1/"))

    assert asyncio.run(main()) == "small"
