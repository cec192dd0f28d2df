"""What does one of several gateways see, and what do the others tell it?"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stage import STEP_S, Stage, ask, small

from paceline.domain.facts import PeerReported, RequestArrived, StepsSeen
from paceline.kernel.elsewhere import FORGET_S
from paceline.simulator.scenario import Fault, Gateways
from paceline.simulator.simulation import Simulation

LONG_S = 4.0
LONG = round(LONG_S / STEP_S)
"""Tokens of an answer of about so many seconds."""


def several(count: int = 2, **fields: float) -> Gateways:
    return Gateways(count=count, **fields)


def elsewhere(stage: Stage, *times: float) -> list[tuple[int, ...]]:
    """Requests that each gateway believes to be on w0 from others, at these times, once it ran."""
    believed: list[tuple[int, ...]] = []

    def look(simulation: Simulation) -> None:
        states = [g.kernel.workers["w0"].elsewhere for g in simulation.gateways]
        believed.append(tuple(state.requests for state in states))

    for when in times:
        stage.at(when, look)
    return believed


def one_stream_at(gateway: int, gateways: Gateways, *faults: Fault) -> Stage:
    """A long answer that this one of two gateways relays, on the only worker."""
    scenario = small(*faults, count=1, gateways=gateways)
    for seed in range(20):
        stage = Stage(scenario, seed=seed, requests=[ask(0.1, 50, LONG)])
        landed: list[int] = []

        def look(simulation: Simulation, landed: list[int] = landed) -> None:
            landed.extend(flight.gateway.index for flight in simulation.flights.values())

        stage.at(0.11, look)
        stage.run()
        if landed == [gateway]:
            return Stage(scenario, seed=seed, requests=[ask(0.1, 50, LONG)])
    raise AssertionError("no seed sends it there")


def test_requests_are_spread_over_all_gateways_and_each_is_answered_once() -> None:
    stage = Stage(small(gateways=several(4)), seed=3)
    result = stage.run()
    assert result.total.statuses == {"ok": len(stage.facts(RequestArrived))}
    ids = [fact.request.id for _, fact in stage.facts(RequestArrived)]
    assert len(set(ids)) == len(ids)
    for gateway in stage.simulation.gateways:
        assert not gateway.kernel.requests
        learned = gateway.kernel.workers["w0"].timing.samples
        assert learned > 50


def test_a_gateway_sees_steps_by_its_own_streams_only() -> None:
    stage = one_stream_at(1, several(loss=1.0))
    stage.run()
    quiet, relaying = (g.kernel.workers["w0"].timing.samples for g in stage.simulation.gateways)
    assert (quiet, relaying > 5) == (0, True)
    steps = [step for _, fact in stage.facts(StepsSeen) for step in fact.steps]
    assert {s.streams for s in steps} <= {0, 1}
    assert sum(s.count * s.streams for s in steps) == LONG - 1


def test_a_gateway_reckons_with_what_others_tell() -> None:
    stage = one_stream_at(1, several(every_s=0.25, delay_s=0.1))
    believed = elsewhere(stage, 0.2, 0.3, 0.4, 3.0, 6.0)
    stage.run()
    assert believed == [(0, 0), (0, 0), (1, 0), (1, 0), (0, 0)]  # told at 0.25, heard at 0.35


def test_news_that_is_always_lost_is_never_heard() -> None:
    stage = Stage(small(gateways=several(3, loss=1.0)))
    believed = elsewhere(stage, *range(1, 10))
    stage.run()
    assert set(believed) == {(0, 0, 0)}
    assert not stage.facts(PeerReported)


def test_of_news_half_of_which_is_lost_half_is_heard() -> None:
    stage = Stage(small(gateways=several(3, loss=0.5)))
    stage.run()
    rounds = max(now for now, _ in stage.facts(PeerReported)) / 0.25
    assert len(stage.facts(PeerReported)) == pytest.approx(0.5 * 6 * rounds, rel=0.2)


def test_news_is_as_old_as_its_way_was_long() -> None:
    stage = Stage(small(gateways=several(2, every_s=0.5, delay_s=0.2)))
    stage.run()
    heard = stage.facts(PeerReported)
    assert {fact.age_s for _, fact in heard} == {0.2}
    assert all((now - 0.2) % 0.5 == pytest.approx(0.0, abs=1e-6) or
               (now - 0.2) % 0.5 == pytest.approx(0.5, abs=1e-6) for now, _ in heard)  # fmt: skip


def test_a_gateway_that_falls_silent_is_forgotten() -> None:
    stage = one_stream_at(
        1, several(every_s=0.25, delay_s=0.0), Fault(kind="hang", worker="w0", at_s=0.5)
    )

    def silence(simulation: Simulation) -> None:
        simulation.gateways[0].hear = lambda news: None  # type: ignore[method-assign]

    stage.at(0.9, silence)
    believed = elsewhere(stage, 0.8, 0.8 + FORGET_S - 2.1, 0.8 + FORGET_S + 2.5)
    stage.run()
    assert believed == [(1, 0), (1, 0), (0, 0)]


def test_gateways_that_hear_of_each_other_share_a_fleet_better_than_deaf_ones() -> None:
    def most_in_one_place(loss: float, seed: int) -> int:
        """Of 24 long answers on 4 workers, by 8 gateways."""
        crowd = small(count=4, gateways=several(8, every_s=0.01, delay_s=0.0, loss=loss))
        requests = [ask(0.1 + 0.05 * i, 50, LONG) for i in range(24)]
        stage, streams = Stage(crowd, "least-requests", seed, requests), [0]
        stage.at(2.0, lambda s: streams.extend(sum(r.streams) for r in s.replicas.values()))
        stage.run()
        return max(streams)

    assert [most_in_one_place(0.0, seed) for seed in range(2)] == [6, 6]
    assert max(most_in_one_place(1.0, seed) for seed in range(2)) > 6


def test_a_partition_of_one_gateway_leaves_the_others_alone() -> None:
    cut = Fault(kind="partition", worker="w0", at_s=0.5, for_s=2.0, gateway="g0")
    stalls = []
    for gateway in (0, 1):
        stage = one_stream_at(gateway, several(), cut)
        stage.run()
        stalls.append(stage.seen[0].stall_s)
    assert stalls == pytest.approx([2.0, STEP_S], rel=0.05)


@settings(max_examples=10, deadline=None)
@given(st.integers(2, 5), st.integers(0, 100))
def test_every_stream_is_counted_at_its_own_gateway(count: int, seed: int) -> None:
    stage = Stage(small(seconds=3.0, gateways=several(count)), seed=seed)

    def look(simulation: Simulation) -> None:
        for replica in simulation.replicas.values():
            decoding = [replica.flights[i].gateway.index for i in replica.scheduler.decoding]
            assert replica.streams == [decoding.count(g) for g in range(count)]

    for when in range(1, 30):
        stage.at(0.1 * when, look)
    stage.run()
    assert all(not any(r.streams) for r in stage.simulation.replicas.values())


def test_one_gateway_has_nobody_to_tell() -> None:
    stage = Stage()
    stage.run()
    assert not stage.facts(PeerReported)
