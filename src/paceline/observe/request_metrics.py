"""How many requests, how many tokens, how soon? Counted for Prometheus many requests at a time.

What is counted is put into the library's families when it asks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

import numpy as np
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from paceline.observe.counts import Counts
from paceline.observe.sheet import Sheet, Who

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
ITL_SECONDS = (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.12, 0.2, 0.5, 1.0, 2.0)
LABELS = ("model", "tier", "worker")

Labels = tuple[str, str, str]
"""Model, tier and worker."""
Key = tuple[str, str, str, str, str]
"""The same, then tenant and status."""

DIRECTIONS = ("prompt", "cached", "output")
"""Of tokens."""
HISTOGRAMS = (
    ("paceline_queue_seconds", "From arrival until sent to the worker.", SECONDS),
    ("paceline_time_to_first_token_seconds", "From arrival to the first token.", SECONDS),
    (
        "paceline_request_inter_token_latency_seconds",
        "A request's mean gap between tokens.",
        ITL_SECONDS,
    ),
    ("paceline_worst_stall_seconds", "A request's worst gap between tokens.", SECONDS),
)
"""Name, text and bounds of each."""


class RequestMetrics(Collector):
    """All requests since the start, but for those of workers that are gone."""

    def __init__(self, named: Callable[[str], str]) -> None:
        """`named`: what a tenant is called in labels."""

        def key(who: Who) -> Key:
            return who.model, who.tier, who.worker, named(who.tenant), str(who.status)

        def labels(who: Who) -> Labels:
            return who.model, who.tier, who.worker

        self._requests = Counts(key, 1)
        self._answers = Counts(labels, 1 + len(DIRECTIONS), [bounds for _, _, bounds in HISTOGRAMS])
        """Of sound answers: promises kept, tokens by direction."""

    def count(self, sheet: Sheet) -> None:
        """These requests are over."""
        rows = self._requests.rows(sheet)
        np.add.at(self._requests.sums[0], rows, 1.0)
        answers, sound, streams, gaps = self._answers, sheet.sound, sheet.streams, sheet.gaps
        rows = answers.rows(sheet)
        told = sheet.kept, sheet.prompt_tokens, sheet.cached_tokens, sheet.output_tokens
        for sums, column in zip(answers.sums, told, strict=True):
            np.add.at(sums, rows[sound], column[sound])
        queue, ttft, itl, stall = answers.histograms
        queue.add(rows[sound], sheet.queued_s[sound])
        ttft.add(rows[streams], sheet.ttft_s[streams])
        itl.add(rows[gaps], sheet.itl_s[gaps])
        stall.add(rows[gaps], sheet.stall_s[gaps])

    def forget(self, gone: Callable[[str], bool]) -> None:
        """Of these workers nothing more is told."""
        self._requests.forget(lambda key: gone(key[2]))
        self._answers.forget(lambda labels: gone(labels[2]))

    def collect(self) -> Iterator[Metric]:
        labels = ("model", "tier", "worker", "tenant", "status")
        requests = CounterMetricFamily(
            "paceline_requests", "Requests that are over.", labels=labels
        )
        for key, row in self._requests.series.items():
            requests.add_metric(key, self._requests.sums[0, row])
        yield requests
        kept = CounterMetricFamily(
            "paceline_promises_kept", "Requests whose promise was kept.", labels=LABELS
        )
        tokens = CounterMetricFamily(
            "paceline_tokens",
            "Tokens, by direction: prompt, cached (of the prompt), output.",
            labels=(*LABELS, "direction"),
        )
        answers = self._answers
        for who, row in answers.series.items():
            promises, *counts = answers.sums[:, row].tolist()
            kept.add_metric(who, promises)
            for direction, count in zip(DIRECTIONS, counts, strict=True):
                tokens.add_metric((*who, direction), count)
        yield kept
        yield tokens
        for (metric, text, bounds), told in zip(HISTOGRAMS, answers.histograms, strict=True):
            family = HistogramMetricFamily(metric, text, labels=LABELS)
            for who, row in answers.series.items():
                buckets = _cumulative(bounds, told.counts[row].tolist())
                family.add_metric(who, buckets, told.seconds[row])
            yield family


def _cumulative(bounds: Sequence[float], counts: Sequence[int]) -> list[tuple[str, float]]:
    names = [*map(floatToGoString, bounds), "+Inf"]
    return [(name, float(count)) for name, count in zip(names, accumulate(counts), strict=True)]
