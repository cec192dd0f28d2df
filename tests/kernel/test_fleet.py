"""Kernel and engine models on a virtual clock: policies compared, logs replayed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import log
from typing import Any

import pytest
from msgspec.structs import replace
from stage import Stage, ask

from paceline.domain.commands import Dispatch
from paceline.kernel.log import line, opening, replay
from paceline.policy.baselines import KvCost
from paceline.policy.fleet import Choice, Fleet
from paceline.policy.route import POLICIES
from paceline.policy.standing import Ask
from paceline.simulator.scenario import Fault, Requests, Scenario, SimTier, Workers

H100, A100 = "h100-llama-8b", "a100-llama-8b"
THROTTLED = Fault(kind="slow", worker="w0", at_s=10.0, for_s=10.0, factor=3.0)


def scenario(rate: float, seconds: float, *faults: Fault, fast: int = 4, slow: int = 0) -> Scenario:
    """Requests of all lengths on so many H100s and, after them, A100s."""
    workers = [Workers(profile=H100, count=fast)]
    if slow:
        workers.append(Workers(profile=A100, count=slow, name="old"))
    return Scenario(
        about="A fleet.",
        seconds=seconds,
        workers=tuple(workers),
        tiers={"t": SimTier(ttft_s=0.5, itl_s=0.02)},
        requests=(Requests(rate=rate, prompt=(800, 5000), output=(150, 600)),),
        faults=faults,
    )


def played(plan: Scenario, policy: str = "headroom", seed: int = 1, **fields: Any) -> Stage:
    stage = Stage(plan, policy, seed, **fields)
    stage.run()
    return stage


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_serves_every_request(policy: str) -> None:
    stage = played(scenario(20, 5, fast=3), policy)
    assert all(s.status == "ok" and s.itl_s < 10 for s in stage.seen)
    assert {s.worker for s in stage.seen} == {"w0", "w1", "w2"}
    assert not stage.simulation.gateways[0].kernel.requests


def test_a_recorded_log_gives_the_same_commands_to_a_fresh_kernel() -> None:
    throttled = Fault(kind="slow", worker="w0", at_s=2.0, for_s=2.0)
    stage = played(scenario(20, 6, throttled, fast=1, slow=1), seed=2)
    lines = [opening(stage.simulation.gateways[0].kernel.settings)]
    lines += [line(now, fact, commands) for now, fact, commands in stage.log]
    count = 0
    for entry, commands in replay(lines):
        assert list(entry.commands) == commands
        count += bool(commands)
    assert count > 100


def test_a_throttled_worker_loses_work_while_it_is_slow_and_gets_it_back() -> None:
    stage = played(scenario(40, 40, THROTTLED), seed=3)

    def share(since: float, until: float) -> float:
        then = [s for s in stage.seen if since <= s.at_s < until]
        return sum(s.worker == "w0" for s in then) / len(then)

    assert share(0, 10) > 0.15
    assert share(11, 20) < 0.12
    assert share(28, 40) > 0.15


def test_a_policy_that_predicts_nothing_is_asked_of_each_request_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: Counter[str] = Counter()

    class Noting(KvCost):
        def __call__(self, fleet: Fleet, ask: Ask, places: Sequence[int]) -> Choice:
            asked[ask.request_id] += 1
            return super().__call__(fleet, ask, places)

    monkeypatch.setitem(POLICIES, "noting", Noting)
    stage = played(scenario(60, 20, replace(THROTTLED, factor=6.0)), "noting")
    assert set(asked.values()) == {1}
    assert len(asked) == len(stage.seen)


def test_headroom_keeps_more_promises_than_counting_requests_when_a_worker_is_throttled() -> None:
    kept = {
        policy: sum(s.kept for s in played(scenario(60, 30, THROTTLED), policy, seed=4).seen)
        for policy in ("headroom", "least-requests", "round-robin")
    }
    assert kept["headroom"] > kept["least-requests"] > kept["round-robin"]


def test_a_promise_that_no_worker_can_keep_keeps_nobody_waiting() -> None:
    plan = replace(scenario(20, 20, fast=2), tiers={"t": SimTier(ttft_s=0.5, itl_s=0.002)})
    seen = [s for s in played(plan).seen if s.at_s > 13.0]  # 512 steps, and who waited for them
    assert not any(s.kept for s in seen)
    assert sum(s.ttft_s < 0.5 for s in seen) > 0.9 * len(seen)


def test_unequal_workers_get_work_by_what_they_can_do() -> None:
    stage = played(scenario(30, 20, fast=2, slow=1), seed=5)
    by_worker = Counter(s.worker for s in stage.seen)
    assert by_worker["old0"] < 0.6 * by_worker["w0"]


def test_long_prompts_do_not_break_the_promises_of_chat() -> None:
    tiers = {"t": SimTier(ttft_s=1.0, itl_s=0.012), "documents": SimTier(ttft_s=5.0)}
    chat = [ask(0.01 * i, 200, 600) for i in range(20)]
    long = [replace(ask(2.0 + i, 7000, 20), tier="documents") for i in range(3)]
    stage = played(replace(scenario(1, 10, fast=2), tiers=tiers), requests=[*chat, *long])
    assert len(stage.seen) == 23
    assert all(s.kept for s in stage.seen)


def test_predictions_are_right_once_a_fleet_is_known() -> None:
    stage = played(scenario(25, 30, fast=2), seed=6)
    expected = [command.predicted for _, command in stage.commands(Dispatch)]
    pairs = [
        (prediction.itl_s, seen.itl_s)
        for prediction, seen in zip(expected, stage.seen, strict=True)
        if 5 < seen.at_s < 20 and seen.output_tokens > 50
    ]
    errors = sorted(log(outcome / predicted) for predicted, outcome in pairs)
    assert len(errors) > 200
    assert abs(errors[len(errors) // 2]) < 0.15
    assert sorted(map(abs, errors))[len(errors) // 2] < 0.2
