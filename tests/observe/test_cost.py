"""Does somebody pay for every second of a worker, and for no other?"""

from __future__ import annotations

import csv
import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from paceline.domain.facts import FirstTokenSeen, RequestArrived, WorkerAdded, WorkerReported
from paceline.domain.promise import Promise
from paceline.domain.request import Request
from paceline.domain.worker import Worker, WorkerReport
from paceline.kernel import Kernel, Settings
from paceline.observe.cluster import Cluster
from paceline.observe.cost import shares
from paceline.observe.summary import Figures, costs
from paceline.observe.views import as_csv

REQUEST = Request("r", "m", "acme", "premium", Promise(), prompt_tokens=500)
PER_HOUR = 3.6


def fleet(workers: int = 1) -> Kernel:
    kernel = Kernel(Settings(policy="round-robin"))
    for i in range(workers):
        worker = Worker(f"w{i}", "m", f"http://w{i}", cost_per_hour=PER_HOUR, prefill_budget=1024)
        kernel.handle(WorkerAdded(worker), 0.0)
        kernel.handle(WorkerReported(worker.id, WorkerReport(True)), 0.0)
    return kernel


def arrive(kernel: Kernel, name: str, tokens: int = 500, tenant: str = "acme") -> None:
    request = replace(REQUEST, id=name, prompt_tokens=tokens, tenant=tenant)
    kernel.handle(RequestArrived(request), 1.0)


def taken(kernel: Kernel) -> dict[str, float]:
    """Which part of a second each tenant takes."""
    return {share.tenant: share.worker_s for share in shares(kernel.workers.values(), 1.0)}


def asked(cluster: Cluster, *by: str) -> Figures:
    return costs(cluster.snapshot(60), by, lambda of: True)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5000), st.booleans()), max_size=30), st.integers(1, 3))
def test_all_shares_of_a_worker_are_its_whole_time(
    sent: list[tuple[int, bool]], workers: int
) -> None:
    kernel = fleet(workers)
    for i, (tokens, decodes) in enumerate(sent):
        arrive(kernel, str(i), tokens, tenant=f"t{i % 3}")
        if decodes:
            kernel.handle(FirstTokenSeen(str(i), 1.1), 1.1)
    divided = list(shares(kernel.workers.values(), 2.0))
    assert sum(share.worker_s for share in divided) == pytest.approx(2.0 * workers)
    assert all(share.worker_s >= 0 for share in divided)
    idle = {share.worker for share in divided if not share.tier}
    assert idle == {w.worker.id for w in kernel.workers.values() if not w.ledger.entries}
    assert sum(share.cost for share in divided) == pytest.approx(2.0 * workers * PER_HOUR / 3600)


def test_what_all_have_paid_and_nobody_took_is_what_the_workers_cost() -> None:
    kernel = fleet(2)
    cluster = Cluster(kernel, {}, lambda tier: 0.9, 0.0)
    cluster.look(7.0)  # nobody is there
    arrive(kernel, "a", tenant="acme")
    arrive(kernel, "b", tenant="beta")
    arrive(kernel, "c", tenant="beta")
    for now in (8.0, 9.5, 20.0):
        cluster.look(now)
    for by in ((), ("tenant",), ("tier", "worker"), ("model",)):
        told = asked(cluster, *by)
        paid = sum(group["cost"] for group in told["groups"]) + told["unallocated"]["cost"]
        assert paid == pytest.approx(told["total"]["cost"])
        assert told["total"]["cost"] == pytest.approx(2 * 20.0 * PER_HOUR / 3600)
        assert told["total"]["worker_s"] == pytest.approx(40.0)
    assert told["unallocated"]["worker_s"] == pytest.approx(14.0)


def test_streams_share_decoding_and_a_long_prompt_pays_for_how_it_lengthens_the_step() -> None:
    kernel = fleet()
    for name in ("a", "b"):
        arrive(kernel, name, tenant=name)
        kernel.handle(FirstTokenSeen(name, 1.1), 1.1)
    parts = taken(kernel)
    assert parts["a"] == parts["b"] == pytest.approx(0.5)
    arrive(kernel, "long", 900, tenant="long")
    parts = taken(kernel)
    assert parts["a"] == parts["b"] < parts["long"]


def test_prompts_that_have_no_room_in_the_step_pay_nothing_yet() -> None:
    kernel = fleet()
    for name in ("first", "second", "third"):
        arrive(kernel, name, 800, tenant=name)
    parts = taken(kernel)
    assert set(parts) == {"first", "second"}
    assert parts["first"] == pytest.approx(800 / 1024)


def test_a_degraded_request_is_paid_for_by_the_tier_that_asked() -> None:
    kernel = fleet()
    arrive(kernel, "a")
    asked_for = replace(REQUEST, tier="above")
    (share,) = shares(kernel.workers.values(), 1.0, lambda request: asked_for)
    assert share.tier == "above"


def test_costs_are_read_as_a_table_too() -> None:
    kernel = fleet()
    cluster = Cluster(kernel, {}, lambda tier: 0.9, 0.0)
    arrive(kernel, "a")
    cluster.look(10.0)
    told = {"by": ["tenant"], **asked(cluster, "tenant")}
    rows = list(csv.DictReader(io.StringIO(as_csv(told))))
    assert [row["tenant"] for row in rows] == ["acme", "unallocated"]
    assert sum(float(row["cost"]) for row in rows) == pytest.approx(told["total"]["cost"])
