"""What do clients see of engines that die, hang, crawl or talk nonsense amid their streams?"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator

import aiohttp
import pytest
from answers import (
    COMPLETIONS,
    Verdict,
    counts,
    ends_right_or_clearly,
    nothing_failed,
    right,
    survives,
)
from processes import Fleet, on_loop, running

from paceline.engines.emulated.faults import SPOILS

TOKENS = 40


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with running(tmp_path_factory.mktemp("chaos")) as fleet:
        yield fleet


@pytest.fixture
def fleet(started: Fleet) -> Fleet:
    """All well, whatever the test before did."""
    on_loop(started.up)()
    return started


@on_loop
async def test_an_untroubled_fleet_answers_everybody(fleet: Fleet) -> None:
    async with fleet.crowd(60, TOKENS) as crowd:
        nothing_failed(await crowd.answers())
    await fleet.settled()


@on_loop
async def test_a_killed_engine_with_200_streams_in_flight_costs_none_of_them(fleet: Fleet) -> None:
    async with fleet.crowd(200, TOKENS) as crowd:
        await crowd.flowing()
        fleet.engines[0].kill()
        answers = await crowd.answers()
    survives(answers)
    assert right(answers) >= 100
    async with fleet.crowd(30, 5) as crowd:
        nothing_failed(await crowd.answers())
    await fleet.settled()


@on_loop
async def test_a_killed_engine_costs_no_answer_that_is_no_stream(fleet: Fleet) -> None:
    body = {"model": "m", "prompt": "all at once", "max_tokens": TOKENS, "ignore_eos": True}

    async def ask(http: aiohttp.ClientSession) -> str:
        async with http.post(fleet.gateway.url + COMPLETIONS, json=body) as answer:
            found: str = (await answer.json())["choices"][0]["text"]
            return found

    async with aiohttp.ClientSession() as http:
        asking = [asyncio.create_task(ask(http)) for _ in range(60)]
        await asyncio.sleep(0.5)
        fleet.engines[0].kill()
        texts = await asyncio.gather(*asking)
    assert texts == ["".join(f" t{i}" for i in range(TOKENS))] * 60
    await fleet.settled()


@on_loop
async def test_a_stopped_engine_hangs_nobody(fleet: Fleet) -> None:
    async with fleet.crowd(60, TOKENS) as crowd:
        await crowd.flowing()
        fleet.engines[1].signal(signal.SIGSTOP)
        answers = await crowd.answers()
        fleet.engines[1].signal(signal.SIGCONT)
    survives(answers)
    assert right(answers) >= 30
    await fleet.settled()


@on_loop
async def test_an_engine_that_gives_no_tokens_but_is_healthy_hangs_nobody(fleet: Fleet) -> None:
    async with fleet.crowd(60, TOKENS) as crowd:
        await crowd.flowing()
        await fleet.engines[2].order("hang", seconds=1000)
        answers = await crowd.answers()
        await fleet.engines[2].order("reset")
    survives(answers)
    await fleet.settled()


@on_loop
async def test_an_engine_that_crawls_loses_nothing(fleet: Fleet) -> None:
    async with fleet.crowd(60, 20) as crowd:
        await crowd.flowing()
        await fleet.engines[0].order("slowdown", factor=5.0)
        nothing_failed(await crowd.answers())
    await fleet.settled()
    fleet.gateway.kill()  # it has learned to avoid this engine


@on_loop
async def test_streams_that_go_wrong_midway_in_all_ways_are_noticed(fleet: Fleet) -> None:
    for kind in SPOILS:
        await fleet.engines[0].order("fault", kind=kind, count=2, after_tokens=5)
    async with fleet.crowd(60, 20) as crowd:
        answers = await crowd.answers()
    survives(answers)
    assert right(answers) >= 60 - 2 * len(SPOILS)
    assert not (await fleet.engines[0].state())["faults"], "not all have come about"
    await fleet.settled()


@pytest.mark.parametrize("kind", ["close_mid_header", "error500", "no_answer"])
@on_loop
async def test_what_goes_wrong_before_the_first_token_costs_nobody(fleet: Fleet, kind: str) -> None:
    await fleet.engines[0].order("fault", kind=kind, count=8)
    async with fleet.crowd(45, 10) as crowd:
        nothing_failed(await crowd.answers())
    await fleet.settled()


@on_loop
async def test_all_streams_of_one_engine_cut_at_once_go_on(fleet: Fleet) -> None:
    async with fleet.crowd(60, TOKENS) as crowd:
        await crowd.flowing()
        await fleet.engines[0].order("cut")
        survives(await crowd.answers())
    await fleet.settled()


@on_loop
async def test_an_engine_that_refuses_connections_costs_nobody(fleet: Fleet) -> None:
    await fleet.engines[0].order("refuse", seconds=1.0)
    async with fleet.crowd(60, 20, over_s=0.5) as crowd:
        nothing_failed(await crowd.answers())
    await fleet.engines[0].up()
    await fleet.settled()


@on_loop
async def test_engines_that_are_gone_from_the_start_cost_nobody(fleet: Fleet) -> None:
    fleet.gateway.kill()
    for engine in fleet.engines[1:]:
        engine.kill()
    fleet.gateway.start()
    await fleet.gateway.up()
    async with fleet.crowd(40, 20) as crowd:
        answers = await crowd.answers()
    nothing_failed(answers)
    assert len({answer.worker for answer in answers}) == 1


@on_loop
async def test_without_any_engine_everybody_is_told_so(fleet: Fleet) -> None:
    async with fleet.crowd(30, TOKENS) as crowd:
        await crowd.flowing()
        for engine in fleet.engines:
            engine.kill()
        ends_right_or_clearly(await crowd.answers())
    async with fleet.crowd(10, 5) as crowd:
        answers = await crowd.answers()
    assert counts(answers) == {Verdict.REFUSED.value: 10}
    fleet.engines[0].start()
    await fleet.engines[0].up()
    await fleet.gateway.up()
    async with fleet.crowd(10, 5) as crowd:
        nothing_failed(await crowd.answers())


@on_loop
async def test_engines_that_only_answer_500_are_called_by_their_name(fleet: Fleet) -> None:
    for engine in fleet.engines:
        await engine.order("fault", kind="error500", count=1000)
    async with fleet.crowd(20, 5) as crowd:
        answers = await crowd.answers()
    assert counts(answers) == {Verdict.REFUSED.value: 20}


@on_loop
async def test_engines_that_keep_dying_cost_nobody(fleet: Fleet) -> None:
    async with fleet.crowd(60, 100) as crowd:
        await crowd.flowing()
        for engine in fleet.engines[:2]:
            engine.kill()
            await asyncio.sleep(0.3)
            engine.start()
            await engine.up()
        survives(await crowd.answers())
    await fleet.settled()
