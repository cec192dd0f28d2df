"""How much slower than it should be does Prometheus see a worker?

By the figure that findings and the dashboard have, so that an alert and `paceline diagnose` say the
same of a worker, and go on saying it as long as it is slow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from paceline.kernel import Kernel
from paceline.policy.pace import Slower
from paceline.policy.unwell import OUTDATED_S


class PaceMetrics(Collector):
    """A gauge of workers whose pace is known, and was seen of late; read when asked."""

    def __init__(self, kernel: Kernel, slower: Callable[[str], Slower | None]) -> None:
        self._kernel = kernel
        self._slower = slower

    def collect(self) -> Iterator[Metric]:
        family = GaugeMetricFamily(
            "paceline_worker_slower",
            "Times as long as at its own best (`than` is `itself`), or as at those that serve the "
            "same at the same cost if they are faster (`like`), that a worker's last steps took. A "
            "speed that lasts is not taken for its best. Only of workers seen within a minute.",
            labels=("model", "worker", "than"),
        )
        for name, state in sorted(self._kernel.workers.items()):
            seen = self._slower(name)
            if seen is not None and seen.seen_ago_s < OUTDATED_S:
                family.add_metric((state.worker.model, name, "itself"), seen.than_itself)
                family.add_metric((state.worker.model, name, "like"), seen.than_like)
        yield family
