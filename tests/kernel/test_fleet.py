"""Kernel and engine models on a virtual clock: policies compared, logs replayed."""

from __future__ import annotations

from collections import Counter
from math import log

import pytest
from virtual_fleet import Job, VirtualFleet, attainment, poisson

from paceline.domain.commands import Dispatch
from paceline.domain.promise import Promise
from paceline.kernel.log import line, opening, replay
from paceline.policy.route import POLICIES

PROMISE = Promise(ttft_s=0.5, itl_s=0.02)
H100 = "h100-llama-8b"


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_serves_every_request(policy: str) -> None:
    fleet = VirtualFleet([H100] * 3, policy)
    told = fleet.run(poisson(20, 5, 1, PROMISE))
    assert all(t.itl_s < 10 for t in told)
    assert set(Counter(t.worker for t in told)) == {"w0", "w1", "w2"}
    assert not fleet.kernel.requests


def test_a_recorded_log_gives_the_same_commands_to_a_fresh_kernel() -> None:
    fleet = VirtualFleet([H100, "a100-llama-8b"], "headroom")
    fleet.slow("w0", 3.0, 2.0, 4.0)
    fleet.run(poisson(20, 6, 2, PROMISE))
    lines = [opening(fleet.kernel.settings)]
    lines += [line(now, fact, commands) for now, fact, commands in fleet.log]
    count = 0
    for entry, commands in replay(lines):
        assert list(entry.commands) == commands
        count += bool(commands)
    assert count > 100


def test_a_throttled_worker_loses_work_while_it_is_slow_and_gets_it_back() -> None:
    fleet = VirtualFleet([H100] * 4, "headroom")
    fleet.slow("w0", 3.0, 10, 20)
    told = fleet.run(poisson(40, 40, 3, PROMISE))

    def share(since: float, until: float) -> float:
        then = [t for t in told if since <= t.job.at < until]
        return sum(t.worker == "w0" for t in then) / len(then)

    assert share(0, 10) > 0.15
    assert share(11, 20) < 0.12
    assert share(28, 40) > 0.15


def test_headroom_keeps_more_promises_than_counting_requests_when_a_worker_is_throttled() -> None:
    kept = {}
    for policy in ("headroom", "least-requests", "round-robin"):
        fleet = VirtualFleet([H100] * 4, policy, seed=1)
        fleet.slow("w0", 3.0, 10, 20)
        kept[policy] = attainment(fleet.run(poisson(60, 30, 4, PROMISE)))
    assert kept["headroom"] > kept["least-requests"] > kept["round-robin"]


def test_unequal_workers_get_work_by_what_they_can_do() -> None:
    fleet = VirtualFleet([H100, H100, "a100-llama-8b"], "headroom")
    told = fleet.run(poisson(30, 20, 5, PROMISE))
    by_worker = Counter(t.worker for t in told)
    assert by_worker["w2"] < 0.6 * by_worker["w0"]


def test_long_prompts_do_not_break_the_promises_of_chat() -> None:
    fleet = VirtualFleet([H100] * 2, "headroom")
    chat = [Job(0.01 * i, 200, 600, Promise(1.0, 0.012)) for i in range(20)]
    told = fleet.run([*chat, *(Job(2.0 + i, 7000, 20, Promise(5.0)) for i in range(3))])
    assert attainment(told) == 1.0


def test_predictions_are_right_once_a_fleet_is_known() -> None:
    fleet = VirtualFleet([H100] * 2, "headroom")
    told = fleet.run(poisson(25, 30, 6, PROMISE))
    expected = [c.predicted for _, _, cs in fleet.log for c in cs if isinstance(c, Dispatch)]
    pairs = [
        (prediction.itl_s, seen.itl_s)
        for prediction, seen in zip(expected, told, strict=True)
        if 5 < seen.job.at < 20 and seen.job.output > 50 and prediction is not None
    ]
    errors = sorted(log(outcome / predicted) for predicted, outcome in pairs)
    assert abs(errors[len(errors) // 2]) < 0.15
    assert sorted(map(abs, errors))[len(errors) // 2] < 0.2
