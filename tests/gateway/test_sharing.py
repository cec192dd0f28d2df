"""Does a prompt get from the worker that prefills it to the one that answers, or else elsewhere?

Emulated engines count: token i of an answer is " t<i>". One that fetches blocks which have become
others' writes other numbers, without a word, as real ones do.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from unittest import mock

import aiohttp
import pytest
from handed import between_the_legs

from paceline.domain.commands import Dispatch
from paceline.engines.adapter import make_adapter
from paceline.engines.emulated import EngineSettings, emulated_engines
from paceline.engines.emulated.server import EmulatedEngine
from paceline.gateway.link import Timeouts
from paceline.kernel import Settings
from paceline.kernel.handover import HandOver
from stand import MODEL, Reply, Stand, live_gateway, on_loop, until

pytestmark = pytest.mark.usefixtures("every_prompt_handed_over")

ENGINE = EngineSettings(profile="tiny", model=MODEL, speed=10.0)
SLOW = EngineSettings(profile="tiny", model=MODEL, speed=0.2)
POLICY = Settings(policy="least-requests", hold_s=0.2)
PREFILLS = {"role": "prefill", "transfer": "nixl"}
DECODES = {"role": "decode", "transfer": "nixl"}
PROMPT = list(range(1, 301))
TEXT = "/v1/completions"


@asynccontextmanager
async def pair(
    *engines: EngineSettings, parts: tuple[dict[str, Any], ...] = (PREFILLS, DECODES), **more: Any
) -> AsyncIterator[tuple[list[EmulatedEngine], Stand]]:
    """One worker that prefills and one that answers, unless told otherwise."""
    settings = engines or (ENGINE, ENGINE)
    more = {"settings": POLICY, "parts": parts, "kind": "vllm", **more}
    async with (
        emulated_engines(settings) as running,
        live_gateway(*(engine.url for engine in running), **more) as gateway,
    ):
        for link in gateway.host.links.values():
            link.dialect = make_adapter("vllm", link.worker.url, MODEL, "")
        yield running, gateway
        await gateway.settled()


async def order(engine: EmulatedEngine, what: str, **fields: Any) -> None:
    """Trouble, as the emulated engine can be told to make."""
    url = f"{engine.url}/emulate/{what}"
    async with aiohttp.ClientSession() as http, http.post(url, json=fields) as ordered:
        assert ordered.status == 200


async def ask(gateway: Stand, tokens: int = 12, **fields: Any) -> Reply:
    body = {"prompt": PROMPT, "max_tokens": tokens, "ignore_eos": True, "stream": True}
    return await gateway.ask({**body, **fields}, TEXT)


def words(reply: Reply) -> str:
    choices = [c for e in reply.events if isinstance(e, dict) for c in e.get("choices", ())]
    return "".join(choice["text"] for choice in choices)


def written(engine: EmulatedEngine) -> int:
    """Tokens that it has generated."""
    return int(str(engine.state()["generated_tokens"]))


def counted(tokens: int) -> str:
    return "".join(f" t{i}" for i in range(tokens))


@on_loop
async def test_one_worker_prefills_and_the_other_answers() -> None:
    async with pair() as ((first, second), gateway):
        reply = await ask(gateway)
        assert words(reply) == counted(12)
        assert reply.headers["x-paceline-worker"] == "w1"
        assert "prefill;dur=" in reply.headers["server-timing"]
        assert first.state()["fetched"] == 1
        assert first.state()["held"] == first.state()["kv_blocks_used"] == 0
        assert second.state()["received_tokens"] == len(PROMPT) - 1
        (outcome,) = gateway.outcomes
        assert (outcome.worker, outcome.prefilled_at) == ("w1", "w0")
        assert outcome.prompt_tokens == len(PROMPT)
        assert outcome.attempts == 1


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", ["/v1/chat/completions", TEXT])
@on_loop
async def test_the_client_sees_no_difference(path: str, stream: bool) -> None:
    said: dict[str, Any] = {"messages": [{"role": "user", "content": "x" * 900}]}
    body = {**(said if "chat" in path else {"prompt": "x" * 900}), "stream": stream}
    body |= {"max_tokens": 9, "min_tokens": 3, "ignore_eos": True}
    if stream:
        body["stream_options"] = {"include_usage": True}

    def told(reply: Reply) -> Any:
        events = reply.events if stream else [reply.json]
        varying = {"id": None, "created": None, "usage": None}
        events = [e | {k: v for k, v in varying.items() if k in e} for e in events if e != "[DONE]"]
        return reply.status, events

    async with pair() as ((_, second), gateway):
        shared = await gateway.ask(body, path)
        assert second.state()["received_tokens"]
    async with pair(parts=({}, {})) as (_, gateway):
        alone = await gateway.ask(body, path)
    assert told(shared) == told(alone)


@on_loop
async def test_what_a_client_claims_of_hand_overs_is_not_passed_on() -> None:
    claim = {"do_remote_prefill": True, "remote_engine_id": "x", "remote_host": "127.0.0.1"}
    claim |= {"remote_port": 9, "remote_request_id": "someone-else's"}
    async with pair(parts=(DECODES, DECODES)) as (engines, gateway):
        reply = await ask(gateway, kv_transfer_params=claim)
        assert words(reply) == counted(12)
        assert not any(engine.state()["received_tokens"] for engine in engines)


@on_loop
async def test_a_request_for_two_answers_is_not_shared() -> None:
    async with pair() as (_, gateway):
        reply = await ask(gateway, n=2)
        assert reply.status == 400  # by the emulated engine
        assert [type(d.command) for d in gateway.host.decisions] == [Dispatch]


# Trouble with the worker that prefills.


@pytest.mark.parametrize("trouble", ["error500", "close_mid_header", "no_answer"])
@on_loop
async def test_a_failed_prefill_is_made_up_for_by_the_worker_that_answers(trouble: str) -> None:
    timeouts = Timeouts(first_token_s=0.3)
    async with pair(timeouts=timeouts) as ((first, second), gateway):
        await order(first, "fault", kind=trouble)
        reply = await ask(gateway)
        assert words(reply) == counted(12)
        assert gateway.outcomes[0].prefilled_at == ""
        assert second.state()["received_tokens"] == 0


@on_loop
async def test_a_worker_that_dies_while_it_prefills_costs_no_request() -> None:
    async with pair(SLOW, ENGINE) as ((first, _), gateway):
        asking = [asyncio.create_task(ask(gateway)) for _ in range(4)]
        await until(lambda: first.state()["running"])
        await order(first, "crash", restart_after_s=60)
        for reply in await asyncio.gather(*asking):
            assert words(reply) == counted(12)


@pytest.mark.parametrize("restart_s", [60.0, 0.0])
@pytest.mark.parametrize("policy", ["fail", "recompute"])
@on_loop
async def test_a_worker_that_dies_holding_a_prompt_costs_no_request(
    restart_s: float, policy: Any
) -> None:
    """It may even be back, and know nothing of what it held."""
    second = EngineSettings(profile="tiny", model=MODEL, speed=10.0, kv_load_failure_policy=policy)
    async with pair(ENGINE, second) as ((first, _), gateway):
        with between_the_legs() as kept:
            asking = asyncio.create_task(ask(gateway))
            await until(lambda: kept)
            first.listening.clear()
            await order(first, "crash", restart_after_s=restart_s)
            if not restart_s:
                await first.listening.wait()
        gateway.host.tell(kept[0])
        assert words(await asking) == counted(12)


@on_loop
async def test_an_engine_that_hands_nothing_over_is_told_from_one_that_does() -> None:
    plain = EngineSettings(profile="tiny", model=MODEL, speed=10.0, hands_over=False)
    async with pair(plain, ENGINE) as (_, gateway):
        assert words(await ask(gateway)) == counted(12)
        assert gateway.outcomes[0].prefilled_at == ""
        assert gateway.host.kernel.workers["w0"].failures == 1


@on_loop
async def test_a_request_that_is_wrong_is_refused_in_the_engine_s_own_words() -> None:
    async with pair() as (_, gateway):
        reply = await ask(gateway, tokens=100_000)
        assert reply.status == 400
        assert "maximum context length" in reply.json["error"]["message"]
        assert all(w.failures == 0 for w in gateway.host.kernel.workers.values())


# Trouble with the worker that answers.


@on_loop
async def test_a_worker_that_dies_before_it_answers_has_the_prompt_prefilled_again() -> None:
    parts = (PREFILLS, DECODES, DECODES)
    async with pair(ENGINE, SLOW, SLOW, parts=parts) as ((first, *others), gateway):
        asking = asyncio.create_task(ask(gateway))
        await until(lambda: first.state()["fetched"])
        (busy,) = [other for other in others if other.state()["received_tokens"]]
        await order(busy, "crash", restart_after_s=60)
        assert words(await asking) == counted(12)


@on_loop
async def test_a_stream_goes_on_elsewhere_without_a_further_hand_over() -> None:
    parts = (PREFILLS, DECODES, DECODES)
    async with pair(ENGINE, SLOW, SLOW, parts=parts) as ((first, *others), gateway):
        asking = asyncio.create_task(ask(gateway, tokens=40))
        await until(lambda: any(written(other) > 5 for other in others))
        await order(max(others, key=written), "cut")
        assert words(await asking) == counted(40)
        assert gateway.outcomes[0].moved == 1
        assert first.state()["fetched"] == 1


# The lease.


@on_loop
async def test_what_is_too_old_is_never_fetched() -> None:
    """Even if the kernel were to ask for it: the emulated engine would write nonsense."""
    lets_go = EngineSettings(profile="tiny", model=MODEL, speed=10.0, kv_lease_s=0.3)
    parts = ({**PREFILLS, "lease_s": 0.2}, DECODES)
    holds = mock.patch.object(HandOver, "holds", return_value=True)
    async with pair(lets_go, ENGINE, parts=parts) as ((first, second), gateway):
        with between_the_legs() as kept:
            asking = asyncio.create_task(ask(gateway))
            await until(lambda: kept)
            await until(lambda: first.state()["expired"])
        with holds:
            gateway.host.tell(kept[0])
        assert words(await asking) == counted(12)
        asked = [d.command for d in gateway.host.decisions if isinstance(d.command, Dispatch)]
        assert [command.prefilled_at for command in asked] == ["w0", ""]
        assert second.state()["received_tokens"] == 0


@on_loop
async def test_without_the_lease_the_answer_would_be_nonsense() -> None:
    """That the test above proves something."""
    lets_go = EngineSettings(profile="tiny", model=MODEL, speed=10.0, kv_lease_s=0.1)
    async with pair(lets_go, ENGINE) as ((first, _), gateway):
        with between_the_legs() as kept:
            asking = asyncio.create_task(ask(gateway))
            await until(lambda: kept)
            await until(lambda: first.state()["expired"])
        gateway.host.tell(kept[0])
        assert words(await asking).startswith(" t500000000 t500000001")


@on_loop
async def test_a_prefill_may_take_longer_than_the_lease() -> None:
    parts = ({**PREFILLS, "lease_s": 0.2}, DECODES)
    slowest = EngineSettings(profile="tiny", model=MODEL, speed=0.005)
    async with pair(slowest, ENGINE, parts=parts) as ((first, _), gateway):
        assert words(await ask(gateway)) == counted(12)
        assert gateway.outcomes[0].prefill_s > 0.2
        assert first.state()["fetched"] == 1


# Clients that leave.


@on_loop
async def test_a_client_that_leaves_while_its_prompt_is_prefilled_frees_the_worker() -> None:
    async with pair(SLOW, ENGINE) as ((first, _), gateway):
        asking = asyncio.create_task(ask(gateway))
        await until(lambda: first.state()["running"])
        asking.cancel()
        await until(lambda: not first.state()["running"])
        await gateway.settled()
        assert first.state()["kv_blocks_used"] == first.state()["held"] == 0


@on_loop
async def test_a_client_that_leaves_between_the_legs_frees_the_blocks_at_once() -> None:
    async with pair() as ((first, second), gateway):
        with between_the_legs() as kept:
            asking = asyncio.create_task(ask(gateway))
            await until(lambda: kept)
            assert first.state()["held"] == 1
            asking.cancel()
            await until(lambda: first.state()["held"] == 0)
        assert first.state()["expired"] == 0
        assert second.state()["steps"] == 0
        await gateway.settled()


@on_loop
async def test_a_worker_that_cannot_be_reached_leaves_no_blocks_held() -> None:
    parts = (PREFILLS, DECODES, DECODES)
    async with pair(ENGINE, ENGINE, ENGINE, parts=parts) as ((first, second, _), gateway):
        with between_the_legs() as kept:
            asking = asyncio.create_task(ask(gateway))
            await until(lambda: kept)
            await order(second, "crash", restart_after_s=60)
            await until(lambda: not second.listening.is_set())
        gateway.host.tell(kept[0])
        assert words(await asking) == counted(12)
        await until(lambda: first.state()["held"] == 0)
        assert first.state()["expired"] == 0


# Load.


@on_loop
async def test_many_requests_at_once_are_all_answered_right() -> None:
    parts = (PREFILLS, PREFILLS, DECODES, DECODES)
    async with pair(ENGINE, ENGINE, ENGINE, ENGINE, parts=parts) as (engines, gateway):
        replies = await asyncio.gather(*(ask(gateway, tokens=5 + i % 40) for i in range(120)))
        for i, reply in enumerate(replies):
            assert words(reply) == counted(5 + i % 40)
        await gateway.settled()
        fetched = sum(int(str(engine.state()["fetched"])) for engine in engines)
        assert fetched == 120
        assert not any(engine.state()["kv_blocks_used"] for engine in engines)
