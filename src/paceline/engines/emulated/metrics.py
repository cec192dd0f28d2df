"""What does the engine say of itself? vLLM 0.32's metrics, by its names, labels and buckets."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from paceline.enginemodel import Scheduler

_REQUEST_S = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
_TOKEN_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
_FIRST_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
_STEP_TOKENS = tuple(2**k for k in (0, *range(3, 15)))


class Histogram:
    """Counts by upper bound. (prometheus_client's own takes a lock for each observation.)"""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative, as Prometheus wants them."""
        sums, seen = [], 0
        for bound, count in zip((*map(float, self.bounds), "+Inf"), self.counts, strict=True):
            seen += count
            sums.append((str(bound), float(seen)))
        return sums


class Tallies:
    """What happened in one engine since its start, beside what the scheduler counts."""

    def __init__(self) -> None:
        self.finished: Counter[str] = Counter()
        """Requests by the reason why they ended."""
        self.ttft_s = Histogram((*_FIRST_S, 20, 40, 80, 160, 640, 2560))
        self.itl_s = Histogram((*_TOKEN_S, 20, 40, 80))
        self.mean_itl_s = Histogram((*_TOKEN_S, 20, 40, 80))
        self.e2e_s = Histogram((*_REQUEST_S, 1920, 7680))
        self.queue_s = Histogram((*_REQUEST_S, 1920, 7680))
        self.prefill_s = Histogram((*_REQUEST_S, 1920, 7680))
        self.decode_s = Histogram((*_REQUEST_S, 1920, 7680))
        self.prompt_tokens = Histogram(_TOKENS)
        self.answer_tokens = Histogram(_TOKENS)
        self.step_tokens = Histogram(_STEP_TOKENS)


class EngineMetrics(Collector):
    """One engine's state as Prometheus families."""

    def __init__(self, model: str, scheduler: Scheduler, tallies: Tallies) -> None:
        self._labels = {"engine": "0", "model_name": model}
        self._scheduler = scheduler
        self._tallies = tallies
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def text(self) -> bytes:
        return generate_latest(self._registry)

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        yield from self._gauges()
        yield from self._counters()
        yield from self._histograms()

    def _gauges(self) -> Iterator[Metric]:
        scheduler, profile = self._scheduler, self._scheduler.profile
        for name, text, value in (
            ("num_requests_running", "Number of requests in execution batches", scheduler.running),
            (
                "num_requests_waiting",
                "Number of requests waiting to be processed",
                scheduler.waiting,
            ),
            ("kv_cache_usage_perc", "KV-cache usage. 1 means 100 percent usage", scheduler.kv_used),
        ):
            gauge = GaugeMetricFamily(f"vllm:{name}", text, labels=list(self._labels))
            gauge.add_metric(list(self._labels.values()), value)
            yield gauge
        config = {
            "block_size": str(profile.block_size),
            "cache_dtype": "auto",
            "enable_prefix_caching": "True",
            "engine": "0",
            "gpu_memory_utilization": "0.92",
            "kv_cache_size_tokens": str(scheduler.pool.blocks * profile.block_size),
            "num_gpu_blocks": str(scheduler.pool.blocks),
        }
        info = GaugeMetricFamily(
            "vllm:cache_config_info", "Information of the CacheConfig", labels=list(config)
        )
        info.add_metric(list(config.values()), 1)
        yield info

    def _counters(self) -> Iterator[Metric]:
        counts = self._scheduler.counters
        for name, text, value in (
            ("prefix_cache_queries", "Queried tokens", counts.prefix_queried_tokens),
            ("prefix_cache_hits", "Cached tokens", counts.prefix_hit_tokens),
            ("num_preemptions", "Preemptions", counts.preemptions),
            ("prompt_tokens", "Prompt tokens processed", counts.prompt_tokens),
            ("prompt_tokens_cached", "Cached prompt tokens", counts.prefix_hit_tokens),
            ("external_prefix_cache_queries", "Tokens wanted of others", counts.received_tokens),
            ("external_prefix_cache_hits", "Tokens fetched from others", counts.received_tokens),
            ("generation_tokens", "Generation tokens processed", counts.generated_tokens),
        ):
            counter = CounterMetricFamily(f"vllm:{name}", text, labels=list(self._labels))
            counter.add_metric(list(self._labels.values()), value)
            yield counter
        success = CounterMetricFamily(
            "vllm:request_success",
            "Requests processed, by the reason why they finished",
            labels=["engine", "finished_reason", "model_name"],
        )
        for reason in ("stop", "length", "abort"):
            labels = ["0", reason, self._labels["model_name"]]
            success.add_metric(labels, self._tallies.finished[reason])
        yield success

    def _histograms(self) -> Iterator[Metric]:
        tallies = self._tallies
        for name, text, histogram in (
            ("time_to_first_token_seconds", "Time to first token", tallies.ttft_s),
            ("inter_token_latency_seconds", "Inter-token latency", tallies.itl_s),
            ("request_time_per_output_token_seconds", "Mean by request", tallies.mean_itl_s),
            ("e2e_request_latency_seconds", "End to end latency", tallies.e2e_s),
            ("request_queue_time_seconds", "Time spent waiting", tallies.queue_s),
            ("request_prefill_time_seconds", "Time spent in prefill", tallies.prefill_s),
            ("request_decode_time_seconds", "Time spent in decode", tallies.decode_s),
            ("request_prompt_tokens", "Prompt tokens by request", tallies.prompt_tokens),
            ("request_generation_tokens", "Answer tokens by request", tallies.answer_tokens),
            ("iteration_tokens_total", "Tokens by engine step", tallies.step_tokens),
        ):
            family = HistogramMetricFamily(f"vllm:{name}", text, labels=list(self._labels))
            labels = list(self._labels.values())
            family.add_metric(labels, histogram.buckets(), histogram.total)
            yield family
