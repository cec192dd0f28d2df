"""Who finds more of the prompts in KV caches, and whose first tokens come sooner, in real chats?

    PACELINE_DATA=FOLDER python bench/mooncake.py [--seeds N] [--loads 1,2] [--policy NAME ...]
                                                  [--workers N]

Plays `mooncake.yaml` in the simulator with the conversation trace of Mooncake's FAST'25 release
(https://github.com/kvcache-ai/Mooncake): 12,031 requests in an hour, of 12,000 prompt tokens each
on average; FOLDER has it as mooncake_conversation.jsonl. The hit rate is by prompt tokens of
requests that began, as the engines counted them. Prints means with 95 % intervals over seeds, and
a JSON line. All is simulation.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import defaultdict
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from paceline.domain.errors import ConfigError
from paceline.simulator.cli import plan
from paceline.simulator.compare import Estimate, estimate
from paceline.simulator.flight import Flight
from paceline.simulator.many import Job, play_all
from paceline.simulator.result import Result
from paceline.simulator.simulation import Simulation

SCENARIO = Path(__file__).with_suffix(".yaml")
POLICIES = ("headroom", "prefix-affinity", "kv-cost", "least-requests")


class Figures(msgspec.Struct, frozen=True):
    """Of one run, what the table shows."""

    hits: float
    """Share of the prompt tokens that were in the cache of the worker that began the answer."""
    ttft_mean_s: float
    ttft_p50_s: float
    ttft_p90_s: float
    ttft_p99_s: float
    itl_mean_s: float
    attainment: float
    spread: float
    """Requests of the busiest worker, in those of the mean one."""


class Counting(Simulation):
    """A simulation that counts what was cached."""

    prompt = cached = 0

    def _ended(self, flight: Flight, how: str) -> None:
        super()._ended(flight, how)
        if flight.arrival.at_s >= self.scenario.warmup_s and flight.first_at < float("inf"):
            self.prompt += flight.arrival.prompt_tokens
            self.cached += min(flight.cached_tokens, flight.arrival.prompt_tokens)


def figures(job: Job) -> Figures:
    simulation = Counting(job.scenario, job.policy, job.seed, job.profiles)
    result: Result = simulation.run()
    ttft, itl = result.total.ttft_s, result.total.itl_s
    counts = [use.requests for use in result.workers.values()]
    return Figures(
        simulation.cached / max(simulation.prompt, 1),
        ttft.mean or 0.0,
        ttft.p50 or 0.0,
        ttft.p90 or 0.0,
        ttft.p99 or 0.0,
        itl.mean or 0.0,
        result.attainment,
        max(counts) * len(counts) / sum(counts),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--loads", default="1", help="times as fast as the trace, with commas")
    parser.add_argument("--policy", action="append", help="instead of the usual four")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    asked = parser.parse_args()
    policies = asked.policy or POLICIES
    try:
        jobs = plan(SCENARIO, policies=policies, seeds=asked.seeds, sweeps=[("load", asked.loads)])
    except ConfigError as error:
        sys.exit(f"{error}")
    found: dict[tuple[str, str], list[Figures]] = defaultdict(list)
    for job, result in zip(jobs, play_all(jobs, asked.workers, play=figures), strict=True):
        found[job.at.get("load", asked.loads), job.policy].append(result)
    results = []
    for load in asked.loads.split(","):
        table = Table(title=f"Mooncake conversations, {load} times as fast")
        for column in ("", "hit rate, %", "TTFT mean, ms", "p50", "p90", "p99", "ITL mean, ms"):
            table.add_column(column, justify="right" if column else "left")
        table.add_column("kept, %", justify="right")
        table.add_column("busiest worker", justify="right")
        for policy in policies:
            runs = found[load, policy]
            row = {name: estimate([getattr(run, name) for run in runs]) for name in FIELDS}
            results.append({"load": load, "policy": policy, **msgspec.to_builtins(row)})
            table.add_row(policy, *(shown(row[name], times) for name, times in FIELDS.items()))
        Console(width=120).print(table)
    print(json.dumps({"bench": "mooncake", "seeds": asked.seeds, "results": results}))


FIELDS = {
    "hits": 100.0,
    "ttft_mean_s": 1e3,
    "ttft_p50_s": 1e3,
    "ttft_p90_s": 1e3,
    "ttft_p99_s": 1e3,
    "itl_mean_s": 1e3,
    "attainment": 100.0,
    "spread": 1.0,
}
"""What the table shows, each in so many of its units."""


def shown(value: Estimate, times: float) -> str:
    margin = "" if value.margin is None else f" ± {_rounded(times * value.margin)}"
    return f"{_rounded(times * value.mean)}{margin}"


def _rounded(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}"


if __name__ == "__main__":
    main()
