"""What do operators and Prometheus see of the GPUs under the workers?"""

from __future__ import annotations

from starlette.testclient import TestClient
from test_admin import Idle, gateway_kernel

from paceline.domain.gpu import Gpu
from paceline.observe.admin import admin_app
from paceline.observe.gpu_metrics import GpuMetrics
from paceline.observe.metrics import Metrics

HOT = Gpu(0, "H100", 0.9, 0.5, clock_mhz=1095.0, best_clock_mhz=1980.0, reasons=("heat_hardware",))
WELL = Gpu(1, "H100", 0.7, 0.3, clock_mhz=1980.0, best_clock_mhz=1980.0)


def client() -> TestClient:
    """Of a gateway that knows the GPUs of the first of its two workers."""
    kernel, known = gateway_kernel(), {"w0": (HOT, WELL)}
    metrics = Metrics(kernel, {}, [0.1])
    metrics.also(GpuMetrics(kernel, lambda name: known.get(name, ())))
    app = admin_app(kernel, metrics, Idle(), lambda: 0.0, gpus=lambda name: known.get(name, ()))
    return TestClient(app)


def test_each_worker_is_shown_with_its_gpus() -> None:
    w0, w1 = client().get("/paceline/v1/workers").json()["workers"]
    assert [gpu["clock_mhz"] for gpu in w0["gpus_seen"]] == [1095.0, 1980.0]
    assert w0["gpus_seen"][0]["reasons"] == ["heat_hardware"]
    assert w1["gpus_seen"] == []


def test_prometheus_gets_one_series_a_worker_and_none_of_those_that_nobody_tells_of() -> None:
    lines = [line for line in client().get("/metrics").text.splitlines() if "_gpu" in line]
    assert [line for line in lines if not line.startswith("#")] == [
        'paceline_worker_gpu_utilisation_share{model="m",worker="w0"} 0.8',
        'paceline_worker_gpu_sm_active_share{model="m",worker="w0"} 0.4',
        'paceline_worker_gpus_lowered{model="m",worker="w0"} 1.0',
    ]
