"""What do operators read of the fleet's last hour, and what if they ask amiss?"""

from __future__ import annotations

import csv
import io
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace
from outcomes import OUTCOME, REQUEST
from starlette.testclient import TestClient

from paceline.domain.facts import RequestArrived, WorkerAdded, WorkerReported
from paceline.domain.worker import Worker, WorkerReport
from paceline.gateway.relay import GAP_BOUNDS
from paceline.kernel import Kernel
from paceline.observe.admin import admin_app
from paceline.observe.cluster import Cluster
from paceline.observe.metrics import Metrics
from paceline.observe.sharing import Sketches, merged_sketches
from paceline.observe.sheet import sheet_of
from paceline.observe.views import cluster_routes

NOW = 1_000_000.0


@pytest.fixture
def client() -> TestClient:
    """An admin listener after some seconds of two workers' life."""
    kernel = Kernel()
    for i in range(2):
        worker = Worker(f"w{i}", "m", f"http://w{i}", node=f"n{i}", cost_per_hour=3.6)
        kernel.handle(WorkerAdded(worker), 0.0)
        kernel.handle(WorkerReported(worker.id, WorkerReport(True, running=3)), 0.0)
    kernel.handle(RequestArrived(REQUEST), 0.0)
    gaps = {("m", "premium", "w0"): [0] * (len(GAP_BOUNDS) + 1)}
    cluster = Cluster(kernel, gaps, lambda tier: 0.9, 0.0)
    for second in range(1, 9):
        gaps["m", "premium", "w0"][10] += 5
        cluster.count(sheet_of(OUTCOME))
        cluster.count(
            sheet_of(replace(OUTCOME, request=replace(REQUEST, tenant="beta", tier="low")))
        )
        cluster.look(float(second))
    views = cluster_routes(cluster, kernel, GAP_BOUNDS, lambda: NOW)
    metrics = Metrics(kernel, gaps, GAP_BOUNDS)
    operated: Any = None
    return TestClient(admin_app(kernel, metrics, operated, lambda: 0.0, views))


def get(client: TestClient, path: str) -> Any:
    answer = client.get(f"/paceline/v1/{path}")
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_summary_is_by_tier_and_of_the_last_minute_unless_asked_otherwise(
    client: TestClient,
) -> None:
    told = get(client, "summary")
    assert (told["at"], told["window_s"], told["covered_s"]) == (NOW, 60, 8.0)
    assert [group["of"] for group in told["groups"]] == [{"tier": "low"}, {"tier": "premium"}]
    assert told["total"]["requests"] == 16
    assert told["total"]["requests_per_s"] == 2.0
    assert told["total"]["gap_s"]["count"] == 40
    assert told["total"]["engine"]["running"] == 6


def test_one_value_can_be_asked_for_and_engines_are_told_where_that_makes_sense(
    client: TestClient,
) -> None:
    told = get(client, "summary?by=worker&node=n0")
    assert [group["of"]["worker"] for group in told["groups"]] == ["w0"]
    assert told["groups"][0]["engine"]["workers"] == told["total"]["engine"]["workers"] == 1
    assert get(client, "summary?tenant=beta")["total"]["engine"] is None
    assert get(client, "summary?tenant=beta")["total"]["requests"] == 8
    assert get(client, "summary?tenant=nobody")["groups"] == []


def test_history_is_in_parts_that_follow_each_other(client: TestClient) -> None:
    told = get(client, "history?window=10&by=")
    slots = told["slots"]
    assert told["slot_s"] == 2.0
    assert sum(slot["total"]["requests"] for slot in slots) == 16
    for before, after in pairwise(slots):
        assert before["from"] + before["seconds"] == pytest.approx(after["from"])
    assert slots[-1]["from"] + slots[-1]["seconds"] == pytest.approx(NOW)
    assert len(slots[0]["total"]["gap_counts"]) == len(told["gap_bounds_s"]) + 1


def test_costs_add_up_in_both_formats(client: TestClient) -> None:
    told = get(client, "cost?window=60&by=tenant,tier")
    assert told["total"]["cost"] == pytest.approx(2 * 8.0 * 3.6 / 3600)
    assert told["unallocated"]["worker_s"] == pytest.approx(8.0)
    answer = client.get("/paceline/v1/cost?by=tenant,tier&format=csv")
    assert answer.headers["content-type"].startswith("text/csv")
    rows = list(csv.DictReader(io.StringIO(answer.text)))
    assert {row["tenant"] for row in rows} == {"acme", "beta", "unallocated"}
    assert sum(float(row["cost"]) for row in rows) == pytest.approx(told["total"]["cost"])


def test_sketches_of_two_gateways_are_twice_those_of_one(client: TestClient) -> None:
    data = client.get("/paceline/v1/sketches?window=60").content
    one = msgspec.json.decode(data, type=Sketches)
    both = merged_sketches([one, one])
    assert both.table.sums[:, 0].sum() == 2 * 16
    assert both.table.counts.sum() == 2 * merged_sketches([one]).table.counts.sum()


@pytest.mark.parametrize(
    ("query", "why"),
    [
        ("summary?window=61", "window must be one of 10, 60, 600, 3600"),
        ("summary?window=x", "window must be one of"),
        ("history?by=color", "by 'color': there are model, tier"),
        ("cost?format=xml", "format must be json or csv"),
    ],
)
def test_a_wrong_question_is_refused_in_a_sentence(
    client: TestClient, query: str, why: str
) -> None:
    answer = client.get(f"/paceline/v1/{query}")
    assert answer.status_code == 400
    assert why in answer.json()["error"]["message"]


def test_a_gateway_that_has_seen_nothing_says_so() -> None:
    kernel = Kernel()
    cluster = Cluster(kernel, {}, lambda tier: 0.9, 0.0)
    views = cluster_routes(cluster, kernel, GAP_BOUNDS, lambda: NOW)
    operated: Any = None
    client = TestClient(
        admin_app(kernel, Metrics(kernel, {}, GAP_BOUNDS), operated, lambda: 0.0, views)
    )
    told = get(client, "summary")
    assert told["groups"] == []
    assert told["total"]["attainment"] is None
    assert told["total"]["ttft_s"] is None
    assert get(client, "history")["slots"]
    assert get(client, "cost")["total"]["cost"] == 0
    assert get(client, "sketches")["cells"] == []
