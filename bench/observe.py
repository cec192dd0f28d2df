"""What does it cost to know what goes on?

    python bench/observe.py [--rate 100] [--workers 64] [--seconds 30] [--rounds 3]

A simulated fleet is recorded fact by fact, each step apart as a live gateway sees it, and replayed
into fresh kernels with all that looks on. Each call of each part is timed: with steps, with what
requests bring about, and with what comes by the clock, however many requests there are: engines'
reports and looks, every two seconds, and timers. Of each call the least time of all rounds counts,
since other work on the machine can only add to it, less what it takes to look at the clock. The
kernel's own time stands beside. The collector is a process of its own. Prints a table and, last,
one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import product
from math import inf
from multiprocessing import Process, get_context
from pathlib import Path
from random import Random
from time import perf_counter, thread_time, time
from types import SimpleNamespace
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from paceline.domain.commands import Command, Dispatch
from paceline.domain.facts import (
    Fact,
    FirstTokenSeen,
    RequestArrived,
    StepsSeen,
    StreamEnded,
    TimerFired,
    WorkerReported,
)
from paceline.domain.outcome import Outcome
from paceline.gateway.relay import GAP_BOUNDS
from paceline.kernel import Kernel, Settings
from paceline.observe.cluster import Cluster
from paceline.observe.diagnosis import Diagnosis
from paceline.observe.ended import AT_ONCE, SOON_S, Over
from paceline.observe.factlog import FactLog
from paceline.observe.logs import configure, request_lines
from paceline.observe.metrics import Metrics
from paceline.observe.otel import OpenTelemetry
from paceline.observe.sheet import Sheets
from paceline.observe.stalls import Stalls
from paceline.simulator.scenario import Network, Requests, Scenario, SimTier, Workers
from paceline.simulator.simulation import Simulation

TIERS = {
    "premium": SimTier(ttft_s=0.5, itl_s=0.04),
    "standard": SimTier(ttft_s=2.0, itl_s=0.08),
    "batch": SimTier(),
}
TENANTS = 6
"""Two of each tier."""
CHAT = "/v1/chat/completions"
WARM_S = 10.0
"""Until nearly all series are known, and the engines have their streams."""
LOOK_S = 2.0

KERNEL = "beside: the kernel"
COLUMNS = {StepsSeen: "steps", WorkerReported: "looks", TimerFired: "looks"}
"""Where what a fact costs is counted; all others are of a request."""

Log = list[tuple[float, Fact]]
Times = defaultdict[tuple[str, str], list[float]]
"""Seconds of each call, by part and by what it was about: steps, requests or looks."""


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


def recorded(rate: float, workers: int, seconds: float) -> Log:
    """What a busy fleet's kernel is told, as long as requests come: about as many end."""
    log: Log = []

    def note(now: float, fact: Fact, commands: list[Command]) -> None:
        if now < seconds:
            log.append((now, fact))

    kinds = [(tier, f"t{i}") for i, tier in enumerate([*TIERS] * (TENANTS // len(TIERS)))]
    each = rate / len(kinds)
    scenario = Scenario(
        about="Chat of many tenants.",
        seconds=seconds,
        workers=(Workers(profile="h100-llama-70b-tp4", count=workers, cost_per_hour=4.0),),
        tiers=TIERS,
        requests=tuple(
            Requests(rate=each, tier=tier, tenant=tenant, prompt=(500, 2000), output=(200, 500))
            for tier, tenant in kinds
        ),
        network=Network(jitter_s=0.0003),
    )
    Simulation(scenario, "least-requests", 1, log=note).run()
    return log


class Life:
    """A request's way, as its exchange knows it."""

    def __init__(self, fact: RequestArrived, now: float) -> None:
        self.request, self.at = fact.request, now
        self.http = SimpleNamespace(path=CHAT, headers={})
        self.sent: Dispatch | None = None
        self.sent_at = self.first_at = self.done_at = now

    def dispatched(self, command: Dispatch, now: float) -> None:
        self.sent, self.sent_at = command, now

    def outcome(self, fact: StreamEnded, now: float) -> Outcome:
        self.done_at = now
        sent = self.sent
        return Outcome(
            request=self.request,
            worker=sent.worker_id if sent is not None else "",
            status=200,
            error="",
            attempts=1,
            because=sent.because if sent is not None else "",
            predicted=sent.predicted if sent is not None else None,
            queued_s=self.sent_at - self.at,
            ttft_s=self.first_at - self.at,
            itl_s=fact.itl_s,
            stall_s=fact.stall_s,
            seconds=now - self.at,
            prompt_tokens=fact.prompt_tokens,
            cached_tokens=fact.cached_tokens,
            output_tokens=fact.output_tokens,
            path=CHAT,
        )


class Watching:
    """All that look on at one kernel."""

    def __init__(self, kernel: Kernel, url: str, sample: float, folder: Path) -> None:
        self._kernel = kernel
        self._gaps: dict[tuple[str, str, str], list[int]] = {}
        self._now = 0.0
        self._loop = asyncio.new_event_loop()
        self._lines = (folder / "lines").open("wb")
        configure("info", "json", self._lines)
        stalls = Stalls(kernel)
        diagnosis = Diagnosis(kernel, stalls, (lambda: self._now, time))
        cluster = Cluster(kernel, self._gaps, lambda tier: 0.99, 0.0)
        facts = FactLog(folder / "facts.log", 64 * 2**20, 4, lambda continued: b"{}\n")
        self._otel = OpenTelemetry(url, sample, Random(0).random)
        metrics = Metrics(kernel, self._gaps, GAP_BOUNDS)
        self._sheets = Sheets()
        self._parts: dict[str, dict[str, Callable[..., object]]] = {
            "causes": {"saw": stalls.saw},
            "findings": {"look": lambda: self._loop.run_until_complete(diagnosis.refreshed())},
            "rows for all who count": {"over": self._write_down},
            "cluster view and cost": {
                "over": cluster.batches.over,
                "count": cluster.count,
                "look": lambda: cluster.look(self._now),
            },
            "Prometheus metrics": {"count": metrics.count},
            "request log": {"over": said},
            "OpenTelemetry": {
                "saw": self._otel.saw,
                "begin": self._otel.begin,
                "over": self._otel.over,
                "count": self._otel.count,
            },
            "log of facts": {"saw": facts.write, "look": facts.close},
        }
        self.took: Times = defaultdict(list)

    def tell(self, what: str, column: str, *told: object) -> None:
        """All who want to know."""
        clock = thread_time if what == "look" else perf_counter  # the one is exact, and slow
        for name, part in self._parts.items():
            listener = part.get(what)
            if listener is not None:
                began = clock()
                listener(*told)
                self.took[name, column].append(clock() - began)

    def look(self, now: float) -> None:
        self._now = now
        for key in product(["m"], TIERS, self._kernel.workers):
            self._gaps.setdefault(key, [0] * (len(GAP_BOUNDS) + 1))[10] += 5  # as the relay does
        self.tell("look", "looks")

    def _write_down(self, over: Over) -> None:
        for _, outcome in over:
            self._sheets.add(outcome)

    def count(self) -> None:
        if self._sheets:
            self.tell("count", "requests", self._sheets.take())

    def close(self) -> None:
        self._loop.close()
        self._otel.close()
        self._lines.close()


def said(over: Over) -> None:
    request_lines((life.done_at, outcome) for life, outcome in over)


def replay(log: Log, kernel: Kernel, watching: Watching) -> Times:
    """What each call took, from when the fleet is warm."""
    handle, lives, took = kernel.handle, dict[str, Life](), watching.took
    over: list[tuple[Life, Outcome]] = []
    look_at, warm_at = LOOK_S, WARM_S
    for now, fact in log:
        if now >= warm_at:
            gc.collect()
            gc.freeze()
            warm_at = inf
            took.clear()
        column = COLUMNS.get(type(fact), "requests")
        began = perf_counter()
        commands = handle(fact, now)
        took[KERNEL, column].append(perf_counter() - began)
        watching.tell("saw", column, now, fact, commands)
        if isinstance(fact, RequestArrived):
            lives[fact.request.id] = Life(fact, now)
            watching.tell("begin", column, fact.request.id, lives[fact.request.id].http)
        elif isinstance(fact, FirstTokenSeen):
            lives[fact.request_id].first_at = fact.at
        elif isinstance(fact, StreamEnded):
            life = lives.pop(fact.request_id)
            over.append((life, life.outcome(fact, now)))
        if len(over) == AT_ONCE or (over and now - over[0][0].done_at >= SOON_S):
            watching.tell("over", "requests", over)
            over.clear()
        for command in commands:
            if isinstance(command, Dispatch):
                lives[command.request_id].dispatched(command, now)
        if now >= look_at:
            look_at = now + LOOK_S
            watching.count()
            watching.look(now)
    return took


def clock_s() -> float:
    """What it takes to look at the clock, which is in every time taken."""
    return min(-perf_counter() + perf_counter() for _ in range(100_000))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rate", type=float, default=100.0, help="requests a second")
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sample", type=float, default=0.01, help="share that is traced")
    options = parser.parse_args()
    log = recorded(options.rate, options.workers, options.seconds)
    counted = [fact for now, fact in log if now >= WARM_S]
    requests = sum(type(fact) is RequestArrived for fact in counted)
    steps = [step for fact in counted if type(fact) is StepsSeen for step in fact.steps]
    tokens = sum(step.tokens * step.count for step in steps)
    rounds: list[Times] = []
    with collector() as url, tempfile.TemporaryDirectory() as folder:
        for _ in range(options.rounds):
            kernel = Kernel(Settings(policy="least-requests"))
            watching = Watching(kernel, url, options.sample, Path(folder))
            rounds.append(replay(log, kernel, watching))
            watching.close()
    counts, tick_s = {"requests": requests, "looks": requests, "steps": tokens}, clock_s()
    least: dict[str, dict[str, float]] = {}
    for name, column in rounds[0]:
        calls = np.min([took[name, column] for took in rounds], axis=0) - tick_s
        least.setdefault(name, dict.fromkeys(counts, 0.0))
        least[name][column] = 1e6 * float(calls.sum()) / counts[column]
    kernel_us = least.pop(KERNEL)
    together = {column: sum(us[column] for us in least.values()) for column in counts}
    least |= {"together": together, KERNEL: kernel_us}
    table = Table(
        "",
        "µs a request",
        "by the clock, µs a request",
        "µs a token",
        title=f"{options.rate:g} requests a second, {options.workers} workers, "
        f"{len(steps) / requests:.0f} steps and {tokens / requests:.0f} tokens a request",
    )
    for name, us in least.items():
        table.add_row(name, *(f"{us[column]:.2f}" for column in counts))
    Console().print(table)
    told = {"bench": "observe", "rate": options.rate, "workers": options.workers, "us": least}
    print(json.dumps(told))


if __name__ == "__main__":
    main()
