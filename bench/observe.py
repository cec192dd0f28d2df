"""What does it cost to know what goes on?

Requests end one after the other, as a gateway reports each: with nothing but its own bookkeeping
(off), and with all that is counted, traced and written down (on). Two seconds of 64 workers with
their streams pass between two looks. Time is that of all threads; the collector is a process of its
own. Prints a table and, last, one JSON line.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from multiprocessing import Process, get_context
from pathlib import Path
from time import monotonic, process_time
from types import SimpleNamespace
from typing import Any

import numpy as np
from msgspec.structs import replace
from rich.console import Console
from rich.table import Table

from paceline.domain.facts import (
    FirstTokenSeen,
    RequestArrived,
    StreamEnded,
    WorkerAdded,
    WorkerReported,
)
from paceline.domain.outcome import Outcome
from paceline.domain.promise import Promise
from paceline.domain.request import Request
from paceline.domain.worker import Worker, WorkerReport
from paceline.gateway.relay import GAP_BOUNDS
from paceline.kernel import Kernel, Settings
from paceline.observe.cluster import Cluster
from paceline.observe.factlog import FactLog
from paceline.observe.logs import configure, request_line
from paceline.observe.metrics import Metrics
from paceline.observe.otel import OpenTelemetry

WORKERS = 64
STREAMS = 16
"""On each worker, all the time."""
TENANTS = 20
TIERS = ("premium", "standard", "batch")
FACTS = (RequestArrived, FirstTokenSeen, StreamEnded)
"""Written down of a request; steps come on top, and are the kernel's."""


class Collector(BaseHTTPRequestHandler):
    def log_message(self, *_: Any) -> None: ...

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()


def collect(server: HTTPServer) -> None:
    server.serve_forever()


@contextmanager
def collector() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Collector)
    process: Process = get_context("fork").Process(target=collect, args=(server,), daemon=True)  # type: ignore[assignment]
    process.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        process.terminate()


def fleet() -> Kernel:
    """All workers with their streams."""
    kernel = Kernel(Settings(policy="round-robin"))
    for i in range(WORKERS):
        worker = Worker(f"w{i}", "m", f"http://w{i}", node=f"n{i // 8}", cost_per_hour=4.0)
        kernel.handle(WorkerAdded(worker), 0.0)
        kernel.handle(WorkerReported(worker.id, WorkerReport(healthy=True)), 0.0)
    for i in range(WORKERS * STREAMS):
        kernel.handle(RequestArrived(replace(request(i), id=f"s{i}")), 0.0)
        kernel.handle(FirstTokenSeen(f"s{i}", 0.1), 0.1)
    return kernel


def request(i: int) -> Request:
    tier, tenant = TIERS[i % len(TIERS)], f"t{i % TENANTS}"
    return Request(f"r{i}", "m", tenant, tier, Promise(0.5, 0.04), prompt_tokens=500)


def outcomes(count: int) -> list[Outcome]:
    times = np.random.default_rng(0).lognormal(-1.5, 0.7, count).tolist()
    return [
        Outcome(
            request=request(i),
            worker=f"w{i % WORKERS}",
            status=200,
            error="",
            attempts=1,
            because="least cost",
            predicted=None,
            queued_s=0.001,
            ttft_s=seconds,
            itl_s=seconds / 10,
            stall_s=seconds / 2,
            seconds=2.0,
            prompt_tokens=500,
            cached_tokens=100,
            output_tokens=200,
        )
        for i, seconds in enumerate(times)
    ]


Part = tuple[Callable[[Outcome], object], Callable[[float], object]]
"""What happens with each request, and what at every look."""
LOOK_S = 2


def nothing(_: object) -> None: ...


def microseconds(parts: list[Part], told: list[Outcome], rate: int) -> float:
    """CPU time a request."""
    gc.collect()
    gc.freeze()
    began = process_time()
    for i, outcome in enumerate(told):
        for each, _ in parts:
            each(outcome)
        if i % (LOOK_S * rate) == LOOK_S * rate - 1:
            for _, look in parts:
                look(float((i + 1) // rate))
    return (process_time() - began) / len(told) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--rate", type=int, default=100, help="requests a second")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sample", type=float, default=0.01, help="share that is traced")
    options = parser.parse_args()
    told = outcomes(options.requests)
    log = configure("info", "json", io.BytesIO())
    with collector() as url, tempfile.TemporaryDirectory() as folder:
        kernel = fleet()
        gaps = {
            ("m", tier, w): [0] * (len(GAP_BOUNDS) + 1) for tier in TIERS for w in kernel.workers
        }
        metrics = Metrics(kernel, gaps, GAP_BOUNDS)
        cluster = Cluster(kernel, gaps, lambda tier: 0.99, 0.0)
        otel = OpenTelemetry(url, options.sample)
        facts = FactLog(Path(folder) / "facts.log", 64 * 2**20, 4, lambda continued: b"{}\n")

        def traced(outcome: Outcome) -> None:
            now = monotonic()
            http = SimpleNamespace(path="/v1/chat/completions", headers={})
            otel.begin(outcome.request.id, http)
            life = SimpleNamespace(sent_at=now - 1.9, first_at=now - 1.0, done_at=now)
            otel.closed(life, outcome)

        def noted(outcome: Outcome) -> None:
            name = outcome.request.id
            facts.write(1.0, RequestArrived(outcome.request), ())
            facts.write(1.0, FirstTokenSeen(name, 1.0), ())
            facts.write(1.0, StreamEnded(name, 200, 0.02, 0.1, 500, 100), ())

        def stream(_: float) -> None:
            for counts in gaps.values():
                counts[10] += 5

        off: list[Part] = [
            (metrics.closed, stream),
            (lambda outcome: request_line(log, outcome), nothing),
        ]
        added: dict[str, Part] = {
            "cluster view and cost": (cluster.closed, cluster.look),
            "OpenTelemetry": (traced, nothing),
            "log of facts, without steps": (noted, lambda _: facts.close()),
        }
        runs: dict[str, list[float]] = {}
        for _ in range(options.rounds):
            runs.setdefault("off: metrics and request log", []).append(
                microseconds(off, told, options.rate)
            )
            for name, part in added.items():
                runs.setdefault(name, []).append(microseconds([part], told, options.rate))
            everything = [*off, *added.values()]
            runs.setdefault("on", []).append(microseconds(everything, told, options.rate))
        otel.close()
    best = {name: min(values) for name, values in runs.items()}
    first, *_, last = best
    best["on - off"] = best[last] - best[first]
    table = Table("", "µs a request", title=f"{options.rate} requests a second, {WORKERS} workers")
    table.columns[1].justify = "right"
    for name, value in best.items():
        table.add_row(name, f"{value:.1f}")
    Console().print(table)
    print(json.dumps({"bench": "observe", "rate": options.rate, "us_per_request": best}))


if __name__ == "__main__":
    main()
