"""How long does the kernel take to choose a worker?

`RequestArrived` is timed in-process, for every policy and several sizes of fleet. Each worker has
streams with promises and a learned timing model, and holds some prompts in its cache. Two moments:
`calm`, a single worker has shown a step since the last decision, and `busy`, all have, so that the
whole view is written anew. Prints a table and, last, one JSON line.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Iterator

import numpy as np
from rich.console import Console
from rich.table import Table

from paceline.domain.facts import (
    FirstTokenSeen,
    RequestArrived,
    Step,
    StepsSeen,
    StreamEnded,
    WorkerAdded,
    WorkerReported,
)
from paceline.domain.promise import Promise
from paceline.domain.request import Request
from paceline.domain.worker import Worker, WorkerReport
from paceline.kernel import Kernel, Settings
from paceline.policy.route import POLICIES

STREAMS_EACH = 16
"""Streams that each worker serves all the time."""
STEP_S = 0.02
PROMPTS = 200
"""Different prompts; the first half of each is shared with nine others."""
BLOCKS = 32
"""Of 256 bytes: a prompt of 8 KB."""


class Fleet:
    """A kernel with workers that have been busy for a while, on a clock of its own."""

    def __init__(self, policy: str, size: int, rng: np.random.Generator) -> None:
        self.kernel = Kernel(Settings(policy=policy))
        self.rng = rng
        self.now = 0.0
        self.serial = 0
        self.ids = [f"worker-{i}" for i in range(size)]
        report = WorkerReport(healthy=True, kv_capacity_tokens=500_000, block_size=16)
        for worker_id in self.ids:
            worker = Worker(id=worker_id, model="bench", url="http://127.0.0.1", kind="vllm")
            self.kernel.handle(WorkerAdded(worker), self.now)
            self.kernel.handle(WorkerReported(worker_id, report), self.now)
        self.residents = [self.start() for _ in range(size * STREAMS_EACH)]
        for _ in range(20):
            self.step(self.ids)

    def request(self) -> Request:
        self.serial += 1
        prompt = self.serial % PROMPTS
        shared = tuple(hash((prompt // 10, i)) for i in range(BLOCKS // 2))
        own = tuple(hash((prompt, i)) for i in range(BLOCKS // 2, BLOCKS))
        return Request(
            id=str(self.serial),
            model="bench",
            tenant=f"tenant-{prompt % 7}",
            tier="standard",
            promise=Promise(ttft_s=2.0, itl_s=0.08),
            prompt_bytes=BLOCKS * 256,
            max_tokens=512,
            blocks=shared + own,
            seed=int(self.rng.integers(1 << 62)),
        )

    def start(self) -> str:
        """A request that is served until `end`."""
        request = self.request()
        self.kernel.handle(RequestArrived(request), self.now)
        self.show_first_token(request.id)
        return request.id

    def show_first_token(self, request_id: str) -> None:
        self.now += STEP_S / 10
        self.kernel.handle(FirstTokenSeen(request_id, self.now), self.now)

    def end(self, request_id: str) -> None:
        self.kernel.handle(StreamEnded(request_id, output_tokens=200, itl_s=STEP_S), self.now)

    def step(self, ids: list[str]) -> None:
        """These workers end a step."""
        self.now += STEP_S
        for worker_id in ids:
            seconds = STEP_S * float(self.rng.uniform(0.9, 1.1))
            step = Step(self.now, seconds, STREAMS_EACH, STREAMS_EACH)
            self.kernel.handle(StepsSeen(worker_id, (step,)), self.now)

    def decisions(self, times: int, busy: bool) -> Iterator[int]:
        """The nanoseconds of each decision, each with the same number of streams around it."""
        for i in range(times):
            self.step(self.ids if busy else [self.ids[i % len(self.ids)]])
            arrived = RequestArrived(self.request())
            began = time.perf_counter_ns()
            self.kernel.handle(arrived, self.now)
            yield time.perf_counter_ns() - began
            self.show_first_token(arrived.request.id)
            oldest = self.residents[i % len(self.residents)]
            self.residents[i % len(self.residents)] = arrived.request.id
            self.end(oldest)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, nargs="+", default=[8, 64, 256])
    parser.add_argument("--policy", nargs="+", choices=list(POLICIES), default=list(POLICIES))
    parser.add_argument("--times", type=int, default=300, help="decisions of each kind")
    args = parser.parse_args()
    table = Table(title="Time of one decision, in µs")
    for column in ("policy", "workers", "calm p50", "p99", "busy p50", "p99"):
        table.add_column(column, justify="left" if column == "policy" else "right")
    results = []
    for policy in args.policy:
        table.add_section()
        for size in args.workers:
            fleet = Fleet(policy, size, np.random.default_rng(size))
            gc.collect()
            row: dict[str, float] = {}
            for moment in ("calm", "busy"):
                times = list(fleet.decisions(args.times, busy=moment == "busy"))
                p50, p99 = np.percentile(times, [50, 99]) / 1e3
                row |= {f"{moment}_p50_us": round(p50, 1), f"{moment}_p99_us": round(p99, 1)}
            table.add_row(policy, str(size), *(f"{value:,.0f}" for value in row.values()))
            results.append({"policy": policy, "workers": size, **row})
    Console().print(table)
    print(json.dumps({"bench": "decision", "results": results}))


if __name__ == "__main__":
    main()
