"""Does an answer that is paused, moved or lost go on from its last token, none lost or doubled?"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from random import Random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stage import STEP_S, Stage, ask, fragile, small
from test_simulation import assert_in_order, assert_nothing_is_left, faults

from paceline.domain.commands import Command, Degrade, Dispatch, Fail, Move, Pause
from paceline.domain.facts import (
    Fact,
    FirstTokenSeen,
    RequestArrived,
    StepsSeen,
    StreamBroke,
    StreamEnded,
    StreamStopped,
)
from paceline.kernel import Kernel
from paceline.simulator.flight import Flight
from paceline.simulator.load import load_scenario
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
from paceline.simulator.simulation import Simulation
from paceline.workload.traces import Arrival

ANSWER = 400
SCENARIOS = Path(__file__).parents[2] / "scenarios"


def stream(at_s: float = 0.0, output: int = ANSWER) -> Arrival:
    return ask(at_s, prompt=50, output=output)


def order(command: Command, simulation: Simulation) -> None:
    """Have a command carried out that no policy gave."""
    simulation.gateways[0]._run(command, simulation.clock.now)


def generated(stage: Stage) -> int:
    """Tokens that all engines computed in their present lives."""
    replicas = stage.simulation.replicas.values()
    return sum(replica.scheduler.counters.generated_tokens for replica in replicas)


def moved_once(command: Command, when: float = 0.3, **kind: object) -> Stage:
    """One stream, which is told to go when it has run for a while."""
    stage = Stage(small(), "round-robin", requests=[stream()], **kind)  # type: ignore[arg-type]
    stage.at(when, partial(order, command))
    stage.run()
    return stage


# Pause and move.


@pytest.mark.parametrize("command", [Pause("r0", "a test"), Move("r0", "a test")])
def test_a_stream_that_is_taken_off_its_worker_goes_on_from_its_last_token(
    command: Command,
) -> None:
    stage = moved_once(command)
    ((_, stopped),) = stage.facts(StreamStopped)
    (_, first), (_, second) = stage.commands(Dispatch)
    ((_, ended),) = stage.facts(StreamEnded)
    assert stopped.worker_id == first.worker_id
    assert stopped.produced == pytest.approx(0.3 / STEP_S, abs=3)
    assert (first.produced, second.produced) == (0, stopped.produced)
    assert ended.output_tokens == generated(stage) == ANSWER
    (seen,) = stage.seen
    assert (seen.status, seen.worker) == ("ok", second.worker_id)


def test_the_client_of_a_moved_stream_sees_one_stream_with_one_longer_gap() -> None:
    stage = moved_once(Move("r0", "a test"))
    (began, _), (again, _) = stage.facts(FirstTokenSeen)
    (seen,) = stage.seen
    assert seen.ttft_s == began
    assert again - 0.3 < seen.stall_s < again - 0.3 + 2 * STEP_S
    assert seen.ttft_s + seen.itl_s * (ANSWER - 1) == pytest.approx(seen.seconds)
    assert (seen.paused, seen.moved) == (0, 1)


def test_a_request_that_has_not_begun_is_simply_sent_anew() -> None:
    stage = Stage(small(), "round-robin", requests=[ask(prompt=3000)])
    stage.at(0.01, partial(order, Move("r0", "a test")))
    stage.run()
    ((_, stopped),) = stage.facts(StreamStopped)
    assert stopped.produced == 0
    assert len(stage.facts(FirstTokenSeen)) == 1
    assert [s.status for s in stage.seen] == ["ok"]


@pytest.mark.parametrize("bytes_per_s", [float("inf"), 1e4])
def test_a_request_that_is_called_back_on_its_way_never_comes(bytes_per_s: float) -> None:
    far = small(network=Network(latency_s=0.2, bytes_per_s=bytes_per_s))
    stage = Stage(far, "round-robin", requests=[ask(prompt=100)])
    came: list[str] = []

    def look(simulation: Simulation) -> None:
        came.extend(simulation.replicas["w0"].flights)

    stage.at(0.1, partial(order, Move("r0", "a test")))
    for when in (0.3, 0.45, 0.5, 0.6):
        stage.at(when, look)
    stage.run()
    assert not came
    assert [(s.worker, s.status) for s in stage.seen] == [("w1", "ok")]


def test_a_request_that_is_over_or_waits_is_no_more_to_be_stopped() -> None:
    stage = Stage(small(), "round-robin", requests=[stream()])
    twice = partial(order, Move("r0", "a test")), partial(order, Pause("r0", "a test"))
    for again in twice:
        stage.at(0.3, again)
    stage.run()
    assert len(stage.facts(StreamStopped)) == 1
    assert [s.status for s in stage.seen] == ["ok"]


def test_an_answer_that_cannot_be_continued_is_not_stopped() -> None:
    stage = Stage(small(), "round-robin", requests=[fragile(stream())])
    stage.at(0.3, partial(order, Pause("r0", "a test")))
    stage.run()
    assert not stage.facts(StreamStopped)
    assert [s.stall_s for s in stage.seen] == [pytest.approx(STEP_S, rel=0.1)]


# Failing workers.


def test_a_stream_whose_worker_crashes_goes_on_elsewhere() -> None:
    crash = small(Fault(kind="crash", worker="w0", at_s=0.3))
    stage = Stage(crash, "round-robin", requests=[stream()])
    stage.run()
    ((_, broke),) = stage.facts(StreamBroke)
    assert broke.resumable
    assert broke.produced == pytest.approx(0.3 / STEP_S, abs=3)
    assert generated(stage) == ANSWER - broke.produced  # the other engine has lost its counters
    assert [(s.worker, s.status, s.moved) for s in stage.seen] == [("w1", "ok", 1)]


def test_what_a_worker_said_behind_a_partition_has_not_been_heard() -> None:
    cut = small(Fault(kind="partition", worker="w0", at_s=0.3), stall_timeout_s=2.0)
    stage = Stage(cut, "round-robin", requests=[stream(output=2000)])
    stage.run()
    ((lost_at, broke),) = stage.facts(StreamBroke)
    assert lost_at > 2.3
    assert broke.produced == pytest.approx(0.3 / STEP_S, abs=3)
    (seen,) = stage.seen
    assert (seen.status, seen.output_tokens) == ("ok", 2000)
    assert seen.stall_s == pytest.approx(lost_at - 0.3, abs=0.1)


def test_a_hung_worker_is_left_and_its_silence_counts_as_a_gap() -> None:
    hung = small(Fault(kind="hang", worker="w0", at_s=0.3), stall_timeout_s=1.0)
    stage = Stage(hung, "round-robin", requests=[stream()])
    stage.run()
    ((lost_at, _),) = stage.facts(StreamBroke)
    (seen,) = stage.seen
    assert (seen.worker, seen.status) == ("w1", "ok")
    assert seen.stall_s == pytest.approx(lost_at - 0.3, abs=0.1)


def test_a_stream_that_has_begun_and_finds_no_worker_breaks() -> None:
    alone = small(Fault(kind="crash", worker="w0", at_s=0.3), count=1)
    stage = Stage(alone, requests=[stream()])
    stage.run()
    ((_, fail),) = stage.commands(Fail)
    assert fail.request_id == "r0"
    assert [s.status for s in stage.seen] == ["broke"]


# Tiers.


def test_a_degraded_request_is_measured_by_what_its_own_tier_promises() -> None:
    tiers = {
        "t": SimTier(ttft_s=1e-6, weight=2.0, overload="degrade", degrade_to="low"),
        "low": SimTier(ttft_s=60.0),
    }
    stage = Stage(small(tiers=tiers), "round-robin", requests=[ask()])
    arrived: list[Flight] = []

    def degrade(simulation: Simulation) -> None:
        arrived.extend(simulation.flights.values())
        order(Degrade("r0", "low", "m", "a test"), simulation)

    stage.at(0.001, degrade)
    result = stage.run()
    assert arrived[0].request.tier == "low"
    assert arrived[0].promise.ttft_s == 60.0
    assert result.tiers["t"].degraded == 1
    assert result.tiers["t"].missed == {"ttft": 1}


def test_an_answer_after_its_deadline_keeps_no_promise() -> None:
    stage = Stage(
        small(tiers={"t": SimTier(deadline_s=0.5)}), requests=[stream(output=50), stream()]
    )
    assert stage.run().total.missed == {"deadline": 1}


def test_engines_may_serve_tiers_by_weight() -> None:
    crowd = [ask(0.001 * i, prompt=500, output=5) for i in range(40)]
    late = msgspec.structs.replace(ask(0.05, prompt=500, output=5), tier="high")
    ttft_s = []
    for engine_priority in (False, True):
        scenario = small(
            count=1,
            engine_priority=engine_priority,
            tiers={"t": SimTier(), "high": SimTier(weight=8.0)},
        )
        stage = Stage(
            scenario, "round-robin", requests=sorted([*crowd, late], key=lambda a: a.at_s)
        )
        stage.run()
        ttft_s += [s.ttft_s for s in stage.seen if s.tier == "high"]
    first_come, by_weight = ttft_s
    assert by_weight < 0.2 * first_come


def test_a_worker_may_have_less_room_than_its_profile_says() -> None:
    fleet = (Workers(profile="tiny", kv_tokens=2048),)
    stage = Stage(small(workers=fleet), requests=[ask(prompt=1000), ask(prompt=1000, output=1100)])
    stage.run()
    assert [s.status for s in stage.seen] == ["ok", "failed"]


@pytest.mark.parametrize(
    ("policy", "pauses"), [("headroom", True), ("least-requests", False), ("oracle", False)]
)
def test_streams_are_paused_for_want_of_kv_cache_only_where_they_would_be_held_back(
    policy: str, pauses: bool
) -> None:
    scenario = small(
        workers=(Workers(profile="tiny", kv_tokens=4096),),
        tiers={"t": SimTier(preemptible=True)},
    )
    stage = Stage(scenario, policy, requests=[ask(0.1 * i, output=3000) for i in range(4)])
    stage.run()
    assert any(s.paused for s in stage.seen) is pauses


# Whatever happens.


class Restless:
    """A kernel that takes requests off their workers for no reason, but not for ever."""

    def __init__(self, kernel: Kernel, rng: Random, share: float) -> None:
        self._kernel, self._rng, self._share = kernel, rng, share
        self._left = 100
        self._handle = kernel.handle
        kernel.handle = self.handle  # type: ignore[method-assign]

    def handle(self, fact: Fact, now: float) -> list[Command]:
        commands = self._handle(fact, now)
        for name, live in self._kernel.requests.items():
            at_work = live.worker is not None
            if self._left and at_work and self._rng.random() < self._share:
                self._left -= 1
                kind = Pause if self._rng.random() < 0.5 else Move
                commands.append(kind(name, "for no reason"))
        return commands


def restless(stage: Stage, seed: int, share: float) -> None:
    for gateway in stage.simulation.gateways:
        Restless(gateway.kernel, Random(f"{seed} {gateway.index}"), share)


def some(**changes: object) -> Scenario:
    return small(
        count=3,
        seconds=4.0,
        drain_s=30.0,
        requests=(
            Requests(rate=8.0, prompt=(100, 600), output=(100, 400), resumable=0.8),
            Requests(kind="batch", rate=3.0, turns=10.0, prompt=(200, 1000), output=(1, 2)),
        ),
        first_token_timeout_s=2.0,
        stall_timeout_s=2.0,
        **changes,
    )


@st.composite
def troubled(draw: st.DrawFn) -> Scenario:
    return some(
        faults=tuple(draw(st.lists(faults(), max_size=4))),
        gateways=Gateways(count=draw(st.integers(1, 2))),
        network=Network(
            latency_s=draw(st.sampled_from([0.0, 0.001, 0.2])),
            bytes_per_s=draw(st.sampled_from([float("inf"), 1e5])),
            jitter_s=draw(st.sampled_from([0.0, 0.002])),
            probe_s=0.5,
        ),
    )


@settings(max_examples=60, deadline=None)
@given(troubled(), st.integers(0, 1000), st.sampled_from([0.0, 0.01, 0.15]))
def test_whatever_breaks_and_however_often_it_moves_no_request_and_no_token_is_lost(
    scenario: Scenario, seed: int, share: float
) -> None:
    stage = Stage(scenario, "round-robin", seed)
    restless(stage, seed, share)
    result = stage.run()
    arrived = stage.facts(RequestArrived)
    assert result.total.requests == len(stage.seen) == len(arrived)
    assert_every_leg_goes_on_where_the_last_one_ended(stage)
    assert not stage.simulation.flights
    for replica in stage.simulation.replicas.values():
        assert_in_order(replica)
    if "unfinished" not in result.total.statuses:
        assert_nothing_is_left(stage.simulation)
    for seen in stage.seen:
        assert seen.queued_s <= seen.ttft_s
        if seen.status == "ok":
            gaps_s = seen.itl_s * (seen.output_tokens - 1)
            assert seen.ttft_s + gaps_s == pytest.approx(seen.seconds)
            if not scenario.network.jitter_s:  # of which no gap knows
                assert seen.itl_s <= seen.stall_s + 1e-9


def assert_every_leg_goes_on_where_the_last_one_ended(stage: Stage) -> None:
    had: Counter[str] = Counter()
    for _, fact, commands in stage.log:
        match fact:
            case StreamStopped() | StreamBroke():
                assert fact.produced >= had[fact.request_id]
                had[fact.request_id] = fact.produced
            case StreamEnded():
                assert fact.output_tokens > had[fact.request_id]
        for command in commands:
            if isinstance(command, Dispatch):
                assert command.produced == had[command.request_id]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["slow", "hang"]), st.floats(0.0, 4.0)), max_size=3),
    st.integers(0, 1000),
    st.sampled_from([0.01, 0.15]),
)
def test_each_token_comes_once_however_often_a_stream_moves(
    troubles: list[tuple[str, float]], seed: int, share: float
) -> None:
    broken = tuple(Fault(kind=k, worker="w0", at_s=at_s, for_s=0.7) for k, at_s in troubles)  # type: ignore[arg-type]
    stage = Stage(some(faults=broken), "round-robin", seed)
    restless(stage, seed, share)
    asked: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
    watch_legs(stage, asked)
    result = stage.run()
    assert result.preemptions == 0
    assert result.total.statuses == {"ok": result.total.requests}
    steps = [step for _, fact in stage.facts(StepsSeen) for step in fact.steps]
    came = sum(s.count * s.streams for s in steps) + len(stage.facts(FirstTokenSeen))
    wished = sum(fact.output_tokens for _, fact in stage.facts(StreamEnded))
    assert came == generated(stage) == wished
    for legs in asked.values():  # what one leg gave is prompt to the next
        assert len({prompt + output for prompt, output in legs}) == 1


def watch_legs(stage: Stage, asked: dict[str, list[tuple[int, int]]]) -> None:
    """What each worker is asked to compute: tokens of prompt and answer."""

    def send(replica: Replica, flight: Flight, received: bool = False) -> None:
        asked[flight.id].append((flight.prompt_tokens, flight.output_tokens))
        Replica.send(replica, flight, received)

    for replica in stage.simulation.replicas.values():
        replica.send = partial(send, replica)  # type: ignore[method-assign]


def test_the_same_restlessness_gives_the_same_result() -> None:
    def once() -> bytes:
        stage = Stage(some(), "headroom", 3)
        restless(stage, 3, 0.1)
        return msgspec.json.encode(stage.run())

    assert once() == once()


def test_a_stream_that_leaves_a_slow_worker_is_not_drawn_back_by_what_is_cached_there() -> None:
    on: dict[str, str] = {}
    went: list[tuple[str, str]] = []

    def saw(now: float, fact: Fact, commands: Sequence[Command]) -> None:
        for command in commands:
            if isinstance(command, Move):
                left[command.request_id] = on[command.request_id]
            elif isinstance(command, Dispatch):
                on[command.request_id] = command.worker_id
                if command.request_id in left:
                    went.append((left.pop(command.request_id), command.worker_id))

    left: dict[str, str] = {}
    chats = load_scenario(SCENARIOS / "slow-worker-chats.yaml")
    Simulation(msgspec.structs.replace(chats, seconds=70.0), "headroom", 0, log=saw).run()
    assert {slow for slow, _ in went} == {"w1"}
    assert "w1" not in {there for _, there in went}
