"""Is a run the same every time, is every request counted once, and does nothing pile up?"""

from __future__ import annotations

import os
import subprocess
import sys
from math import inf
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stage import SMALL, Stage, small

from paceline.domain.facts import RequestArrived
from paceline.kernel.log import line, opening, replay
from paceline.simulator.oracle import ORACLE
from paceline.simulator.replica import Replica
from paceline.simulator.scenario import (
    Fault,
    Gateways,
    Network,
    Requests,
    Scenario,
    SimTier,
    Workers,
)
from paceline.simulator.simulation import Simulation, play

EVERYTHING = Scenario(
    about="A bit of all that chance has a hand in.",
    seconds=8.0,
    workers=(
        Workers(profile="h100-llama-8b", count=2, start_up_s=0.5),
        Workers(profile="tiny", name="late", added_s=2.0),
    ),
    tiers={"chat": SimTier(ttft_s=0.5, itl_s=0.02, weight=4.0), "rest": SimTier()},
    requests=(
        Requests(kind="chat", rate=10.0, cv=3.0, prompt=(50, 200), tenant="a"),
        Requests(kind="agents", rate=5.0, prompt=(100, 500), tier="rest", tenant="b"),
    ),
    gateways=Gateways(count=3, loss=0.3),
    faults=(
        Fault(kind="slow", worker="w0", at_s=1.0, for_s=1.0, every_s=2.0),
        Fault(kind="crash", worker="w1", at_s=3.0, for_s=1.0),
        Fault(kind="partition", worker="*", at_s=5.0, for_s=0.5, gateway="g1"),
    ),
)
POLICIES = ("headroom", "least-requests", ORACLE)


def results(seed: int = 7) -> bytes:
    """What all of it comes to, under several policies."""
    return b"\n".join(msgspec.json.encode(play(EVERYTHING, policy, seed)) for policy in POLICIES)


def test_the_same_seed_gives_the_same_result_byte_for_byte_in_any_process() -> None:
    program = "import sys, test_simulation; sys.stdout.buffer.write(test_simulation.results())"
    elsewhere = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parent,
        env={**os.environ, "PYTHONHASHSEED": "12345"},
        capture_output=True,
        check=True,
    )
    assert elsewhere.stdout == results()


def test_another_seed_gives_another_result() -> None:
    assert play(SMALL, "headroom", 1) != play(SMALL, "headroom", 2)


def test_a_log_does_not_change_what_happens() -> None:
    assert play(EVERYTHING, "headroom", 7, log=lambda *_: None) == play(EVERYTHING, "headroom", 7)


def test_every_policy_gets_the_same_requests_at_the_same_gateways() -> None:
    came = []
    for policy in ("headroom", "round-robin", ORACLE):
        stage = Stage(EVERYTHING, policy, 3)
        stage.run()
        came.append([(now, fact.request) for now, fact in stage.facts(RequestArrived)])
    assert came[0] == came[1] == came[2]
    assert len(came[0]) > 30


@pytest.mark.parametrize("policy", ["headroom", "round-robin", "prefix-affinity"])
def test_a_recorded_log_gives_the_same_commands_to_a_fresh_kernel(policy: str) -> None:
    stage = Stage(msgspec.structs.replace(EVERYTHING, gateways=Gateways()), policy)
    stage.run()
    (gateway,) = stage.simulation.gateways
    lines = [opening(gateway.kernel.settings), *(line(*entry) for entry in stage.log)]
    count = 0
    for entry, commands in replay(lines):
        assert list(entry.commands) == commands
        count += bool(commands)
    assert count > 50


# Every request once.

times = st.floats(0.0, 4.0)


@st.composite
def faults(draw: st.DrawFn) -> Fault:
    return Fault(
        kind=draw(st.sampled_from(["slow", "hang", "crash", "partition"])),
        worker=draw(st.sampled_from(["w0", "w1", "*"])),
        at_s=draw(times),
        for_s=draw(st.sampled_from([0.001, 0.3, 1.0, 2.5, inf])),
        factor=draw(st.floats(0.3, 10.0)),
        every_s=draw(st.sampled_from([0.0, 0.7, 1.3])),
        gateway=draw(st.sampled_from(["*", "g0", "g1"])),
    )


@st.composite
def scenarios(draw: st.DrawFn) -> Scenario:
    return small(
        *draw(st.lists(faults(), max_size=5)),
        seconds=4.0,
        drain_s=12.0,
        workers=(
            Workers(profile="tiny", count=2, start_up_s=draw(st.sampled_from([0.0, 0.5]))),
            Workers(profile="tiny", name="late", added_s=draw(times), model="n"),
        ),
        requests=(
            Requests(rate=draw(st.floats(1.0, 30.0)), prompt=(200, 3000), output=(30, 600)),
            Requests(kind="batch", rate=5.0, turns=10.0, prompt=(200, 3000), output=(1, 2)),
            Requests(rate=3.0, model="n"),
            Requests(rate=1.0, model="nobody has it"),
        ),
        gateways=Gateways(count=draw(st.integers(1, 3)), loss=draw(st.floats(0.0, 1.0))),
        network=Network(latency_s=draw(st.sampled_from([0.0, 0.001, 0.4])), probe_s=0.5),
        first_token_timeout_s=draw(st.sampled_from([0.8, 10.0])),
        stall_timeout_s=draw(st.sampled_from([0.5, 10.0])),
    )


@settings(max_examples=30, deadline=None)
@given(scenarios(), st.sampled_from(["headroom", "round-robin", ORACLE]), st.integers(0, 1000))
def test_whatever_breaks_every_request_is_counted_once_and_nothing_is_left_behind(
    scenario: Scenario, policy: str, seed: int
) -> None:
    stage = Stage(scenario, policy, seed)
    result = stage.run()
    arrived = stage.facts(RequestArrived)
    assert result.total.requests == len(stage.seen) == len(arrived)
    assert sorted(s.at_s for s in stage.seen) == [now for now, _ in arrived]
    assert set(result.total.statuses) <= {"ok", "shed", "failed", "broke", "unfinished"}
    simulation = stage.simulation
    assert not simulation.flights
    for replica in simulation.replicas.values():
        assert_in_order(replica)
    if "unfinished" not in result.total.statuses:
        assert_nothing_is_left(simulation)
    for seen in stage.seen:
        assert seen.queued_s <= seen.ttft_s
        assert seen.kept <= (seen.status == "ok")
        if seen.status == "ok":
            assert seen.ttft_s + seen.itl_s * (seen.output_tokens - 1) == pytest.approx(
                seen.seconds
            )


def assert_in_order(replica: Replica) -> None:
    """What the replica counts is what its engine has."""
    decoding = [replica.flights[name].gateway.index for name in replica.scheduler.decoding]
    assert replica.streams == [decoding.count(gateway) for gateway in range(len(replica.streams))]
    assert replica.scheduler.running + replica.scheduler.waiting == len(replica.flights)


def assert_nothing_is_left(simulation: Simulation) -> None:
    """All has come to its end, everywhere."""
    for replica in simulation.replicas.values():
        assert not replica.flights
        assert not replica.coming
        assert not any(replica.streams)
        assert replica.scheduler.pool.used == 0
    for gateway in simulation.gateways:
        assert not gateway.kernel.requests
        assert not any(gateway.kernel.held().values())
        for worker in gateway.kernel.workers.values():
            assert not worker.ledger.entries


def test_requests_that_come_before_the_end_of_the_warm_up_are_served_but_not_counted() -> None:
    stage = Stage(small(warmup_s=5.0))
    result = stage.run()
    arrived = [now for now, _ in stage.facts(RequestArrived)]
    assert result.total.requests == sum(now >= 5.0 for now in arrived) < len(arrived)


def test_what_is_not_answered_in_time_is_a_miss() -> None:
    stuck = small(Fault(kind="hang", worker="*", at_s=9.0), drain_s=5.0)
    statuses = Stage(stuck).run().total.statuses
    assert statuses["unfinished"] > 0
    assert set(statuses) == {"ok", "unfinished"}


# Memory.


def test_memory_does_not_grow_with_the_requests() -> None:
    many = small(
        seconds=100.0,
        requests=(Requests(rate=200.0, prompt=(8, 16), output=(2, 5)),),
        faults=(Fault(kind="crash", worker="w1", at_s=10.0, for_s=1.0, every_s=10.0),),
    )
    simulation = Simulation(many, "headroom", 1)
    assert simulation.run().total.requests > 19_000
    assert_nothing_is_left(simulation)
    assert sum(sizes(simulation).values()) < 5000, sizes(simulation)


def sizes(root: object) -> dict[str, int]:
    """How much stands in the collections that an object holds, directly or not, by name."""
    found: dict[str, int] = {}
    seen: set[int] = set()
    ahead: list[tuple[str, Any]] = [("", root)]
    while ahead:
        name, thing = ahead.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, dict | list | set | tuple) or hasattr(thing, "popleft"):
            found[name] = found.get(name, 0) + len(thing)
            inside = thing.values() if isinstance(thing, dict) else thing
            ahead += [(name, item) for item in inside]
        elif type(thing).__module__.startswith("paceline"):
            slots = [s for cls in type(thing).__mro__ for s in getattr(cls, "__slots__", ())]
            fields = {s: getattr(thing, s) for s in slots if hasattr(thing, s)}
            fields |= getattr(thing, "__dict__", {})
            ahead += [(f"{type(thing).__name__}.{field}", v) for field, v in fields.items()]
    return found
