"""Does a run of steps that is told in one teach what the single steps would have taught?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec
import pytest
from stage import Stage, ask, small

from paceline.domain.facts import Fact, FirstTokenSeen, RequestArrived, Step, StepsSeen, TimerFired
from paceline.enginemodel import PROFILES
from paceline.kernel import Kernel, Settings
from paceline.kernel.worker import WorkerState
from paceline.simulator import replica
from paceline.simulator.scenario import Fault, Requests
from paceline.workload.traces import Arrival

Told = list[tuple[float, Fact]]

POLICY = "round-robin"
LOADS = ((1, 0, 500), (4, 0, 3_000), (16, 0, 12_000), (16, 400, 12_000))
"""Streams, prompt tokens and context."""
SHAKY = msgspec.structs.replace(PROFILES["tiny"], noise_sigma=0.05, hiccup_share=0.001)


def told_one_by_one(
    *faults: Fault, requests: Sequence[Arrival] | None = None, seed: int = 1
) -> Told:
    """All that a kernel hears of one worker, each step on its own.

    By a policy that lets nobody wait: whoever reads it again sends what was sent, when it was sent.
    """
    busy = (Requests(rate=12.0, prompt=(60, 1500), output=(100, 500)),)
    scenario = small(*faults, count=1, requests=busy)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replica, "MOST_STEPS", 1)
        stage = Stage(scenario, POLICY, seed, requests, profiles=lambda _: SHAKY)
        stage.run()
    return [(now, fact) for now, fact, _ in stage.log if not isinstance(fact, TimerFired)]


def in_runs(told: Told) -> Iterator[tuple[float, Fact]]:
    """The same, with steps that were alike told in one."""
    run: list[Step] = []
    for now, fact in told:
        step = fact.steps[0] if isinstance(fact, StepsSeen) else None
        if run and (step is None or not alike(step, run[-1])):
            yield run[-1].ended_at, as_one(run)
            run = []
        if step is None:
            yield now, fact
        elif step.streams and step.seconds:
            run.append(step)
        else:
            yield now, fact
    if run:
        yield run[-1].ended_at, as_one(run)


def alike(step: Step, before: Step) -> bool:
    """Of the same streams, and none of them longer than the others by a chunk of a prompt."""
    return step.streams == before.streams and 0.7 < step.seconds / before.seconds < 1.4


def as_one(run: Sequence[Step]) -> StepsSeen:
    last, seconds = run[-1], sum(step.seconds for step in run) / len(run)
    return StepsSeen("w0", [msgspec.structs.replace(last, seconds=seconds, count=len(run))])


def taught(told: Sequence[tuple[float, Fact]]) -> WorkerState:
    """What a fresh kernel knows of the worker after all of it."""
    kernel = Kernel(Settings(policy=POLICY))
    for now, fact in told:
        kernel.handle(fact, now)
    return kernel.workers["w0"]


def compare(told: Told, within: float) -> None:
    runs = list(in_runs(told))
    assert len(runs) < 0.5 * len(told)
    single, one = taught(told), taught(runs)
    assert one.windows.budget == single.windows.budget
    assert one.ledger.kv == pytest.approx(single.ledger.kv)
    for streams, prefill, kv in LOADS:
        expected = single.timing.model().step_s(streams, prefill, kv)
        assert one.timing.model().step_s(streams, prefill, kv) == pytest.approx(
            expected, rel=within
        )


@pytest.mark.parametrize("seed", range(3))
def test_runs_of_steps_teach_what_single_steps_do(seed: int) -> None:
    compare(told_one_by_one(seed=seed), within=0.1)


def test_also_while_prompts_wait_for_room_in_the_engine() -> None:
    crowd = [ask(0.02 * i, prompt=1000 + 10 * i, output=400 + 30 * i) for i in range(40)]
    told = told_one_by_one(requests=crowd)
    waiting, longest = 0, 0
    for _, fact in in_runs(told):
        waiting += isinstance(fact, RequestArrived) - isinstance(fact, FirstTokenSeen)
        if waiting and isinstance(fact, StepsSeen):
            longest = max(longest, fact.steps[0].count)
    assert longest > 20
    compare(told, within=0.06)


def test_a_run_in_which_the_context_grows_a_lot_counts_with_its_mean() -> None:
    told = told_one_by_one(requests=[ask(0.1, 100, 2000)])
    assert max(f.steps[0].count for _, f in in_runs(told) if isinstance(f, StepsSeen)) > 500
    compare(told, within=0.06)
