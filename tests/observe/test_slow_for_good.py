"""Is a worker that stays slow called slow as long as it is, by one figure everywhere?"""

from __future__ import annotations

import asyncio
from functools import cache

import pytest
from prometheus_client.parser import text_string_to_metric_families
from troubled import Watched, healthy

from paceline.dashboard import shape
from paceline.kernel import Kernel
from paceline.observe.diagnosis import Diagnosis
from paceline.observe.metrics import Metrics
from paceline.observe.pace_metrics import PaceMetrics
from paceline.observe.stalls import Stalls
from paceline.policy import pace
from paceline.policy.look import Finding
from paceline.simulator.scenario import Fault

SLOW_AT_S, LONG_S = 30.0, 420.0


@cache
def for_good(factor: float, seconds: float) -> Watched:
    slow = Fault(kind="slow", worker="w0", at_s=SLOW_AT_S, for_s=1e6, factor=factor)
    return Watched(healthy(slow, seconds=seconds)).run()


def named_slow(watched: Watched) -> list[tuple[float, Finding]]:
    return [
        (now, finding)
        for now, findings in watched.findings
        for finding in findings
        if (finding.kind, finding.worker) == ("slow_worker", "w0")
    ]


def exported(watched: Watched, ago_s: float = 0.0) -> dict[tuple[str, str], float]:
    """The gauge by worker and what it is compared with, some time after the run."""
    kernel = watched.simulation.gateways[0].kernel
    now = watched.simulation.clock.now + ago_s
    diagnosis = Diagnosis(kernel, watched.stalls, (lambda: now, lambda: now))
    metrics = Metrics(kernel, {}, [0.1])
    metrics.also(PaceMetrics(kernel, diagnosis.slower))
    return {
        (sample.labels["worker"], sample.labels["than"]): sample.value
        for family in text_string_to_metric_families(metrics.text().decode())
        for sample in family.samples
        if sample.name == "paceline_worker_slower"
    }


def test_a_worker_that_stays_twice_as_slow_is_named_for_as_long() -> None:
    """Routing learns its new speed within minutes: that must not make it well."""
    watched = for_good(2.0, LONG_S)
    kernel = watched.simulation.gateways[0].kernel
    assert kernel.workers["w0"].timing.slowdown < 1.15
    named = named_slow(watched)
    assert named[0][0] < SLOW_AT_S + 15.0
    assert len(named) >= 0.98 * (LONG_S - named[0][0])
    assert named[-1][0] > LONG_S - 2.0
    told = [finding.evidence["times_as_slow"] for _, finding in named]
    assert all(1.7 <= float(times) <= 2.2 for times in told[15:])
    assert exported(watched)["w0", "itself"] == pytest.approx(2.0, rel=0.15)
    assert exported(watched)["w1", "itself"] == pytest.approx(1.0, rel=0.1)


def test_it_is_named_by_what_was_done_to_it_from_the_first_seconds_on() -> None:
    (_, first), *_ = named_slow(for_good(8.0, 60.0))
    assert float(first.evidence["times_as_slow"]) == pytest.approx(8.0, rel=0.15)
    step_ms, normal_ms = first.evidence["step_ms"], first.evidence["normal_step_ms"]
    assert float(step_ms) == pytest.approx(8.0 * float(normal_ms), rel=0.15)
    assert "slowdown_now" not in first.evidence


def test_metric_and_finding_have_one_figure() -> None:
    watched = for_good(8.0, 60.0)
    _, last = named_slow(watched)[-1]
    assert exported(watched)["w0", "itself"] == pytest.approx(
        float(last.evidence["times_as_slow"]), rel=0.15
    )


def test_of_a_worker_that_nobody_has_seen_for_long_the_metric_says_nothing() -> None:
    assert exported(for_good(8.0, 60.0), ago_s=120.0) == {}
    kernel = Kernel()
    assert Diagnosis(kernel, Stalls(kernel), (float, float)).slower("unknown") is None


def test_a_worker_that_is_slow_now_and_then_is_well_in_between() -> None:
    slow = [
        Fault(kind="slow", worker="w0", at_s=at, for_s=60.0, factor=2.0) for at in (60.0, 180.0)
    ]
    watched = Watched(healthy(*slow, seconds=300.0)).run()
    named = [now for now, _ in named_slow(watched)]
    for fault in slow:
        within = [now for now in named if fault.at_s <= now < fault.at_s + 120.0]
        assert 45 <= len(within) <= 75


def test_the_dashboard_and_findings_mean_the_same_by_slow() -> None:
    diagnosis = for_good(8.0, 60.0).diagnosis
    named = [finding.worker for finding in asyncio.run(diagnosis.refreshed())]
    for worker_id in ("w0", "w1", "w2"):
        seen = diagnosis.slower(worker_id)
        assert seen is not None
        assert seen.found == (worker_id in named) == (worker_id == "w0")
    assert shape.SLOW == pace.SLOW
