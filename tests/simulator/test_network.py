"""What lies between gateways and workers, and how late does it make what they send?"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stage import SMALL, Stage, ask, small

from paceline.domain.facts import FirstTokenSeen, RequestArrived, Step, StepsSeen, StreamEnded
from paceline.simulator.flight import BYTES_PER_TOKEN, NAME_TOKENS, Flight, names_of
from paceline.simulator.lateness import Lateness
from paceline.simulator.replica import Replica
from paceline.simulator.scenario import Fault, Network, Requests, Scenario
from paceline.workload.traces import BLOCK_TOKENS, Arrival

LONG = 1_000
"""Tokens of a long prompt."""
ALONE_S = 0.25
"""What it needs on a slow link that it has for itself."""
SLOW_LINK = Network(latency_s=0.01, bytes_per_s=BYTES_PER_TOKEN * LONG / ALONE_S)


# Prompts


@given(st.lists(st.integers(0, 1 << 48), unique=True, max_size=8), st.integers(1, 5_000))
def test_names_reach_as_far_as_the_shared_text_and_are_those_of_every_longer_prompt(
    blocks: list[int], tokens: int
) -> None:
    whole = names_of(Arrival(0.0, 5_000, 1, tuple(blocks)))
    part = Arrival(0.0, tokens, 1, tuple(blocks))
    assert names_of(part) == whole[: part.shared_tokens // NAME_TOKENS]
    assert len(set(whole)) == len(whole) == len(blocks) * BLOCK_TOKENS // NAME_TOKENS


def test_of_a_prompt_that_ends_within_a_block_all_but_the_last_tokens_are_found_again() -> None:
    said = BLOCK_TOKENS + NAME_TOKENS + 9
    chat = [ask(0.1, said, 2, blocks=(7, 8)), ask(5.0, said + 200, 2, blocks=(7, 8))]
    stage = Stage(small(count=1), requests=chat)
    stage.run()
    cached = [fact.cached_tokens for _, fact in stage.facts(StreamEnded)]
    assert cached == [0, BLOCK_TOKENS + NAME_TOKENS]


# What clients tell


def test_a_cap_that_clients_tell_cuts_their_answers_and_reaches_the_kernel() -> None:
    told = Requests(rate=5.0, output=(40, 200), max_tokens=50)
    stage = Stage(small(requests=(told, Requests(rate=5.0, output=(40, 200), tenant="silent"))))
    stage.run()
    asked = [fact.request for _, fact in stage.facts(RequestArrived)]
    assert {r.max_tokens for r in asked if r.tenant == "silent"} == {None}
    assert {r.max_tokens for r in asked if r.tenant != "silent"} == {50}
    silent, cut = (
        [seen.output_tokens for seen in stage.seen if (seen.tenant == "silent") is silent]
        for silent in (True, False)
    )
    assert max(cut) == 50 < max(silent)


# Links


def came_in(
    monkeypatch: pytest.MonkeyPatch, requests: Sequence[Arrival], scenario: Scenario
) -> list[float]:
    """When these requests came in at their workers."""
    times: list[float] = []
    stage = Stage(scenario, "round-robin", requests=requests)
    send = Replica.send

    def seen(replica: Replica, flight: Flight, received: bool = False) -> None:
        times.append(stage.simulation.clock.now)
        send(replica, flight, received)

    monkeypatch.setattr(Replica, "send", seen)
    stage.run()
    monkeypatch.undo()
    return times


def test_two_long_prompts_on_one_link_arrive_later_than_one_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one_worker, long = small(count=1, network=SLOW_LINK), ask(1.0, LONG, 2)
    flown_s = 1.0 + 2 * SLOW_LINK.latency_s
    assert came_in(monkeypatch, [long], one_worker) == pytest.approx([flown_s + ALONE_S])
    both = came_in(monkeypatch, [long, long], one_worker)
    assert both == pytest.approx([flown_s + 2 * ALONE_S] * 2)


def test_a_short_prompt_overtakes_a_long_one_and_slows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [ask(1.0, LONG, 2), ask(1.1, LONG // 10, 2)]
    times = came_in(monkeypatch, requests, small(count=1, network=SLOW_LINK))
    assert times == pytest.approx([1.1 + 0.2 * ALONE_S + 0.02, 1.0 + 1.1 * ALONE_S + 0.02])


def test_each_worker_has_a_link_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    long = ask(1.0, LONG, 2)
    times = came_in(monkeypatch, [long, long], small(network=SLOW_LINK))
    assert times == pytest.approx([1.0 + ALONE_S + 0.02] * 2)


def test_without_a_limit_all_prompts_come_in_after_the_latency(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scenario = small(count=1, network=Network(latency_s=0.01))
    assert came_in(monkeypatch, [ask(1.0, LONG, 2)] * 3, scenario) == pytest.approx([1.02] * 3)


@given(seed=st.integers(0, 1000))
@settings(max_examples=5, deadline=None)
def test_on_slow_links_every_request_is_answered_even_by_workers_that_crash(seed: int) -> None:
    crash = Fault(kind="crash", worker="*", at_s=3.0, for_s=0.5)
    stage = Stage(small(crash, seconds=6.0, network=SLOW_LINK), seed=seed)
    statuses = stage.run().total.statuses
    assert statuses["ok"] > 0.5 * sum(statuses.values())
    assert "unfinished" not in statuses
    assert not any(replica.coming for replica in stage.simulation.replicas.values())


# A busy gateway


def told_late(jitter_s: float, *faults: Fault, seed: int = 1) -> Stage:
    stage = Stage(small(*faults, seconds=6.0, network=Network(jitter_s=jitter_s)), seed=seed)
    stage.run()
    return stage


def steps_of(stage: Stage, worker_id: str) -> list[Step]:
    told = stage.facts(StepsSeen)
    return [step for _, fact in told if fact.worker_id == worker_id for step in fact.steps]


@given(jitter_s=st.floats(1e-4, 0.05), seed=st.integers(0, 1000))
@settings(max_examples=8, deadline=None)
def test_a_busy_gateway_is_told_the_same_later_in_order_and_never_of_the_future(
    jitter_s: float, seed: int
) -> None:
    stage = told_late(jitter_s, seed=seed)
    assert all(step.ended_at <= now for now, fact in stage.facts(StepsSeen) for step in fact.steps)
    assert all(fact.at <= now for now, fact in stage.facts(FirstTokenSeen))
    for name in stage.simulation.replicas:
        ends = [step.ended_at for step in steps_of(stage, name)]
        assert ends == sorted(set(ends))
    steps = (step for name in stage.simulation.replicas for step in steps_of(stage, name))
    tokens = sum(step.count * step.tokens for step in steps)
    # The first token of each leg of an answer is no step; a late worker may be taken for hung.
    legs = sum(1 + seen.moved for seen in stage.seen)
    assert tokens == sum(seen.output_tokens for seen in stage.seen) - legs


def test_a_step_seems_to_begin_when_the_end_of_the_one_before_was_noticed() -> None:
    stage = told_late(0.002)
    steps = steps_of(stage, "w0")
    follow = [
        (before, step)
        for before, step in pairwise(steps)
        if step.seconds and step.ended_at - step.seconds < before.ended_at + 1e-9
    ]
    assert len(follow) > 0.9 * len(steps)
    for before, step in follow:
        assert step.seconds == pytest.approx(step.ended_at - before.ended_at)
    assert {step.count for step in steps} == {1}


def test_what_a_step_gave_is_noticed_together_and_as_late_as_asked_on_average() -> None:
    lateness, late_s = Lateness(0.003, Random(1)), []
    for number in range(4000):
        noticed_at, before_at = lateness.noticed_at("w0", number * 1.0)
        assert lateness.noticed_at("w0", number * 1.0) == (noticed_at, before_at)
        late_s.append(noticed_at - number)
    assert sum(late_s) / len(late_s) == pytest.approx(0.003, rel=0.1)


def test_a_busy_gateway_gives_first_tokens_later() -> None:
    quiet, busy = told_late(0.0), told_late(0.002)
    later_s = [late.ttft_s - soon.ttft_s for soon, late in zip(quiet.seen, busy.seen, strict=True)]
    assert 0.001 < sum(later_s) / len(later_s) < 0.005


@given(
    kind=st.sampled_from(["slow", "hang", "crash", "partition"]),
    at_s=st.floats(0.5, 4.0),
    seed=st.integers(0, 1000),
)
@settings(max_examples=10, deadline=None)
def test_whatever_fails_beside_a_busy_gateway_each_request_ends_once(
    kind: str, at_s: float, seed: int
) -> None:
    fault = Fault(kind=kind, worker="*", at_s=at_s, for_s=0.5)  # type: ignore[arg-type]
    stage = told_late(0.01, fault, seed=seed)
    assert not stage.simulation.flights
    assert not stage.simulation.gateways[0].kernel.requests


def test_a_busy_gateway_is_as_busy_again_with_the_same_seed() -> None:
    assert told_late(0.01).log == told_late(0.01).log


# What is sampled


def test_a_worker_that_is_down_is_not_sampled() -> None:
    stage = Stage(small(Fault(kind="crash", worker="w0", at_s=3.0, for_s=4.0)))
    times: list[float] = []

    def sampled(now: float, worker_id: str, kv_used: float, running: int, waiting: int) -> None:
        if worker_id == "w0":
            times.append(now)

    stage.simulation.recorder.sample = sampled  # type: ignore[method-assign]
    stage.run()
    down_until = 3.0 + 4.0 + SMALL.workers[0].start_up_s
    assert times
    assert not [now for now in times if 3.0 < now < down_until]
