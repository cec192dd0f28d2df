"""How long does the waiting room take for each thing that is asked of it?

Some requests wait all the time, of three tiers and many tenants, a part of them lost; each round
one comes, one is sent, one's client leaves, and time goes on so that promises are lost as well.
Prints a table of the microseconds of each operation and, last, one JSON line. `worst` holds the
rare sweep that clears old entries out of a heap, and whatever else the machine was doing.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import time
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table

from paceline.domain.promise import Promise
from paceline.domain.request import Request
from paceline.kernel.waiting import Waiting

TIERS = (("premium", 8.0, 0.5), ("standard", 2.0, 2.0), ("batch", 1.0, 600.0))
"""Name, weight, seconds to the first token."""
TENANTS = 200
PER_SECOND = 200.0
"""Requests that come in a second."""
OPERATIONS = ("add", "heads", "taken", "served", "discard", "newly_lost", "ahead_of")


class Item(msgspec.Struct, frozen=True):
    request: Request
    arrived_at: float
    deadline: float
    needs_s: float
    cost: float


class Room:
    """A waiting room that always holds the same number of requests."""

    def __init__(self, size: int) -> None:
        self.waiting: Waiting[Item] = Waiting()
        self.rng = random.Random(size)
        self.now = 0.0
        self.ids: list[str] = []
        self.serial = 0
        self.times: dict[str, list[int]] = {name: [] for name in OPERATIONS}
        while len(self.waiting) < size:
            self.now += 1 / PER_SECOND
            self.waiting.newly_lost(self.now)
            self.come()

    def item(self) -> Item:
        self.serial += 1
        tier, weight, ttft_s = self.rng.choice(TIERS)
        request = Request(
            id=f"request-{self.serial}",
            model="bench",
            tenant=f"tenant-{int(self.rng.paretovariate(0.5)) % TENANTS}",
            tier=tier,
            promise=Promise(ttft_s=ttft_s),
            weight=weight,
        )
        cost = self.rng.lognormvariate(6.5, 1.0)
        return Item(request, self.now, self.now + ttft_s, cost / 10_000, cost)

    def come(self) -> None:
        item = self.item()
        self.timed("ahead_of", self.waiting.ahead_of, item)
        self.timed("add", self.waiting.add, item)
        self.ids.append(item.request.id)

    def leave(self) -> None:
        """Some client among those that wait goes away."""
        while True:
            at = self.rng.randrange(len(self.ids))
            self.ids[at], self.ids[-1] = self.ids[-1], self.ids[at]
            leaver = self.ids.pop()
            if leaver in self.waiting:
                self.timed("discard", self.waiting.discard, leaver)
                return

    def round(self) -> None:
        self.now += 1 / PER_SECOND
        self.timed("newly_lost", self.waiting.newly_lost, self.now)
        first = self.timed("heads", self.waiting.heads, self.now)[0]
        self.timed("taken", self.waiting.taken, first)
        self.timed("served", self.waiting.served, first, first.cost)
        self.leave()
        self.come()
        self.come()

    def timed(self, name: str, operation: Callable[..., Any], *arguments: object) -> Any:
        began = time.perf_counter_ns()
        result = operation(*arguments)
        self.times[name].append(time.perf_counter_ns() - began)
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--waiting", type=int, nargs="+", default=[10, 1_000, 10_000, 100_000])
    parser.add_argument("--rounds", type=int, default=20_000)
    args = parser.parse_args()
    table = Table(title="Time of one operation, in µs")
    for column in ("operation", "waiting", "p50", "p99", "mean", "worst"):
        table.add_column(column, justify="left" if column == "operation" else "right")
    results = []
    for size in args.waiting:
        room = Room(size)
        for times in room.times.values():
            times.clear()
        gc.collect()
        for _ in range(args.rounds):
            room.round()
        table.add_section()
        for name, times in room.times.items():
            p50, p99 = np.percentile(times, [50, 99]) / 1e3
            row = {"p50_us": p50, "p99_us": p99, "mean_us": np.mean(times) / 1e3}
            row["worst_us"] = max(times) / 1e3
            table.add_row(name, f"{size:,}", *(f"{value:,.1f}" for value in row.values()))
            rounded = {key: round(float(value), 1) for key, value in row.items()}
            results.append({"operation": name, "waiting": size, **rounded})
    Console().print(table)
    print(json.dumps({"bench": "waiting", "results": results}))


if __name__ == "__main__":
    main()
