"""Which numbers does Prometheus get?"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from paceline.domain.request import Request
from paceline.kernel import Kernel
from paceline.kernel.blocks import BlockIndex
from paceline.kernel.worker import WorkerState
from paceline.observe.request_metrics import LABELS, RequestMetrics
from paceline.observe.sheet import Places, Sheet, Who
from paceline.observe.table import OTHER

INFO = ("model", "worker", "node", "kind", "role", "transfer")

GapCounts = Mapping[tuple[str, str, str], Sequence[int]]
"""ITL histograms by (model, tier, worker), as the relay counts them."""


class Metrics:
    """All of Paceline's metrics, in one registry of their own.

    Model and tier are what a request asked for, whatever it was served as.
    """

    def __init__(
        self,
        kernel: Kernel,
        gaps: GapCounts,
        bounds: Sequence[float],
        refusals: Callable[[], Mapping[str, int]] = dict,
        attain: Callable[[], Mapping[str, float]] = dict,
        max_tenants: int = 100,
    ) -> None:
        """`refusals`: requests over a quota so far, by tenant; `attain`: what each tier is to keep.

        Beyond `max_tenants`, tenants are counted together as `other`.
        """
        self._kernel = kernel
        self._tenants = _Tenants(max_tenants)
        self._models = Places(self._model)
        self.before_reading: Callable[[], object] = lambda: None
        """To be called first: whoever tells of requests may have some left to tell of."""
        self._registry = registry = CollectorRegistry()
        self._ended = RequestMetrics(self._tenants.label)
        registry.register(self._ended)
        self._retries = Counter(
            "paceline_retries", "Dispatches after the first one.", ("model",), registry=registry
        )
        self._degraded = Counter(
            "paceline_degraded",
            "Requests that were served as less than what they asked for, by what they got.",
            ("model", "tier", "to_model", "to_tier"),
            registry=registry,
        )
        self._sheds = Counter(
            "paceline_sheds",
            "Requests turned away because they could not be served in time.",
            ("model", "tier"),
            registry=registry,
        )
        self._moves = Counter(
            "paceline_moves",
            "Times that requests left their worker to go on elsewhere.",
            ("model", "tier", "because"),
            registry=registry,
        )
        self._pauses = Counter(
            "paceline_pauses",
            "Times that requests left their worker for others, to go on later.",
            ("model", "tier", "because"),
            registry=registry,
        )
        self._shared = Counter(
            "paceline_shared",
            "Requests whose prompt another worker had prefilled, by the two.",
            ("model", "prefilled_at", "worker"),
            registry=registry,
        )
        registry.register(_Fleet(kernel, gaps, bounds))
        registry.register(_Waiting(kernel))
        registry.register(_Blocks(kernel))
        registry.register(_Refusals(refusals, self._tenants))
        registry.register(_Tiers(attain))

    def also(self, more: Collector) -> None:
        """Tell of this too."""
        self._registry.register(more)

    def shed(self, request: Request) -> None:
        """A request is turned away."""
        self._sheds.labels(request.model, request.tier).inc()

    def moved(self, request: Request, because: str) -> None:
        """A request leaves its worker to go on elsewhere."""
        self._moves.labels(request.model, request.tier, because).inc()

    def paused(self, request: Request, because: str) -> None:
        """A request leaves its worker for others."""
        self._pauses.labels(request.model, request.tier, because).inc()

    def count(self, sheet: Sheet) -> None:
        """These requests are over."""
        self._ended.count(sheet)
        self._models.of(sheet)
        rare = sheet.rare > 0.0
        for number, retries in zip(sheet.who[rare].tolist(), sheet.retries[rare], strict=True):
            who = sheet.whos[number]
            self._retries.labels(who.model).inc(retries)
            if who.prefilled_at:
                self._shared.labels(who.model, who.prefilled_at, who.worker).inc()
            if who.degraded_to is not None:
                self._degraded.labels(who.model, who.tier, *who.degraded_to).inc()

    def _model(self, who: Who) -> int:
        """A model's retries are told from its first request on, at 0."""
        self._retries.labels(who.model)
        return 0

    def text(self) -> bytes:
        """The exposition. It has the series of workers that are gone for one last time."""
        self.before_reading()
        exposition = generate_latest(self._registry)
        workers = self._kernel.workers
        self._ended.forget(lambda worker: bool(worker) and worker not in workers)
        return exposition


class _Fleet(Collector):
    """What the kernel knows of its workers, read when asked."""

    def __init__(self, kernel: Kernel, gaps: GapCounts, bounds: Sequence[float]) -> None:
        self._kernel = kernel
        self._gaps = gaps
        self._bounds = bounds

    def collect(self) -> Iterator[Metric]:
        workers = list(self._kernel.workers.values())
        for name, text, value in GAUGES:
            family = GaugeMetricFamily(f"paceline_worker_{name}", text, labels=("model", "worker"))
            for state in workers:
                family.add_metric((state.worker.model, state.worker.id), value(state))
            yield family
        info = GaugeMetricFamily(
            "paceline_worker_info", "1, with what else is known of the worker.", labels=INFO
        )
        for worker in (state.worker for state in workers):
            what = (worker.node, worker.kind, worker.role, worker.transfer)
            info.add_metric((worker.model, worker.id, *what), 1.0)
        yield info
        yield self._per_gap()
        preempted = CounterMetricFamily(
            "paceline_worker_preemptions",
            "Streams that the engine threw out of its KV cache: Paceline should have prevented it.",
            labels=("model", "worker"),
        )
        for state in workers:
            preempted.add_metric((state.worker.model, state.worker.id), state.preemptions)
        yield preempted

    def _per_gap(self) -> Metric:
        family = HistogramMetricFamily(
            "paceline_inter_token_latency_seconds", "Each gap between two tokens.", labels=LABELS
        )
        for labels, counts in self._gaps.items():
            family.add_metric(labels, _cumulative(self._bounds, counts), sum_value=None)
        return family


class _Waiting(Collector):
    """Who waits at the gateway? A model and tier for which somebody has waited stays, at 0."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._counts: Tally[tuple[str, str]] = Tally()

    def collect(self) -> Iterator[Metric]:
        for key in self._counts:
            self._counts[key] = 0
        lives = self._kernel.requests.values()
        self._counts.update((x.request.model, x.request.tier) for x in lives if x.waits)
        family = GaugeMetricFamily(
            "paceline_waiting_requests",
            "Requests waiting at the gateway, by what they would be served as now.",
            labels=("model", "tier"),
        )
        for labels, count in self._counts.items():
            family.add_metric(labels, count)
        yield family


class _Blocks(Collector):
    """What do engines tell of their KV caches, and how well is it understood?"""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel

    def collect(self) -> Iterator[Metric]:
        for name, text, value in BLOCK_GAUGES:
            family = GaugeMetricFamily(f"paceline_worker_{name}", text, labels=("model", "worker"))
            for model, pool in self._kernel.pools.items():
                for state in pool.workers.values():
                    family.add_metric((model, state.worker.id), value(pool.blocks, state.place))
            yield family
        for name, text, count in BLOCK_COUNTERS:
            total = CounterMetricFamily(f"paceline_kv_{name}", text, labels=("model",))
            for model, pool in self._kernel.pools.items():
                total.add_metric((model,), count(pool.blocks))
            yield total


class _Refusals(Collector):
    """Who has asked for more than it may?"""

    def __init__(self, refusals: Callable[[], Mapping[str, int]], tenants: _Tenants) -> None:
        self._refusals = refusals
        self._tenants = tenants

    def collect(self) -> Iterator[Metric]:
        family = CounterMetricFamily(
            "paceline_quota_refusals", "Requests over a limit of their tenant.", labels=("tenant",)
        )
        counts: Tally[str] = Tally()
        for tenant, count in self._refusals().items():
            counts[self._tenants.label(tenant)] += count
        for tenant, count in counts.items():
            family.add_metric((tenant,), count)
        yield family


class _Tiers(Collector):
    """Which share of its promises is each tier to keep?"""

    def __init__(self, attain: Callable[[], Mapping[str, float]]) -> None:
        self._attain = attain

    def collect(self) -> Iterator[Metric]:
        family = GaugeMetricFamily(
            "paceline_tier_attain",
            "Share of its promises that a tier is to keep.",
            labels=("tier",),
        )
        for tier, share in self._attain().items():
            family.add_metric((tier,), share)
        yield family


class _Tenants:
    """What tenants are called in labels: the first ones by name, so that series are bounded."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._named: set[str] = set()

    def label(self, tenant: str) -> str:
        if tenant in self._named:
            return tenant
        if len(self._named) >= self._most:
            return OTHER
        self._named.add(tenant)
        return tenant


def _cumulative(bounds: Iterable[float], counts: Sequence[int]) -> list[tuple[str, float]]:
    total, buckets = 0, []
    for bound, count in zip([*bounds, None], counts, strict=True):
        total += count
        buckets.append(("+Inf" if bound is None else f"{bound:.6g}", float(total)))
    return buckets


BLOCK_GAUGES: tuple[tuple[str, str, Callable[[BlockIndex, int], float]], ...] = (
    ("known_blocks", "Blocks in its KV cache, as its engine tells.", BlockIndex.size),
    ("cache_followed", "1 if its engine tells all that it caches.", BlockIndex.follows),
)
"""Gauges of each worker, by the index of blocks and the worker's place there."""
BLOCK_COUNTERS: tuple[tuple[str, str, Callable[[BlockIndex], float]], ...] = (
    ("events", "Events read of engines' KV caches.", lambda blocks: blocks.heard),
    (
        "orphans",
        "Blocks told of after text that was never told: where they are cached, only a guess says.",
        lambda blocks: blocks.orphans,
    ),
    ("strangers", "Blocks given up that were not known.", lambda blocks: blocks.strangers),
)
"""Counters of each model, by its index of blocks."""

GAUGES: tuple[tuple[str, str, Callable[[WorkerState], float]], ...] = (
    ("healthy", "1 if the engine answers.", lambda w: float(bool(w.report and w.report.healthy))),
    ("streams", "Streams decoding, as sent from here.", lambda w: w.ledger.streams),
    (
        "arriving",
        "Requests sent whose first token has not come.",
        lambda w: len(w.ledger.entries) - w.ledger.streams,
    ),
    ("uncached_tokens_ahead", "Prompt tokens not yet prefilled.", lambda w: w.ledger.ahead),
    ("context_tokens", "Context of the decoding streams.", lambda w: w.ledger.kv),
    (
        "slowdown",
        "Observed over learned step time; 1 once a speed has lasted.",
        lambda w: w.timing.slowdown,
    ),
    ("step_samples", "Steps learned from.", lambda w: w.timing.samples),
    (
        "ttft_prediction_error",
        "Running mean of |log(outcome / predicted)| of TTFT.",
        lambda w: w.ttft.error,
    ),
    ("ttft_prediction_bias", "Its signed mean: above 0 is later.", lambda w: w.ttft.bias),
    (
        "itl_prediction_error",
        "Running mean of |log(outcome / predicted)| of ITL.",
        lambda w: w.itl.error,
    ),
    ("itl_prediction_bias", "Its signed mean: above 0 is slower.", lambda w: w.itl.bias),
    (
        "kv_used_ratio",
        "KV cache in use, as the engine says.",
        lambda w: (w.report.kv_used or 0.0) if w.report else 0.0,
    ),
    (
        "engine_waiting",
        "Requests waiting in the engine, as it says.",
        lambda w: (w.report.waiting or 0.0) if w.report else 0.0,
    ),
)
"""Gauges of each worker: name, text, value."""
