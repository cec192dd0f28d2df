"""Is it known how far each batch is and what it has cost, however many there are?"""

from __future__ import annotations

import csv
import io
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace
from outcomes import OUTCOME, REQUEST
from starlette.testclient import TestClient

from paceline.domain.facts import FirstTokenSeen, RequestArrived, WorkerAdded, WorkerReported
from paceline.domain.outcome import Outcome
from paceline.domain.request import Request
from paceline.domain.worker import Worker, WorkerReport
from paceline.gateway.relay import GAP_BOUNDS
from paceline.kernel import Kernel, Settings
from paceline.kernel.log import line, read
from paceline.observe.admin import admin_app
from paceline.observe.batches import MOST, Batch, Batches
from paceline.observe.cluster import Cluster
from paceline.observe.metrics import Metrics
from paceline.observe.views import cluster_routes

UNIX_AT_0 = 1_000_000.0
PER_HOUR = 3.6


class Life:
    sent_at = first_at = 0.0

    def __init__(self, done_at: float) -> None:
        self.done_at = done_at


def of(name: str, tenant: str = "acme", request_id: str = "r") -> Request:
    return replace(REQUEST, id=request_id, batch=name, tenant=tenant)


def ended(batches: Batches, request: Request, at: float, **how: Any) -> None:
    outcome: Outcome = replace(OUTCOME, request=request, **how)
    batches.over([(Life(at), outcome)])


def fleet() -> Kernel:
    kernel = Kernel(Settings(policy="round-robin"))
    worker = Worker("w0", "m", "http://w0", cost_per_hour=PER_HOUR)
    kernel.handle(WorkerAdded(worker), 0.0)
    kernel.handle(WorkerReported("w0", WorkerReport(True)), 0.0)
    return kernel


def known(batches: Batches, now: float = 0.0) -> dict[tuple[str, str], Batch]:
    return {(tenant, name): batch for tenant, name, batch in batches.newest(now)}


def test_requests_count_for_their_batch_and_those_of_none_for_nobody() -> None:
    batches = Batches(Kernel())
    ended(batches, of("night"), 5.0)
    ended(batches, of("night"), 9.0, ttft_s=2.0)
    ended(batches, of("night"), 7.0, status=429, error="no room", output_tokens=0)
    ended(batches, REQUEST, 8.0)
    ((key, night),) = known(batches).items()
    assert key == ("acme", "night")
    assert (night.done, night.failed) == (2, 1)
    assert (night.output_tokens, night.kept_tokens) == (200, 100)
    assert (night.first_at, night.last_at) == (4.0, 9.0)


def test_two_tenants_batches_of_one_name_are_two() -> None:
    batches = Batches(Kernel())
    ended(batches, of("night", "acme"), 5.0)
    ended(batches, of("night", "beta"), 6.0)
    assert [tenant for tenant, _, _ in batches.newest(7.0)] == ["beta", "acme"]


def test_what_is_under_way_and_what_waits_is_as_it_is_when_asked() -> None:
    kernel = Kernel(Settings(hold_s=100.0))
    kernel.handle(RequestArrived(of("night")), 1.0)
    batches = Batches(kernel)
    night = known(batches, 2.0)["acme", "night"]
    assert (night.under_way, night.waiting) == (0, 1)
    kernel.handle(WorkerAdded(Worker("w0", "m", "http://w0")), 3.0)
    kernel.handle(WorkerReported("w0", WorkerReport(True)), 3.0)
    night = known(batches, 4.0)["acme", "night"]
    assert (night.under_way, night.waiting, night.last_at) == (1, 0, 4.0)
    kernel.requests.clear()
    night = known(batches, 5.0)["acme", "night"]
    assert (night.under_way, night.waiting, night.last_at) == (0, 0, 4.0)


def test_batches_pay_for_the_time_that_they_take_and_no_more() -> None:
    kernel = fleet()
    cluster = Cluster(kernel, {}, lambda tier: 0.9, 0.0)
    for request in (of("night", request_id="a"), of("day", request_id="b"), REQUEST):
        kernel.handle(RequestArrived(request), 1.0)
        kernel.handle(FirstTokenSeen(request.id, 1.5), 1.5)
    cluster.look(3.0)
    cluster.look(6.0)
    found = known(cluster.batches, 6.0)
    assert found["acme", "night"].worker_s == found["acme", "day"].worker_s == pytest.approx(2.0)
    assert found["acme", "day"].cost == pytest.approx(2.0 * PER_HOUR / 3600)
    table = cluster.snapshot(60).table  # the three together are the tenant's, as ever
    assert table.sums[:, -3].sum() == pytest.approx(6.0)


def test_a_degraded_request_stays_in_its_batch() -> None:
    kernel = fleet()
    cluster = Cluster(kernel, {}, lambda tier: 0.9, 0.0, lambda served: of("night"))
    kernel.handle(RequestArrived(replace(of("night"), tier="low")), 1.0)
    cluster.look(2.0)
    assert known(cluster.batches)["acme", "night"].worker_s == pytest.approx(2.0)


def test_only_the_batches_seen_last_are_kept() -> None:
    batches = Batches(Kernel())
    for number in range(MOST):
        ended(batches, of(f"job-{number}"), float(number))
    ended(batches, of("job-0"), 1000.0)
    ended(batches, of("new"), 1001.0)
    names = [name for _, name, _ in batches.newest(1002.0)]
    assert len(names) == MOST
    assert names[:2] == ["new", "job-0"]
    assert "job-1" not in names
    ended(batches, of("job-1"), 1003.0)
    assert known(batches)["acme", "job-1"].done == 1


def test_a_tenant_with_many_names_drives_out_only_its_own() -> None:
    batches = Batches(Kernel())
    ended(batches, of("ours", "beta"), 0.0)
    for number in range(3 * MOST):
        ended(batches, of(f"job-{number}"), 1.0 + number)
    assert ("beta", "ours") in known(batches)
    assert len(known(batches)) == MOST


def test_of_more_batches_at_once_than_are_kept_the_first_ones_are_seen() -> None:
    kernel = Kernel()
    for number in range(2 * MOST):
        kernel.handle(RequestArrived(of(f"job-{number}", request_id=str(number))), 1.0)
    batches = Batches(kernel)
    batches.look(2.0)
    assert set(known(batches)) == {("acme", f"job-{number}") for number in range(MOST)}


def test_logs_of_facts_say_of_which_batch_a_request_is_and_older_ones_are_read() -> None:
    opening = msgspec.json.encode(Settings()) + b"\n"
    without = line(1.0, RequestArrived(REQUEST), ())
    assert b"batch" not in without
    _, entries = read([opening, without, line(1.0, RequestArrived(of("night")), ())])
    requests = [entry.fact.request for entry in entries if isinstance(entry.fact, RequestArrived)]
    assert [request.batch for request in requests] == ["", "night"]


# What operators read.


@pytest.fixture
def client() -> TestClient:
    kernel = fleet()
    cluster = Cluster(kernel, {}, lambda tier: 0.9, 0.0)
    kernel.handle(RequestArrived(of("night", request_id="a")), 1.0)
    cluster.look(4.0)
    ended(cluster.batches, of("night"), 5.0)
    ended(cluster.batches, of("night", "beta"), 3.0)
    wall, now = (lambda: UNIX_AT_0 + 10.0), (lambda: 10.0)
    views = cluster_routes(cluster, kernel, GAP_BOUNDS, wall, now)
    operated: Any = None
    return TestClient(admin_app(kernel, Metrics(kernel, {}, GAP_BOUNDS), operated, now, views))


def test_costs_by_batch_are_told_of_each_as_a_whole(client: TestClient) -> None:
    told = client.get("/paceline/v1/cost?by=batch").json()
    assert told["at"] == UNIX_AT_0 + 10.0
    acme, beta = told["groups"]
    assert acme == {
        "of": {"batch": "night", "tenant": "acme"},
        "cost": pytest.approx(4.0 * PER_HOUR / 3600),
        "worker_s": 4.0,
        "output_tokens": 100,
        "kept_tokens": 100,
        "cost_per_million_tokens": pytest.approx(40.0),
        "cost_per_million_kept_tokens": pytest.approx(40.0),
        "done": 1,
        "failed": 0,
        "under_way": 1,
        "waiting": 0,
        "first_seen": UNIX_AT_0 + 4.0,
        "last_seen": UNIX_AT_0 + 10.0,
    }
    assert (beta["of"]["tenant"], beta["last_seen"]) == ("beta", UNIX_AT_0 + 3.0)


def test_costs_by_batch_are_a_table_too_and_can_be_of_one_tenant(client: TestClient) -> None:
    answer = client.get("/paceline/v1/cost?by=batch&tenant=beta&format=csv")
    assert answer.headers["content-type"].startswith("text/csv")
    (row,) = csv.DictReader(io.StringIO(answer.text))
    assert (row["batch"], row["tenant"], row["done"], row["waiting"]) == ("night", "beta", "1", "0")
    assert client.get("/paceline/v1/cost?by=batch&tenant=nobody").json()["groups"] == []


@pytest.mark.parametrize(
    ("query", "why"),
    [
        ("by=batch,tier", "by batch goes alone"),
        ("by=tenant,batch", "by batch goes alone"),
        ("by=batch&window=60", "each batch is told as a whole: window cannot narrow it"),
        ("by=batch&tier=premium", "tier cannot narrow it, tenant can"),
        ("by=batch&format=xml", "format must be json or csv"),
    ],
)
def test_what_cannot_be_asked_of_batches_is_refused(
    client: TestClient, query: str, why: str
) -> None:
    answer = client.get(f"/paceline/v1/cost?{query}")
    assert answer.status_code == 400
    assert why in answer.json()["error"]["message"]
