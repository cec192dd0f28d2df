"""What does Prometheus get to know of lateness and its causes?"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from paceline.observe.losses import Losses, Total

LABELS = ("model", "tier", "worker", "cause")


class LateMetrics(Collector):
    """Counters by cause, read when asked. A worker that is gone takes its series with it."""

    def __init__(self, losses: Losses) -> None:
        self._losses = losses

    def collect(self) -> Iterator[Metric]:
        for name, text, value in COUNTERS:
            family = CounterMetricFamily(name, text, labels=LABELS)
            for (model, tier, worker, cause), total in self._losses.totals.items():
                family.add_metric((model, tier, worker, cause.value), value(total))
            yield family


COUNTERS: tuple[tuple[str, str, Callable[[Total], float]], ...] = (
    (
        "paceline_late_seconds",
        "Seconds by which gaps, first tokens and answers were later than promised, over all "
        "streams. They overlap: a late gap also makes the mean of its answer late.",
        lambda total: total.seconds,
    ),
    (
        "paceline_late_gaps",
        "Gaps, first tokens and answers that were late, by their main cause.",
        lambda total: total.gaps,
    ),
    (
        "paceline_promises_broken",
        "Requests whose promise on token timing was broken, by the main cause.",
        lambda total: total.promises,
    ),
)
"""Name, text, value."""
