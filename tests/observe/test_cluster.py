"""Does what was counted of the fleet say what has happened, whoever asks by what?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from outcomes import OUTCOME, REQUEST

from paceline.domain.facts import WorkerAdded, WorkerReported
from paceline.domain.worker import Worker, WorkerReport
from paceline.gateway.relay import GAP_BOUNDS
from paceline.kernel import Kernel
from paceline.observe import cluster as module
from paceline.observe.cluster import Cluster, Of, Snapshot
from paceline.observe.sharing import Sketches, exported, merged_sketches
from paceline.observe.sheet import sheet_of
from paceline.observe.sketch import ACCURACY, LEAST, bins, middle
from paceline.observe.summary import Engines, Figures, report

BOUNDS = np.array(GAP_BOUNDS)
LATE = replace(OUTCOME, ttft_s=0.9)
Gaps = dict[tuple[str, str, str], list[int]]


def fleet(size: int = 2) -> Kernel:
    kernel = Kernel()
    for i in range(size):
        worker = Worker(f"w{i}", "m", f"http://w{i}", role="both", node=f"n{i}")
        kernel.handle(WorkerAdded(worker), 0.0)
        report = WorkerReport(True, running=2 + i, waiting=i, kv_used=0.25 * i)
        kernel.handle(WorkerReported(worker.id, report), 0.0)
    return kernel


def cluster_of(kernel: Kernel | None = None, gaps: Gaps | None = None) -> Cluster:
    kernel = fleet() if kernel is None else kernel
    return Cluster(kernel, gaps if gaps is not None else {}, lambda tier: 0.9, 0.0)


def asked(snapshot: Snapshot, by: Sequence[str] = (), **where: str) -> Figures:
    def wanted(of: Of) -> bool:
        return all(getattr(of, name) == value for name, value in where.items())

    return report(snapshot, by, wanted, BOUNDS)


def groups(told: Figures) -> dict[tuple[str, ...], Any]:
    return {tuple(group["of"].values()): group for group in told["groups"]}


seconds = st.floats(min_value=2 * LEAST, max_value=10_000.0)


@settings(deadline=None)
@given(st.lists(seconds, min_size=1, max_size=50))
def test_what_stands_for_a_bin_is_within_one_percent_of_all_in_it(values: list[float]) -> None:
    found = middle(bins(np.array(values)))
    assert np.all(np.abs(found / values - 1.0) <= ACCURACY + 1e-9)


def test_all_that_is_shorter_than_the_clock_can_tell_is_0_and_nothing_is_too_long() -> None:
    assert middle(bins(np.array([0.0, LEAST]))).tolist() == [0.0, 0.0]
    assert middle(bins(np.array([1e9])))[0] > 10_000


@settings(deadline=None)
@given(
    st.lists(st.lists(st.floats(0.001, 100.0), min_size=1, max_size=80), min_size=1, max_size=4),
)
def test_quantiles_of_several_gateways_are_those_of_all_requests(told: list[list[float]]) -> None:
    sent = []
    for times in told:
        cluster = cluster_of()
        for ttft_s in times:
            cluster.count(sheet_of(replace(OUTCOME, ttft_s=ttft_s)))
        cluster.look(1.0)
        data = msgspec.json.encode(exported(cluster.snapshot(60), at=1.0))
        sent.append(msgspec.json.decode(data, type=Sketches))
    found = asked(merged_sketches(sent), by=["tier"])["groups"][0]["ttft_s"]
    everything = [ttft_s for times in told for ttft_s in times]
    assert found["count"] == len(everything)
    for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
        exact = np.quantile(everything, share, method="lower")
        assert found[name] == pytest.approx(exact, rel=ACCURACY + 1e-6)


def test_sketches_of_another_version_are_refused() -> None:
    other = replace(exported(cluster_of().snapshot(60), 0.0), version=0)
    with pytest.raises(Exception, match="another version"):
        merged_sketches([other])


def test_a_fleet_can_be_asked_by_model_tier_tenant_role_node_and_worker() -> None:
    cluster = cluster_of()
    cluster.count(sheet_of(OUTCOME))
    cluster.count(
        sheet_of(replace(LATE, request=replace(REQUEST, tenant="beta", tier="low"), worker="w1"))
    )
    cluster.look(1.0)
    snapshot = cluster.snapshot(10)
    for by, known in (
        ("model", {("m",)}),
        ("tier", {("premium",), ("low",)}),
        ("tenant", {("acme",), ("beta",)}),
        ("role", {("both",)}),
        ("node", {("n0",), ("n1",)}),
        ("worker", {("w0",), ("w1",)}),
    ):
        found = groups(asked(snapshot, by=[by]))
        assert set(found) == known
        assert sum(group["requests"] for group in found.values()) == 2
    assert asked(snapshot, tenant="beta", node="n1")["total"]["kept"] == 0
    assert asked(snapshot, tenant="beta", node="n0")["total"]["requests"] == 0


def test_burn_is_the_share_of_broken_promises_over_what_the_tier_allows() -> None:
    cluster = cluster_of()
    for outcome in [OUTCOME] * 8 + [LATE] * 2:
        cluster.count(sheet_of(outcome))
    cluster.look(1.0)
    told = asked(cluster.snapshot(10))["total"]
    assert told["attainment"] == pytest.approx(0.8)
    assert told["burn"] == pytest.approx(0.2 / 0.1)


def test_what_ended_badly_is_broken_and_gives_no_times() -> None:
    cluster = cluster_of()
    cluster.count(sheet_of(replace(OUTCOME, status=429, error="no room", worker="")))
    cluster.count(sheet_of(replace(OUTCOME, status=502, error="it died")))
    cluster.count(sheet_of(replace(OUTCOME, status=499, error="the client left")))
    cluster.count(sheet_of(replace(OUTCOME, status=200, error="the client left")))
    cluster.look(1.0)
    told = asked(cluster.snapshot(10))["total"]
    assert (told["requests"], told["kept"]) == (4, 0)
    assert (told["shed"], told["failed"], told["left"]) == (1, 1, 2)
    assert told["ttft_s"] is None


@pytest.mark.parametrize("window_s", module.WINDOWS)
def test_a_window_forgets_what_is_older_and_longer_ones_remember(window_s: int) -> None:
    cluster, slot_s = cluster_of(), module.slot_s(window_s)
    cluster.count(sheet_of(OUTCOME))
    forgotten_at = int(window_s + 2 * slot_s)
    shown = {window_s // 2, int(window_s - slot_s), forgotten_at}
    for second in range(1, forgotten_at + 1):
        cluster.look(float(second))
        if second in shown:
            told = asked(cluster.snapshot(window_s))["total"]
            assert told["requests"] == (second < forgotten_at)


def test_memory_is_bounded_in_time() -> None:
    cluster = cluster_of()
    for second in range(1, 4500, 2):
        cluster.count(sheet_of(OUTCOME))
        cluster.look(float(second))
    slots = [slot for level in cluster._levels for slot in level.slots]
    assert len(slots) <= sum(count for _, count in module.LEVELS)
    assert len(cluster.cells.of) <= 4


def test_too_many_tenants_are_counted_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_CELLS", 6)
    cluster = cluster_of()
    for i in range(50):
        tenant = replace(REQUEST, tenant=f"t{i}")
        cluster.count(sheet_of(replace(OUTCOME, request=tenant, worker=f"w{i % 2}")))
    cluster.look(1.0)
    assert len(cluster.cells.of) <= 6 + 2
    found = groups(asked(cluster.snapshot(10), by=["tenant"]))
    assert found[("other",)]["requests"] > 40
    assert sum(group["requests"] for group in found.values()) == 50


def test_tenants_that_are_gone_make_room_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_CELLS", 6)
    cluster = cluster_of()
    cluster.count(sheet_of(OUTCOME))
    cluster.count(sheet_of(replace(OUTCOME, request=replace(REQUEST, tenant="gone"))))
    for second in range(1, 9000, 61):
        cluster.look(float(second))
        cluster.count(sheet_of(OUTCOME))
    cluster.count(sheet_of(replace(OUTCOME, request=replace(REQUEST, tenant="new"))))
    cluster.look(9001.0)
    assert set(groups(asked(cluster.snapshot(3600), by=["tenant"]))) == {("acme",), ("new",)}


def test_gaps_are_those_since_the_last_look_and_survive_a_worker() -> None:
    gaps: Gaps = {("m", "premium", "w0"): [0] * (len(GAP_BOUNDS) + 1)}
    cluster = cluster_of(gaps=gaps)
    gaps["m", "premium", "w0"][10] += 7
    cluster.look(1.0)
    cluster.look(2.0)
    gaps.clear()
    cluster.look(3.0)
    gaps["m", "premium", "w0"] = [0] * (len(GAP_BOUNDS) + 1)
    gaps["m", "premium", "w0"][10] += 2
    cluster.look(4.0)
    gaps["m", "premium", "w0"] = [1] + [0] * len(GAP_BOUNDS)
    cluster.look(5.0)
    told = asked(cluster.snapshot(10), by=["worker"])
    assert groups(told)[("w0",)]["gap_s"]["count"] == 10
    assert GAP_BOUNDS[9] <= told["total"]["gap_s"]["p50"] <= GAP_BOUNDS[10]


def test_what_engines_say_stands_beside_it_where_they_can_be_told_apart() -> None:
    kernel = fleet()
    cluster = cluster_of(kernel)
    cluster.count(sheet_of(OUTCOME))
    cluster.look(1.0)
    kernel.handle(WorkerReported("w0", WorkerReport(True, preemptions_total=3.0)), 1.0)
    cluster.look(2.0)
    snapshot = cluster.snapshot(10)
    engines = Engines(kernel.workers.values(), ["node"])
    told = report(snapshot, ["node"], lambda of: True, BOUNDS, engines)
    assert told["total"]["engine"]["workers"] == 2
    assert groups(told)[("n0",)]["engine"]["preemptions"] == 3
    by_tier = Engines(kernel.workers.values(), ["tier"])
    told = report(snapshot, ["tier"], lambda of: True, BOUNDS, by_tier)
    assert groups(told)[("premium",)]["engine"] is None


def test_many_groups_are_cut_and_the_rest_is_one() -> None:
    cluster = cluster_of()
    for i in range(300):
        for _ in range(1 + (i < 5)):
            cluster.count(sheet_of(replace(OUTCOME, request=replace(REQUEST, tenant=f"t{i}"))))
    cluster.look(1.0)
    told = asked(cluster.snapshot(10), by=["tenant"])
    assert len(told["groups"]) == 257
    assert {group["of"]["tenant"] for group in told["groups"][:5]} == {f"t{i}" for i in range(5)}
    assert told["groups"][-1]["of"] == {"tenant": "other"}
    assert sum(group["requests"] for group in told["groups"]) == told["total"]["requests"] == 305
