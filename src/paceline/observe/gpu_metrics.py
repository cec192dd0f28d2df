"""What does Prometheus get to know of the GPUs under the workers?

Little, and by worker: all else has their exporter itself. It is what lets a panel show a worker's
lateness beside what its GPUs did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from paceline.domain.gpu import Gpu
from paceline.kernel import Kernel
from paceline.policy.gpus import activity

LABELS = ("model", "worker")
SHARES = {
    "gpu_utilisation_share": "Share of time in which anything ran on a worker's GPUs.",
    "gpu_sm_active_share": "Share of time in which their multiprocessors had work.",
    "gpu_tensor_active_share": "Share of time in which their tensor cores worked.",
    "gpu_memory_active_share": "Share of time in which their memory was read or written.",
}


class GpuMetrics(Collector):
    """Gauges of workers whose GPUs somebody tells of, read when asked."""

    def __init__(self, kernel: Kernel, gpus: Callable[[str], Sequence[Gpu]]) -> None:
        self._kernel = kernel
        self._gpus = gpus

    def collect(self) -> Iterator[Metric]:
        workers = sorted(self._kernel.workers.items())
        known = {(w.worker.model, name): seen for name, w in workers if (seen := self._gpus(name))}
        for name, text in SHARES.items():
            family = GaugeMetricFamily(f"paceline_worker_{name}", text, labels=LABELS)
            for labels, gpus in known.items():
                if (share := activity(gpus).get(name)) is not None:
                    family.add_metric(labels, share)
            yield family
        family = GaugeMetricFamily(
            "paceline_worker_gpus_lowered",
            "GPUs of a worker whose clock is lowered, by heat, want of power or hardware.",
            labels=LABELS,
        )
        for labels, gpus in known.items():
            family.add_metric(labels, sum(1 for gpu in gpus if gpu.lowered_by))
        yield family
