"""Do Prometheus' numbers say what has happened?"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from msgspec.structs import replace
from prometheus_client.parser import text_string_to_metric_families

from paceline.domain.facts import ClientLeft, RequestArrived, WorkerAdded, WorkerReported
from paceline.domain.kvevents import (
    BlockEvent,
    BlocksChanged,
    BlocksRemoved,
    BlocksStored,
    BlocksUnknown,
)
from paceline.domain.outcome import Outcome
from paceline.domain.promise import Promise
from paceline.domain.request import Request
from paceline.domain.worker import Worker, WorkerReport
from paceline.kernel import Kernel
from paceline.observe.metrics import Metrics
from paceline.observe.sheet import sheet_of

REQUEST = Request("r", "m", "acme", "premium", Promise(0.5, 0.04))
OUTCOME = Outcome(
    request=REQUEST,
    worker="w",
    status=200,
    error="",
    attempts=1,
    because="",
    predicted=None,
    queued_s=0.0,
    ttft_s=0.1,
    itl_s=0.02,
    stall_s=0.1,
    seconds=1.0,
    prompt_tokens=10,
    cached_tokens=0,
    output_tokens=100,
)


def metrics_of(
    kernel: Kernel | None = None, refusals: Callable[[], Mapping[str, int]] = dict
) -> Metrics:
    return Metrics(kernel or Kernel(), {}, [0.1], refusals)


def samples(metrics: Metrics, name: str) -> dict[tuple[str, ...], float]:
    """Values by their labels, in order of the labels' names."""
    families = text_string_to_metric_families(metrics.text().decode())
    return {
        tuple(sample.labels[label] for label in sorted(sample.labels)): sample.value
        for family in families
        for sample in family.samples
        if sample.name == f"paceline_{name}"
    }


def test_a_degraded_request_counts_for_the_tier_that_it_asked_for() -> None:
    kernel = Kernel()
    kernel.handle(WorkerAdded(Worker("w", "m", "http://w")), 0.0)
    metrics = metrics_of(kernel)
    metrics.count(
        sheet_of(replace(OUTCOME, degraded_to=replace(REQUEST, tier="standard", model="small")))
    )
    assert samples(metrics, "requests_total") == {("m", "200", "acme", "premium", "w"): 1}
    assert samples(metrics, "promises_kept_total") == {("m", "premium", "w"): 1}
    assert samples(metrics, "degraded_total") == {("m", "premium", "small", "standard"): 1}


def test_moves_and_pauses_count_by_their_reason_and_sheds_by_tier() -> None:
    metrics = metrics_of()
    metrics.moved(REQUEST, "the worker hangs")
    metrics.moved(REQUEST, "the worker hangs")
    metrics.paused(REQUEST, "others need the room")
    metrics.shed(REQUEST)
    assert samples(metrics, "moves_total") == {("the worker hangs", "m", "premium"): 2}
    assert samples(metrics, "pauses_total") == {("others need the room", "m", "premium"): 1}
    assert samples(metrics, "sheds_total") == {("m", "premium"): 1}


def test_those_who_wait_are_counted_by_model_and_tier_and_at_0_when_they_are_gone() -> None:
    kernel = Kernel()
    metrics = metrics_of(kernel)
    for name, tier in (("a", "premium"), ("b", "premium"), ("c", "standard")):
        kernel.handle(RequestArrived(replace(REQUEST, id=name, tier=tier)), 0.0)
    waiting = samples(metrics, "waiting_requests")
    assert waiting == {("m", "premium"): 2, ("m", "standard"): 1}
    for name in "abc":
        kernel.handle(ClientLeft(name), 0.1)
    assert samples(metrics, "waiting_requests") == dict.fromkeys(waiting, 0)


def test_preemptions_are_those_since_paceline_looks_and_outlast_an_engines_restart() -> None:
    kernel = Kernel()
    metrics = metrics_of(kernel)
    kernel.handle(WorkerAdded(Worker("w", "m", "http://w")), 0.0)
    for at, total in enumerate([100.0, 103.0, 0.0, 1.0]):
        report = WorkerReport(healthy=True, preemptions_total=total)
        kernel.handle(WorkerReported("w", report), float(at))
    assert samples(metrics, "worker_preemptions_total") == {("m", "w"): 4}


def test_refusals_are_read_when_asked() -> None:
    refused = {"acme": 0}
    metrics = metrics_of(refusals=lambda: refused)
    refused["acme"] = 3
    assert samples(metrics, "quota_refusals_total") == {("acme",): 3}


def test_what_engines_tell_of_their_caches_is_counted() -> None:
    kernel = Kernel()
    told: list[BlockEvent] = [BlocksStored([1, 2], [10, 20]), BlocksRemoved([2, 99])]
    for name in ("w", "silent"):
        kernel.handle(WorkerAdded(Worker(name, "m", f"http://{name}")), 0.0)
    kernel.handle(BlocksUnknown("w", "its engine has started", whole=True), 0.0)
    kernel.handle(BlocksChanged("w", told), 0.0)
    metrics = metrics_of(kernel)
    assert samples(metrics, "worker_known_blocks") == {("m", "w"): 1, ("m", "silent"): 0}
    assert samples(metrics, "worker_cache_followed") == {("m", "w"): 1, ("m", "silent"): 0}
    assert samples(metrics, "kv_events_total") == {("m",): 2}
    assert samples(metrics, "kv_strangers_total") == {("m",): 1}
    kernel.handle(BlocksChanged("w", [BlocksStored([5], [50], parent=4)], unreadable=1), 0.0)
    assert samples(metrics, "kv_orphans_total") == {("m",): 1}
    assert samples(metrics, "kv_events_total") == {("m",): 4}
    assert samples(metrics, "worker_cache_followed")["m", "w"] == 0


def test_tenants_beyond_those_that_have_names_are_counted_as_one() -> None:
    kernel = Kernel()
    kernel.handle(WorkerAdded(Worker("w", "m", "http://w")), 0.0)
    refused = {f"t{i}": 1 for i in range(10)}
    metrics = Metrics(kernel, {}, [0.1], lambda: refused, max_tenants=3)
    for i in range(10):
        metrics.count(sheet_of(replace(OUTCOME, request=replace(REQUEST, tenant=f"t{i}"))))
    metrics.count(sheet_of(replace(OUTCOME, request=replace(REQUEST, tenant="t0"))))
    by_tenant = {labels[2]: value for labels, value in samples(metrics, "requests_total").items()}
    assert by_tenant == {"t0": 2, "t1": 1, "t2": 1, "other": 7}
    assert samples(metrics, "quota_refusals_total")[("other",)] == 7


def test_what_tiers_are_to_keep_can_be_set_beside_what_they_keep() -> None:
    metrics = Metrics(Kernel(), {}, [0.1], attain=lambda: {"premium": 0.99})
    assert samples(metrics, "tier_attain") == {("premium",): 0.99}


def test_a_worker_is_told_with_its_node_kind_role_and_transfer() -> None:
    kernel = Kernel()
    worker = Worker("w", "m", "http://w", kind="vllm", role="decode", node="a")
    kernel.handle(WorkerAdded(worker), 0.0)
    assert samples(metrics_of(kernel), "worker_info") == {("vllm", "m", "a", "decode", "", "w"): 1}
