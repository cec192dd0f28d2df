"""What do clients see where some workers prefill and others answer, and any of them dies?

Whoever fetches blocks too late writes nonsense here, so every token proves that nobody did.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from answers import nothing_failed, survives
from processes import Fleet, on_loop, running

PREFILLS, DECODES = {"role": "prefill", "lease_s": 2.0}, {"role": "decode"}
PARTS = (PREFILLS, PREFILLS, DECODES, DECODES)
TOKENS = 30


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent / "handing_over"), os.pathsep)
        with running(
            tmp_path_factory.mktemp("shared"),
            engines=len(PARTS),
            engine={"kv_lease_s": 4.0, "kv_tokens_per_s": 20_000.0},
            parts=PARTS,
            routing={"policy": "least-requests"},
        ) as fleet:
            yield fleet


@pytest.fixture
def fleet(started: Fleet) -> Fleet:
    """All well, whatever the test before did."""
    on_loop(started.up)()
    return started


async def held(fleet: Fleet) -> int:
    states = [await engine.state() for engine in fleet.engines if engine.alive]
    return sum(int(state["held"]) for state in states)


@on_loop
async def test_everybody_is_answered_by_two_workers(fleet: Fleet) -> None:
    before = [(await engine.state())["fetched"] for engine in fleet.engines]
    async with fleet.crowd(80, TOKENS) as crowd:
        nothing_failed(await crowd.answers())
    await fleet.settled()
    after = [(await engine.state())["fetched"] for engine in fleet.engines]
    assert sum(after) - sum(before) == 80
    assert await held(fleet) == 0


@pytest.mark.parametrize("place", [0, 2], ids=["prefill", "decode"])
@on_loop
async def test_a_killed_engine_costs_no_request(fleet: Fleet, place: int) -> None:
    async with fleet.crowd(100, TOKENS, over_s=1.0) as crowd:
        await asyncio.sleep(0.5)
        fleet.engines[place].kill()
        survives(await crowd.answers())
    await fleet.settled()


@pytest.mark.parametrize("place", [0, 2], ids=["prefill", "decode"])
@on_loop
async def test_an_engine_that_sleeps_for_a_while_costs_no_request(fleet: Fleet, place: int) -> None:
    async with fleet.crowd(60, TOKENS, over_s=1.0) as crowd:
        await asyncio.sleep(0.5)
        fleet.engines[place].signal(signal.SIGSTOP)
        survives(await crowd.answers())
    fleet.engines[place].signal(signal.SIGCONT)
    await fleet.settled()


@on_loop
async def test_cut_connections_cost_no_request(fleet: Fleet) -> None:
    async with fleet.crowd(80, TOKENS, over_s=1.0) as crowd:
        for engine in fleet.engines:
            await asyncio.sleep(0.2)
            await engine.order("cut")
        survives(await crowd.answers())
    await fleet.settled()


@on_loop
async def test_clients_that_leave_at_any_time_leave_no_block_behind(fleet: Fleet) -> None:
    """What is answered in the moment in which its client leaves, only the lease sets free."""
    for i in range(12):
        async with fleet.crowd(10, TOKENS):
            await asyncio.sleep(i * 0.01)
    await fleet.settled()
    assert await held(fleet) == 0
