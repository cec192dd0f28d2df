"""Is each trouble named with its numbers, and is nothing named where nothing is wrong?"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.policy.causes import Cause
from paceline.policy.diagnose import CHECKS, COSTLY, diagnose
from paceline.policy.look import Finding, Look, Loss, WorkerLook

STEADY = {"steps": 20.0, "normal_s": 0.4, "best_s": 0.4, "streams": 10}


def worker(name: str = "w0", **of: Any) -> WorkerLook:
    return WorkerLook(id=name, model="m", **STEADY | of)


def loss(cause: Cause, worker: str = "w0", promises: int = 20, gaps: int = 0) -> Loss:
    tiers, tenants = {"premium": promises}, {"acme": promises}
    return Loss("m", worker, cause, promises, gaps, 5.0, tiers, tenants)


def found(*workers: WorkerLook, losses: tuple[Loss, ...] = (), **of: Any) -> list[Finding]:
    fleet = workers or (worker("w0"), worker("w1"), worker("w2"))
    return diagnose(
        Look(now=100.0, window_s=30.0, requests=200, workers=fleet, losses=losses, **of)
    )


def kinds(*workers: WorkerLook, **of: Any) -> list[str]:
    return [finding.kind for finding in found(*workers, **of)]


def test_a_fleet_that_is_well_has_no_findings() -> None:
    assert found() == []


@pytest.mark.parametrize("cause", list(Cause))
def test_few_lost_promises_are_no_trouble(cause: Cause) -> None:
    assert found(losses=(loss(cause, promises=4),)) == []


@pytest.mark.parametrize(
    ("sick", "kind"),
    [
        ({"healthy": False, "because": "connection refused"}, "lost_worker"),
        ({"failed": 5, "failure": "reset"}, "lost_worker"),
        ({"hangs": 4}, "hung_worker"),
        ({"silent_s": 3.0, "hang_s": 1.0}, "hung_worker"),
        ({"slow_s": 0.6, "slowdown": 2.5}, "slow_worker"),
        ({"slow_s": 0.6, "slowdown": 2.5, "foreign": 30}, "foreign_load"),
        ({"slow_s": 0.6, "slowdown": 2.5, "foreign": 30, "hangs": 3}, "foreign_load"),
        ({"silent_s": 3.0, "foreign": 30}, "hung_worker"),
        ({"seen_times": 2.0, "told_times": 1.0}, "slow_link"),
        ({"overhead_s": 0.4}, "slow_link"),
        ({"took_s": 0.8}, "slow_link"),
        ({"took_s": 0.8, "hangs": 3, "silent_s": 2.0}, "slow_link"),
        ({"preemptions": 7, "kv_used": 0.98}, "kv_pressure"),
        ({"preemptions": 1, "kv_used": 0.98, "waiting": 3}, "kv_pressure"),
    ],
)
def test_a_trouble_that_shows_in_a_worker_is_found_before_it_costs_a_promise(
    sick: dict[str, Any], kind: str
) -> None:
    (finding,) = found(worker("w0", **sick), worker("w1"), worker("w2"))
    assert (finding.kind, finding.worker) == (kind, "w0")
    assert finding.hurt.promises_lost == 0
    assert finding.evidence
    assert "w0" in finding.says


@pytest.mark.parametrize(
    ("sick", "says", "first"),
    [
        ({"took_s": 0.998}, "how it is takes 998 ms, 3 ms elsewhere.", "asking_ms"),
        ({"overhead_s": 0.4}, "first tokens take 400 ms beyond", "overhead_ms"),
        ({"seen_times": 2.0, "told_times": 1.0}, "gaps between tokens are 2.0", "gaps_times"),
        ({}, "on their way: that broke 20 promises.", "asking_ms"),
    ],
)
def test_a_slow_link_is_told_by_the_sign_that_shows_it(
    sick: dict[str, Any], says: str, first: str
) -> None:
    near: dict[str, Any] = {"took_s": 0.0027, "overhead_s": 0.009}
    fleet = worker("w0", **near | sick), worker("w1", **near), worker("w2", **near)
    (finding,) = found(*fleet, losses=() if sick else (loss(Cause.LINK),))
    assert says in finding.says
    assert next(iter(finding.evidence)).startswith(first)
    assert len(finding.evidence) == 6


def test_late_gaps_make_few_lost_promises_a_trouble_and_none_lost_never_are() -> None:
    assert found(losses=(loss(Cause.OTHERS_PREFILL, promises=4, gaps=7),)) == []
    assert kinds(losses=(loss(Cause.OTHERS_PREFILL, promises=4, gaps=8),)) == ["prefill_in_decode"]
    assert found(losses=(loss(Cause.OTHERS_PREFILL, promises=0, gaps=90),)) == []


def test_a_worker_that_may_be_far_away_is_not_called_slow_unless_its_engine_says_so() -> None:
    sick: dict[str, Any] = {"slow_s": 0.6, "slowdown": 2.5, "took_worst_s": 1.2}
    assert kinds(worker("w0", **sick), worker("w1"), worker("w2")) == []
    told = sick | {"told_times": 2.0, "seen_times": 2.0}
    assert kinds(worker("w0", **told), worker("w1"), worker("w2")) == ["slow_worker"]


def test_a_worker_of_an_older_kind_is_slow_only_if_that_costs_promises() -> None:
    old = worker("w0", normal_s=0.2, slow_s=0.2, best_s=0.4)
    assert kinds(old, worker("w1")) == []
    assert kinds(old, worker("w1"), losses=(loss(Cause.SLOW_WORKER),)) == ["slow_worker"]


def test_an_engine_that_was_not_late_itself_is_not_slow() -> None:
    sick: dict[str, Any] = {"slow_s": 0.6, "slowdown": 2.5}
    assert kinds(worker(**sick, told_times=2.0, seen_times=2.0)) == ["slow_worker"]
    assert kinds(worker(**sick, told_times=1.0, seen_times=1.0)) == []  # until its next report


def test_what_was_seen_of_a_worker_long_ago_is_not_held_against_it() -> None:
    assert kinds(worker(slow_s=0.6, slowdown=2.5, stepped_s=300.0)) == []
    assert kinds(worker(slow_s=0.6, slowdown=2.5, steps=0.0)) == []


@pytest.mark.parametrize("trouble", COSTLY, ids=lambda trouble: str(trouble.kind))
def test_each_cause_that_costs_promises_is_named(trouble: Any) -> None:
    for cause in trouble.causes:
        (finding,) = found(losses=(loss(cause, "w0"), loss(cause, "w1"), loss(cause, "w2")))
        assert (finding.kind, finding.worker) == (trouble.kind, "")
        assert finding.hurt.promises_lost == 60
        assert finding.hurt.tenants == {"acme": 60}
        assert "60 promises" in finding.says


def test_losses_of_one_worker_among_several_are_its_affair() -> None:
    losses = (loss(Cause.OTHERS_PREFILL, "w1", 30), loss(Cause.OTHERS_PREFILL, "w2", 4))
    (finding,) = found(losses=losses)
    assert (finding.worker, finding.hurt.promises_lost) == ("w1", 30)


def test_the_trouble_that_costs_most_promises_comes_first() -> None:
    losses = (
        loss(Cause.OTHERS_PREFILL, promises=10),
        loss(Cause.OWN_PREFILL, promises=30),
        loss(Cause.LINK, promises=20),
    )
    assert kinds(losses=losses) == ["long_prompts", "slow_link", "prefill_in_decode"]


def test_a_full_fleet_is_named_after_the_broken_worker_that_made_it_so() -> None:
    losses = (loss(Cause.GATEWAY_QUEUE, "", 90), loss(Cause.HANG, "w0", 5))
    assert kinds(worker("w0", hangs=5), worker("w1"), losses=losses) == [
        "hung_worker",
        "fleet_full",
    ]


def test_while_a_long_line_waits_prompts_that_crowd_engines_are_part_of_it() -> None:
    losses = tuple(loss(Cause.OTHERS_PREFILL, w, 10) for w in ("w0", "w1", "w2"))
    assert kinds(losses=losses, waiting={"m": 4}) == ["prefill_in_decode"]
    (full,) = found(losses=(*losses, loss(Cause.GATEWAY_QUEUE, "", 2)), waiting={"m": 40})
    assert (full.kind, full.hurt.promises_lost) == ("fleet_full", 32)


def test_a_slow_worker_explains_the_long_prefills_on_it_and_no_others() -> None:
    slow = worker("w0", slow_s=0.6, slowdown=2.5)
    losses = loss(Cause.OTHERS_PREFILL, "w0", 6), loss(Cause.OTHERS_PREFILL, "w1", 9)
    first, second = found(slow, worker("w1"), worker("w2"), losses=losses)
    assert (first.kind, first.worker) == ("prefill_in_decode", "w1")
    assert (second.kind, second.hurt.promises_lost) == ("slow_worker", 6)


def test_waiting_in_an_engine_whose_cache_is_full_is_kv_pressure() -> None:
    full = worker("w0", preemptions=9, kv_used=0.99, waiting=12)
    assert kinds(full, worker("w1"), losses=(loss(Cause.ENGINE_QUEUE),)) == ["kv_pressure"]


def test_a_cache_that_no_longer_finds_what_it_used_to_find_thrashes() -> None:
    thrashing = worker(queries=50_000, hits=5_000, usual_hits=0.7, kv_used=0.97)
    losses = (loss(Cause.OWN_PREFILL),)
    assert "cache_thrash" in kinds(thrashing, losses=losses)
    assert "cache_thrash" not in kinds(worker(queries=50_000, hits=40_000, usual_hits=0.7))


def test_a_starved_prefill_pool_is_named() -> None:
    prefill = [worker(f"p{i}", role="prefill", ahead=40_000.0, budget=8192.0) for i in range(2)]
    decode = [worker(f"d{i}", role="decode", budget=8192.0) for i in range(2)]
    losses = (loss(Cause.OTHERS_PREFILL, "p0"), loss(Cause.GATEWAY_QUEUE, ""))
    (finding,) = found(*prefill, *decode, losses=losses)
    assert finding.kind == "phase_imbalance"
    assert "for prefill" in finding.says
    assert finding.hurt.promises_lost == 40


def test_a_prefill_pool_whose_backlog_is_gone_was_starved_all_the_same() -> None:
    fleet = worker("p0", role="prefill"), worker("d0", role="decode")
    losses = (loss(Cause.OTHERS_PREFILL, "p0"), loss(Cause.OTHERS_PREFILL, "d0"))
    assert kinds(*fleet, losses=losses) == ["phase_imbalance"]


def test_prompts_among_the_decodes_of_a_decode_worker_are_no_want_of_prefill() -> None:
    fleet = worker("p0", role="prefill"), worker("d0", role="decode")
    losses = (loss(Cause.OTHERS_PREFILL, "d0"), loss(Cause.OWN_PREFILL, "p0"))
    assert kinds(*fleet, losses=losses) == ["prefill_in_decode", "long_prompts"]


def test_a_lost_promise_counts_for_one_finding_only() -> None:
    fleet = worker("w0", streams=60), worker("w1", streams=5), worker("w2", streams=6)
    losses = tuple(loss(cause, w) for cause in Cause for w in ("w0", "w1"))
    findings = found(*fleet, losses=losses)
    assert len(findings) > 5
    assert sum(f.hurt.promises_lost for f in findings) <= sum(x.promises for x in losses)


def test_a_worker_with_far_more_to_do_than_its_like_is_named() -> None:
    fleet = worker("w0", streams=60), worker("w1", streams=5), worker("w2", streams=6)
    assert "unbalanced_routing" in kinds(*fleet, losses=(loss(Cause.BATCH),))


def test_a_gateway_that_is_late_itself_is_named() -> None:
    assert kinds(lag_share=0.3, worst_lag_s=0.4) == ["gateway_saturated"]
    assert kinds(losses=(loss(Cause.GATEWAY),)) == ["gateway_saturated"]


def test_a_tenant_over_its_limits_is_named() -> None:
    (finding,) = found(refusals={"acme": 40, "small": 1})
    assert (finding.kind, finding.tenant) == ("quota", "acme")


losses = st.builds(
    Loss,
    st.just("m"),
    st.sampled_from(["", "w0", "w1"]),
    st.sampled_from(list(Cause)),
    st.integers(0, 100),
    st.integers(0, 100),
    st.floats(0, 100),
)
lookers = st.builds(
    WorkerLook,
    id=st.sampled_from(["w0", "w1"]),
    model=st.just("m"),
    role=st.sampled_from(["both", "prefill", "decode"]),
    healthy=st.booleans(),
    hangs=st.integers(0, 3),
    failed=st.integers(0, 9),
    streams=st.integers(0, 99),
    steps=st.floats(0, 50),
    normal_s=st.floats(0, 9),
    slow_s=st.floats(0, 9),
    best_s=st.floats(0, 9),
    slowdown=st.floats(0.1, 9),
    told_times=st.floats(0, 3),
    seen_times=st.floats(0, 3),
    foreign=st.integers(0, 99),
    kv_used=st.floats(0, 1),
    queries=st.floats(0, 1e6),
    hits=st.floats(0, 1e6),
)


@given(st.lists(lookers, max_size=3, unique_by=lambda w: w.id), st.lists(losses, max_size=9))
def test_whatever_is_seen_can_be_judged_and_every_finding_says_what_to_do(
    workers: list[WorkerLook], lost: list[Loss]
) -> None:
    assert CHECKS
    for finding in found(*workers, losses=tuple(lost)):
        assert finding.says.endswith(".")
        assert finding.remedy.endswith(".")
        assert finding.since >= 0.0
