"""How many promises are kept while one of four workers is three times slower for 20 s of 60?

    python bench/slowed_worker.py [--seeds 3] [--policy headroom …]

Four emulated Llama-70B on four H100 each, live gateways, the same requests for every policy, at
60 % of the rate at which the fleet would just keep 95 % of its promises. The policies' fleets run
side by side, so that a noisy machine is as noisy for all. Refused and failed requests count as
missed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from random import Random
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

import aiohttp
import uvloop
import yaml
from rich.console import Console
from rich.table import Table

from paceline.demo.stage import free_ports, process, ready, url
from paceline.domain.promise import Promise
from paceline.workload.drive import DriveSettings, Progress, drive
from paceline.workload.generate import independent, lognormal
from paceline.workload.outcome import Outcome

POLICIES = ("headroom", "least-requests", "round-robin")
PROFILE, MODEL, WORKERS = "h100-llama-70b-tp4", "llama-70b", 4
PROMISE = Promise(ttft_s=1.0, itl_s=0.04)
RATE, SECONDS = 17.0, 60.0
SLOW_FROM_S, SLOW_S, FACTOR = 20.0, 20.0, 3.0
PROMPTS, ANSWERS = lognormal(800, 5100, most=8000), lognormal(150, 600, most=1000)


async def play(policy: str, seed: int, folder: Path) -> list[Outcome]:
    """The requests of one seed under one policy."""
    ports = free_ports(WORKERS + 2)
    engines = [
        {"profile": PROFILE, "port": port, "model": MODEL, "seed": 10 * seed + i}
        for i, port in enumerate(ports[:WORKERS])
    ]
    gateway: dict[str, Any] = {
        "listen": f"127.0.0.1:{ports[-2]}",
        "admin": f"127.0.0.1:{ports[-1]}",
        "models": [{"name": MODEL, "workers": [{"url": url(p)} for p in ports[:WORKERS]]}],
        "tiers": {"standard": {"ttft_s": PROMISE.ttft_s, "itl_s": PROMISE.itl_s}},
        "routing": {"policy": policy},
        "logging": {"level": "warning"},
    }
    with ExitStack() as running:
        for command, content, health in (
            ("engine", {"engines": engines}, url(ports[0]) + "/health"),
            ("serve", gateway, url(ports[-2]) + "/health/ready"),
        ):
            file = folder / f"{command}-{policy}-{seed}.yaml"
            file.write_text(yaml.safe_dump(content))
            log = file.with_suffix(".log")
            started = running.enter_context(process(log, command, "--config", str(file)))
            await ready(started, health, log)
        slowing = asyncio.create_task(slow_down(url(ports[0])))
        arrivals = list(independent(RATE, SECONDS, Random(seed), prompts=PROMPTS, answers=ANSWERS))
        settings = DriveSettings(
            url=url(ports[-2]), model=MODEL, force_lengths=True, timeout_s=60.0
        )
        outcomes = await drive(arrivals, settings, ignore)
        await slowing
    return outcomes


def ignore(progress: Progress) -> None:
    """No progress bar: three runs at once."""


async def slow_down(engine: str) -> None:
    await asyncio.sleep(SLOW_FROM_S)
    async with aiohttp.ClientSession() as session:
        body = {"factor": FACTOR, "seconds": SLOW_S}
        async with session.post(f"{engine}/emulate/slowdown", json=body) as response:
            response.raise_for_status()


def figures(outcomes: list[Outcome]) -> dict[str, Any]:
    missed = Counter(outcome.miss(PROMISE) for outcome in outcomes)
    kept = missed.pop("", 0)
    ttft = sorted(o.ttft_s for o in outcomes if o.ok and o.ttft_s is not None)
    itl = sorted(o.itl_s for o in outcomes if o.ok and o.itl_s is not None)
    return {
        "requests": len(outcomes),
        "attainment": kept / len(outcomes),
        "missed": dict(missed),
        "ttft_p99_s": ttft[int(0.99 * len(ttft))],
        "itl_p99_s": itl[int(0.99 * len(itl))],
    }


async def main(policies: list[str], seeds: int) -> None:
    results: dict[str, list[dict[str, Any]]] = {policy: [] for policy in policies}
    with TemporaryDirectory(prefix="paceline-bench-") as folder:
        for seed in range(1, seeds + 1):
            plays = [play(policy, seed, Path(folder)) for policy in policies]
            for policy, outcomes in zip(policies, await asyncio.gather(*plays), strict=True):
                results[policy].append(figures(outcomes))
    table = Table("policy", *(f"seed {seed}" for seed in range(1, seeds + 1)), "mean",
                  "ITL p99 ms", "TTFT p99 ms", title="Promises kept, %")  # fmt: skip
    for policy, runs in results.items():
        kept = [100 * run["attainment"] for run in runs]
        table.add_row(
            policy,
            *(f"{share:.1f}" for share in kept),
            f"{mean(kept):.1f}",
            f"{1e3 * mean(run['itl_p99_s'] for run in runs):.0f}",
            f"{1e3 * mean(run['ttft_p99_s'] for run in runs):.0f}",
        )
    Console().print(table)
    print(json.dumps({"bench": "slowed_worker", "rate_per_s": RATE, "results": results}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--policy", nargs="*", default=list(POLICIES))
    chosen = parser.parse_args()
    uvloop.run(main(chosen.policy, chosen.seeds))
