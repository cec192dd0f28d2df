"""Do steps that pass as one event look to clients like single ones?"""

from __future__ import annotations

from math import ceil, inf
from statistics import mean
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from stage import STEP_S, TINY, Stage, ask, seen_by_clients, small

from paceline.domain.facts import StepsSeen, StreamEnded
from paceline.enginemodel import Generation, Scheduler
from paceline.kernel import watch
from paceline.simulator import replica
from paceline.simulator.gaps import Gaps
from paceline.simulator.scenario import Fault, Requests, Scenario
from paceline.simulator.seen import Seen

LONG = (Requests(rate=12.0, prompt=(60, 1500), output=(150, 900)),)
"""Answers of many steps, and requests that come while they run."""


def seen_in(scenario: Scenario, seed: int, **kind: Any) -> list[Seen]:
    """Where requests go and stay does not depend on what is learned of steps."""
    stage = Stage(scenario, "round-robin", seed, **kind)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watch, "LEAST_HANG_S", inf)
        patch.setattr(watch, "SLOW", inf)
        stage.run()
    return stage.seen


def seen_step_by_step(scenario: Scenario, seed: int, **kind: Any) -> list[Seen]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replica, "MOST_STEPS", 1)
        return seen_in(scenario, seed, **kind)


@given(st.lists(st.tuples(st.integers(1, 5), st.floats(0.0, 9.0))), st.integers(0, 40))
def test_the_longest_gap_since_a_step_is_the_longest_of_all_gaps_since_then(
    added: list[tuple[int, float]], since: int
) -> None:
    gaps, step, each = Gaps(), 0, []
    for steps, gap_s in added:
        step += steps
        gaps.add(step, gap_s)
        each.append((step, gap_s))
    assert gaps.longest_s(since) == max((gap_s for last, gap_s in each if last > since), default=0)


@st.composite
def faults(draw: st.DrawFn) -> Fault:
    return Fault(
        kind=draw(st.sampled_from(["slow", "hang"])),
        worker=draw(st.sampled_from(["w0", "w1", "*"])),
        at_s=draw(st.floats(0.1, 4.0)),
        for_s=draw(st.floats(0.05, 2.0)),
        factor=draw(st.floats(0.5, 4.0)),
    )


@settings(max_examples=10, deadline=None)
@given(st.lists(faults(), max_size=3), st.integers(0, 1000))
def test_many_steps_at_once_are_to_clients_like_one_after_the_other(
    troubles: list[Fault], seed: int
) -> None:
    scenario = small(*troubles, seconds=4.0, requests=LONG)
    together, apart = seen_in(scenario, seed), seen_step_by_step(scenario, seed)
    for quick, true in zip(together, apart, strict=True):
        assert (quick.worker, quick.status) == (true.worker, true.status)
        assert quick.ttft_s == pytest.approx(true.ttft_s, abs=1e-6)
        assert quick.itl_s == pytest.approx(true.itl_s, abs=1e-9)
        assert quick.stall_s == pytest.approx(true.stall_s, abs=1e-9)


def test_a_hiccup_of_one_step_is_seen_once_however_often_its_run_is_cut() -> None:
    shaky = replace(TINY, hiccup_share=0.001, noise_sigma=0.05)
    answers = [ask(1.0 * i, 20, 400) for i in range(60)]
    cutting = [ask(0.02 * i, 20, 1) for i in range(3000)]
    requests = sorted(answers + cutting, key=lambda arrival: arrival.at_s)
    play = {"requests": requests, "profiles": lambda _: shaky}
    together, apart = (
        [s for s in look(small(count=1), 1, **play) if s.output_tokens > 1]
        for look in (seen_in, seen_step_by_step)
    )

    def hiccups(seen: list[Seen]) -> float:
        return mean(s.stall_s > 1.8 * s.itl_s for s in seen)

    assert 0.2 < hiccups(apart) < 0.5
    assert hiccups(together) == pytest.approx(hiccups(apart), abs=0.15)
    assert mean(s.itl_s for s in together) == pytest.approx(mean(s.itl_s for s in apart), rel=0.02)


def test_the_gateway_sees_each_token_of_each_stream() -> None:
    stage = Stage(small(requests=LONG), seed=2)
    stage.run()
    steps = [step for _, fact in stage.facts(StepsSeen) for step in fact.steps]
    answers = [fact.output_tokens for _, fact in stage.facts(StreamEnded)]
    assert sum(s.count * s.streams for s in steps) == sum(answers) - len(answers)
    assert any(s.count > 50 for s in steps)
    assert all(s.seconds * s.count <= s.ended_at + 1e-9 for s in steps)


def test_a_stream_that_lost_its_place_to_others_sees_the_wait_as_a_stall() -> None:
    crowd = [ask(0.01 * i, prompt=1200, output=900) for i in range(14)]
    stage = Stage(small(count=1), requests=crowd)
    result = stage.run()
    assert result.preemptions > 0
    assert {s.status for s in stage.seen} == {"ok"}
    assert max(s.stall_s for s in stage.seen) > 50 * STEP_S
    assert stage.simulation.replicas["w0"].streams == [0]


@settings(max_examples=10, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 1), st.integers(200, 3000), st.integers(1, 1000)), max_size=30)
)
def test_under_pressure_for_room_the_same_holds(wishes: list[tuple[float, int, int]]) -> None:
    requests = [ask(at_s, prompt, output) for at_s, prompt, output in sorted(wishes)]
    scenario = small(count=1)
    together = seen_in(scenario, 1, requests=requests)
    apart = seen_step_by_step(scenario, 1, requests=requests)
    for quick, true in zip(together, apart, strict=True):
        assert quick.status == true.status == "ok"
        assert quick.itl_s == pytest.approx(true.itl_s, abs=1e-9)
        assert quick.stall_s == pytest.approx(true.stall_s, abs=1e-9)


@given(st.integers(1, 63), st.integers(1, 40))
def test_a_run_that_passes_in_parts_takes_and_gives_back_the_same_blocks(
    part: int, prompt: int
) -> None:
    scheduler = Scheduler(TINY)
    scheduler.add(Generation("r", prompt, 65))
    scheduler.complete(scheduler.plan())  # type: ignore[arg-type]
    run = scheduler.plan(64)
    assert run is not None
    scheduler.complete(run, part)
    assert scheduler.pool.used == ceil((prompt + part) / TINY.block_size)
    assert scheduler.complete(run.after(part)).finished == ["r"]
    assert scheduler.pool.used == 0


def test_an_answer_of_one_token_has_no_gaps() -> None:
    (seen,) = seen_by_clients(ask(output=1))
    assert (seen.status, seen.itl_s, seen.stall_s) == ("ok", 0.0, 0.0)
    assert seen.seconds == seen.ttft_s > 0


def test_what_no_engine_could_finish_fails_and_troubles_nobody() -> None:
    too_long, fine = seen_by_clients(ask(prompt=4000, output=500), ask(0.1))
    assert (too_long.status, fine.status) == ("failed", "ok")
