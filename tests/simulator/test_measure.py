"""What does a run's result say of the requests that it saw?"""

from __future__ import annotations

from math import inf
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.simulator.measure import SLOTS, Recorder
from paceline.simulator.result import Result
from paceline.simulator.scenario import Requests, Scenario, SimTier, Workers
from paceline.simulator.seen import Seen

SCENARIO = Scenario(
    about="Is everything counted?",
    seconds=130,
    warmup_s=10,
    workers=(Workers(profile="tiny", count=2),),
    tiers={
        "premium": SimTier(ttft_s=0.5, itl_s=0.04, stall_s=1.0, weight=3),
        "standard": SimTier(ttft_s=2.0),
        "batch": SimTier(deadline_s=60.0),
    },
    requests=(Requests(rate=1.0),),
)


def seen(**changes: Any) -> Seen:
    good: dict[str, Any] = {
        "at_s": 20.0,
        "tier": "premium",
        "tenant": "acme",
        "model": "m",
        "worker": "w0",
        "prompt_tokens": 100,
        "output_tokens": 50,
        "status": "ok",
        "ttft_s": 0.2,
        "itl_s": 0.02,
        "stall_s": 0.1,
    }
    told = good | changes
    promise = SCENARIO.tiers[told["tier"]].promise
    kept = (
        told["status"] == "ok"
        and told.get("seconds", 0.0) <= 60.0
        and promise.kept(told["ttft_s"], told["itl_s"], told["stall_s"])
    )
    return Seen(kept=kept, **told)


def result(*requests: Seen) -> Result:
    recorder = Recorder(SCENARIO)
    for request in requests:
        recorder.add(request)
    return recorder.result("all", "headroom", 0)


NEVER_BEGAN = {"ttft_s": inf, "itl_s": 0.0, "stall_s": 0.0, "output_tokens": 0, "worker": ""}


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"ttft_s": 0.6, "itl_s": 0.1}, "ttft"),
        ({"itl_s": 0.05, "stall_s": 2.0}, "itl"),
        ({"stall_s": 2.0}, "stall"),
        ({"tier": "batch", "ttft_s": 50.0, "seconds": 61.0}, "deadline"),
        ({"status": "shed", **NEVER_BEGAN}, "shed"),
        ({"status": "failed", **NEVER_BEGAN}, "failed"),
        ({"status": "broke"}, "failed"),
        ({"status": "unfinished"}, "unfinished"),
    ],
)
def test_a_broken_promise_has_its_first_cause(changes: dict[str, Any], cause: str) -> None:
    total = result(seen(), seen(**changes)).total
    assert total.missed == {cause: 1}
    assert (total.requests, total.kept, total.attainment) == (2, 1, 0.5)


def test_attainment_is_told_by_tier_and_tenant_and_weighted() -> None:
    played = result(
        seen(),
        seen(tier="standard", tenant="zeta", ttft_s=3.0),
        seen(tier="standard", ttft_s=1.0),
    )
    assert {name: tier.attainment for name, tier in played.tiers.items()} == {
        "premium": 1.0,
        "standard": 0.5,
    }
    assert {n: t.attainment for n, t in played.tenants.items()} == {"acme": 1.0, "zeta": 0.0}
    assert played.attainment == pytest.approx(2 / 3)
    assert played.weighted_attainment == pytest.approx(4 / 5)


def test_requests_of_the_warm_up_are_not_counted() -> None:
    played = result(seen(at_s=9.9), seen(at_s=10.0))
    assert played.total.requests == 1
    assert played.seconds == 120


def test_only_kept_promises_make_goodput() -> None:
    played = result(seen(), seen(), seen(ttft_s=0.9), seen(status="shed", **NEVER_BEGAN))
    assert played.goodput_requests_per_s == pytest.approx(2 / 120)
    assert played.goodput_tokens_per_s == pytest.approx(100 / 120)
    assert (played.total.output_tokens, played.total.kept_tokens) == (150, 100)


def test_what_was_done_to_requests_is_told_by_tier() -> None:
    played = result(
        seen(degraded=True),
        seen(tier="standard", paused=2, moved=1),
        seen(tier="standard", moved=3),
    )
    told = {name: (t.degraded, t.paused, t.moved) for name, t in played.tiers.items()}
    assert told == {"premium": (1, 0, 0), "standard": (0, 2, 4)}
    assert (played.total.degraded, played.total.paused, played.total.moved) == (1, 2, 4)


def test_cost_is_told_per_million_tokens_and_per_million_that_kept_their_promise() -> None:
    recorder = Recorder(SCENARIO)
    for request in (seen(output_tokens=600), seen(output_tokens=400, ttft_s=9.0)):
        recorder.add(request)
    recorder.cost(2.0)
    recorder.cost(1.0)
    played = recorder.result("cost", "headroom", 0)
    assert played.cost_per_million_tokens == pytest.approx(3000)
    assert played.cost_per_million_kept_tokens == pytest.approx(5000)


def test_the_kv_cache_is_measured_while_requests_are_counted() -> None:
    recorder = Recorder(SCENARIO)
    recorder.sample(5.0, "w0", 1.0, 9, 9)  # Still warming up.
    recorder.sample(131.0, "w0", 0.0, 0, 0)  # Nothing arrives any more.
    for number in range(100):
        recorder.sample(20.0 + number, "w0", number / 100, 4, 2)
        recorder.sample(20.0 + number, "w1", 0.0, 2, 0)
    recorder.preempted(3)
    recorder.preempted(4)
    played = recorder.result("kv", "headroom", 0)
    assert played.kv_mean == pytest.approx(0.2475)
    assert played.kv_p99 == 0.97
    assert played.workers["w0"].kv_mean == pytest.approx(0.495)
    assert (played.workers["w0"].running_mean, played.workers["w0"].waiting_mean) == (4, 2)
    assert played.preemptions == 7


def test_workers_are_told_apart_and_in_order() -> None:
    requests = [seen(worker=f"w{i}", ttft_s=0.1 if i % 2 else 0.9) for i in range(12)]
    played = result(*requests, seen(status="shed", **NEVER_BEGAN))
    assert list(played.workers) == [f"w{i}" for i in range(12)]
    assert [played.workers[f"w{i}"].attainment for i in (2, 3)] == [0.0, 1.0]


def test_the_series_follows_time() -> None:
    late = [seen(at_s=70.0, ttft_s=0.9, itl_s=0.03)] * 3
    series = result(*late, seen(at_s=70.0), seen(at_s=10.0), seen(at_s=500.0)).series
    assert (series.from_s, series.slot_s, len(series.arrivals)) == (10, 2, SLOTS)
    assert series.arrivals[30] == 4
    assert series.attainment[30] == 0.25
    assert series.ttft_p99_s[30] == pytest.approx(0.9, rel=0.023)
    assert series.itl_mean_s[30] == pytest.approx(0.0275)
    assert series.attainment[1] is None
    assert series.arrivals[-1] == 1, "a late turn belongs to the last slot"


@given(st.lists(st.floats(1e-4, 100.0), min_size=1, max_size=200))
def test_quantiles_are_within_a_bucket_of_the_truth(times_s: list[float]) -> None:
    ttft = result(*(seen(ttft_s=s) for s in times_s)).total.ttft_s
    ranked = sorted(times_s)
    assert ttft.p50 == pytest.approx(ranked[(len(ranked) + 1) // 2 - 1], rel=0.025)
    assert ttft.mean == pytest.approx(sum(times_s) / len(times_s))
    assert list(ttft.curve) == sorted(ttft.curve)


@given(st.integers(0, 60))
def test_every_request_is_counted_once(n: int) -> None:
    statuses = ["ok", "shed", "failed", "broke", "unfinished"]
    requests = [
        seen(status=statuses[i % 5], tier=("premium", "standard")[i % 2], tenant=f"t{i % 3}")
        for i in range(n)
    ]
    played = result(*requests)
    assert played.total.requests == sum(played.total.statuses.values()) == n
    assert sum(played.total.missed.values()) == n - played.total.kept
    for parts in (played.tiers, played.tenants):
        assert sum(part.requests for part in parts.values()) == n
        assert sum(part.kept for part in parts.values()) == played.total.kept


def test_nothing_seen_is_no_error_and_the_result_is_json() -> None:
    for played in (result(), result(seen(status="failed", **NEVER_BEGAN), seen())):
        text = msgspec.json.encode(played)
        assert b"Infinity" not in text
        assert b"inf" not in text
        assert msgspec.json.decode(text, type=Result) == played
    assert result().total.ttft_s.p99 is None
    assert result().cost_per_million_tokens is None


def test_memory_does_not_grow_with_the_requests() -> None:
    few = len(msgspec.json.encode(result(*(seen(ttft_s=0.001 * i) for i in range(1, 300)))))
    many = len(msgspec.json.encode(result(*(seen(ttft_s=0.0001 * i) for i in range(1, 3000)))))
    assert many < 1.2 * few
