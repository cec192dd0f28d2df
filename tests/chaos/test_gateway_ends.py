"""What becomes of streams, engines and clients when the gateway itself ends under load?"""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
from answers import CLEAR, Verdict, counts, nothing_failed
from crowd import until
from processes import Fleet, on_loop, running


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with running(tmp_path_factory.mktemp("ends"), engines=2) as fleet:
        yield fleet


@pytest.fixture
def fleet(started: Fleet) -> Fleet:
    on_loop(started.up)()
    return started


@on_loop
async def test_a_gateway_that_is_told_to_end_lets_its_streams_finish(fleet: Fleet) -> None:
    async with fleet.crowd(100, 60) as crowd:
        await crowd.flowing()
        fleet.gateway.signal(signal.SIGTERM)
        async with fleet.crowd(20, 10) as late:
            latecomers = await late.answers()
        nothing_failed(await crowd.answers())
    assert await fleet.gateway.ended() == 0
    for answer in latecomers:  # served, or turned away so that they can ask elsewhere
        assert answer.verdict in CLEAR or (answer.verdict is Verdict.CUT and not answer.tokens)
    assert b"Traceback" not in fleet.gateway.log.read_bytes()


@on_loop
async def test_a_killed_gateway_frees_its_engines_and_the_next_one_starts_clean(
    fleet: Fleet,
) -> None:
    async with fleet.crowd(100, 60) as crowd:
        await crowd.flowing()
        fleet.gateway.kill()
        answers = await crowd.answers()
    assert counts(answers) == {Verdict.CUT.value: 100}
    assert all(answer.tokens >= 2 for answer in answers)
    await fleet.restart()
    await fleet.settled()
    async with fleet.crowd(60, 10) as crowd:
        nothing_failed(await crowd.answers())
    await fleet.settled()


@on_loop
async def test_gateways_that_follow_one_another_under_load_leave_nothing_behind(
    fleet: Fleet,
) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        async with fleet.crowd(100, 30, over_s=0.5) as crowd:
            fleet.gateway.signal(number)
            await fleet.gateway.ended()
            await fleet.restart()
            await until(lambda: all(client.over for client in crowd.clients))
            assert Verdict.WRONG.value not in counts(await crowd.answers())
        await fleet.settled()
