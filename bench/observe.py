"""What does it cost to know what goes on?

    python bench/observe.py [--rate 100] [--workers 64] [--seconds 30] [--rounds 3]

A simulated fleet is recorded fact by fact, each step apart as a live gateway sees it, and replayed
into fresh kernels: by itself (off), and with all that looks on (on). What each part takes is timed
within the replay: with each step, with all else that requests bring about, and with the looks every
two seconds. The least of all rounds, since other work on the machine can only add to it. The
collector is a process of its own. Prints tables and, last, one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from math import inf
from multiprocessing import Process, get_context
from pathlib import Path
from statistics import median
from time import process_time, thread_time, time
from types import SimpleNamespace
from typing import Any

from rich.console import Console
from rich.table import Table

from paceline.domain.commands import Command, Dispatch
from paceline.domain.facts import Fact, FirstTokenSeen, RequestArrived, StepsSeen, StreamEnded
from paceline.domain.outcome import Outcome
from paceline.gateway.relay import GAP_BOUNDS
from paceline.kernel import Kernel, Settings
from paceline.observe.cluster import Cluster
from paceline.observe.diagnosis import Diagnosis
from paceline.observe.ended import AT_ONCE
from paceline.observe.factlog import FactLog
from paceline.observe.logs import configure, request_lines
from paceline.observe.metrics import Metrics
from paceline.observe.otel import OpenTelemetry
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
WARM_S = 10.0
"""Until nearly all series are known, and the engines have their streams."""
LOOK_S = 2.0

Log = list[tuple[float, Fact]]


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
    """What a busy fleet's kernel is told."""
    log: Log = []

    def note(now: float, fact: Fact, commands: list[Command]) -> None:
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
        self.sent: Dispatch | None = None
        self.sent_at = self.first_at = self.done_at = now

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
        )


class Part:
    """One that looks on, and how long it takes."""

    def __init__(self, saw: Any = None, over: Any = None, begin: Any = None) -> None:
        self.saw, self.over, self.begin = saw, over, begin
        self.look: Callable[[float], object] | None = None
        self.request_s = self.step_s = self.look_s = 0.0


def timed(work: Callable[..., object], *told: object) -> float:
    """CPU seconds of this thread."""
    began = thread_time()
    work(*told)
    return thread_time() - began - CLOCK_S


CLOCK_S = 0.0
CLOCK_S = median(timed(lambda: None) for _ in range(10_000))
"""What timing takes by itself."""


class Watchers:
    """All of them, around one kernel."""

    def __init__(self, kernel: Kernel, url: str, sample: float, folder: Path) -> None:
        self.gaps: dict[tuple[str, str, str], list[int]] = {}
        self.now = 0.0
        stalls = Stalls(kernel)
        metrics = Metrics(kernel, self.gaps, GAP_BOUNDS)
        cluster = Cluster(kernel, self.gaps, lambda tier: 0.99, 0.0)
        diagnosis = Diagnosis(kernel, stalls, (lambda: self.now, time))
        self.otel = otel = OpenTelemetry(url, sample)
        facts = FactLog(folder / "facts.log", 64 * 2**20, 4, lambda continued: b"{}\n")
        self.off = (folder / "lines").open("wb")
        configure("info", "json", self.off)

        def begin(name: str) -> None:
            otel.begin(name, SimpleNamespace(path="/v1/chat/completions", headers={}))

        self.parts = {
            "causes": Part(stalls.saw),
            "cluster view": Part(over=cluster.over),
            "Prometheus metrics": Part(over=metrics.over),
            "request log": Part(
                over=lambda over: request_lines((x.done_at, outcome) for x, outcome in over)
            ),
            "OpenTelemetry": Part(over=otel.over, begin=begin),
            "log of facts": Part(facts.write),
            "diagnosis": Part(),
        }
        self.parts["cluster view"].look = cluster.look
        self.parts["log of facts"].look = lambda now: facts.close()
        self.loop = asyncio.new_event_loop()
        self.parts["diagnosis"].look = lambda now: self.loop.run_until_complete(
            diagnosis.refreshed()
        )

    def looked(self, kernel: Kernel, now: float) -> None:
        self.now = now
        for worker_id in kernel.workers:
            for tier in TIERS:
                counts = self.gaps.setdefault(("m", tier, worker_id), [0] * (len(GAP_BOUNDS) + 1))
                counts[10] += 5

    def close(self) -> None:
        self.loop.close()
        self.otel.close()
        self.off.close()


def unwatched(log: Log) -> float:
    """CPU seconds of the kernel alone, and of the bench's own books."""
    return replay(log, None)


def replay(log: Log, watchers: Watchers | None, kernel: Kernel | None = None) -> float:
    """CPU seconds of a replay."""
    kernel = kernel or Kernel(Settings(policy="least-requests"))
    handle, lives = kernel.handle, dict[str, Life]()
    parts = list(watchers.parts.values()) if watchers is not None else []
    over: list[tuple[Life, Outcome]] = []
    saws = [part for part in parts if part.saw is not None]
    look_at, begun, warm_at = LOOK_S, 0.0, WARM_S
    for now, fact in log:
        if now >= warm_at:
            warm_at = inf
            gc.collect()
            gc.freeze()
            begun = process_time()
            for part in parts:
                part.request_s = part.step_s = part.look_s = 0.0
        commands = handle(fact, now)
        kind = type(fact)
        if kind is StepsSeen:
            for part in saws:
                part.step_s += timed(part.saw, now, fact, commands)
        else:
            for part in saws:
                part.request_s += timed(part.saw, now, fact, commands)
        if kind is RequestArrived:
            lives[fact.request.id] = Life(fact, now)
            for part in parts:
                if part.begin is not None:
                    part.request_s += timed(part.begin, fact.request.id)
        elif kind is FirstTokenSeen:
            lives[fact.request_id].first_at = fact.at
        elif kind is StreamEnded:
            life = lives.pop(fact.request_id)
            outcome = life.outcome(fact, now)
            over.append((life, outcome))
            if len(over) == AT_ONCE:
                for part in parts:
                    if part.over is not None:
                        part.request_s += timed(part.over, over)
                over.clear()
        for command in commands:
            if type(command) is Dispatch:
                life = lives[command.request_id]
                life.sent, life.sent_at = command, now
        if now >= look_at:
            look_at = now + LOOK_S
            if watchers is not None:
                watchers.looked(kernel, now)
            for part in parts:
                if part.look is not None:
                    part.look_s += timed(part.look, now)
    return process_time() - begun


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
    print(f"{requests} requests, {len(steps)} steps, {tokens} tokens")
    off, on = [], []
    times: dict[str, list[tuple[float, float, float]]] = {}
    with collector() as url, tempfile.TemporaryDirectory() as folder:
        for _ in range(options.rounds):
            off.append(unwatched(log))
            kernel = Kernel(Settings(policy="least-requests"))
            watchers = Watchers(kernel, url, options.sample, Path(folder))
            on.append(replay(log, watchers, kernel))
            watchers.close()
            for name, part in watchers.parts.items():
                seen = (part.request_s / requests, part.look_s / requests, part.step_s / tokens)
                times.setdefault(name, []).append(seen)
    table = Table("", "µs a request", "looks, µs a request", "µs a token")
    sums = [0.0, 0.0, 0.0]
    result = {}
    for name, seen in times.items():
        least = [1e6 * min(column) for column in zip(*seen, strict=True)]
        sums = [a + b for a, b in zip(sums, least, strict=True)]
        result[name] = least
        table.add_row(name, *(f"{us:.2f}" for us in least))
    table.add_row("sum", *(f"{us:.2f}" for us in sums))
    Console().print(table)
    extra = (min(on) - min(off)) / requests * 1e6
    print(f"on - off: {extra:.1f} µs of CPU a request, with its tokens")
    print(json.dumps({"bench": "observe", "rate": options.rate, "parts": result, "on_off": extra}))


if __name__ == "__main__":
    main()
