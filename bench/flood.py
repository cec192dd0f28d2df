"""Does premium keep its promise while free users flood a live fleet?

    python bench/flood.py [--scenario FILE] [--seed 1] [--policy headroom …]

Premium asks for 30 % of what the fleet can do; for 40 s free users raise the whole to 1.5 times of
it. What the fleet can do is the rate at which `headroom` would just keep 95 % of the promises of
that mixture, found in the simulator first. Each policy gets a fresh gateway and fresh emulated
engines, and the same requests over sockets, in real time, from two tenants with keys of their own.
What clients saw is told: whoever was refused or failed has missed. Beside it stands what the
simulator makes of the scenario, the mean of so many seeds.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from math import inf
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import uvloop
from msgspec.structs import replace
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "simulator"))

from both_hosts import live  # noqa: E402

from paceline.simulator.load import load_scenario  # noqa: E402
from paceline.simulator.scenario import Scenario  # noqa: E402
from paceline.simulator.simulation import Simulation  # noqa: E402
from paceline.workload.outcome import Outcome  # noqa: E402

POLICIES = ("headroom", "least-requests", "priority")
ENOUGH = 0.95
"""Share of promises kept at which a fleet does all that it can."""
STEADY_S = 120.0
SEEDS = range(8)
PRECISION = 0.02


def capacity(scenario: Scenario) -> float:
    """The load, as a share of the flood's, at which it keeps just `ENOUGH`; by bisection."""
    mixture = tuple(replace(asked, from_s=0.0, until_s=inf) for asked in scenario.requests)
    steady = replace(scenario, requests=mixture, seconds=STEADY_S)
    low, high = 0.0, 2.0
    while high - low > PRECISION:
        load = (low + high) / 2
        kept = (Simulation(replace(steady, load=load), "headroom", s).run() for s in SEEDS)
        if fmean(result.attainment for result in kept) >= ENOUGH:
            low = load
        else:
            high = load
    return low


def simulated(scenario: Scenario, policy: str) -> dict[str, float]:
    """Attainment by tier."""
    results = [Simulation(scenario, policy, seed).run() for seed in SEEDS]
    return {name: fmean(r.tiers[name].attainment for r in results) for name in scenario.tiers}


def met(scenario: Scenario, tier: str, clients: Sequence[Outcome]) -> dict[str, Any]:
    """What the requests of a tier met, those of the warm-up left out."""
    promise = scenario.tiers[tier].promise
    flood_s = max(asked.from_s for asked in scenario.requests)
    calm_s = min(asked.until_s for asked in scenario.requests)
    came = [o for o in clients if o.tier == tier and o.at_s >= scenario.warmup_s]
    flooded = [o for o in came if flood_s <= o.at_s < calm_s]
    answered = [o for o in came if o.ok]
    return {
        "requests": len(came),
        "kept": fmean(not o.miss(promise) for o in came),
        "kept_in_flood": fmean(not o.miss(promise) for o in flooded),
        "ended": Counter("shed" if o.refused else o.miss(promise) or "kept" for o in came),
        "ttft_s": _middle_and_worst([o.ttft_s or 0.0 for o in answered]),
        "itl_s": _middle_and_worst([o.itl_s for o in answered]),
    }


def _middle_and_worst(seconds: Sequence[float]) -> list[float]:
    """The median and the 99th percentile; nothing of nothing."""
    return [float(np.quantile(seconds, q)) for q in (0.5, 0.99)] if seconds else []


def table(results: Sequence[dict[str, Any]]) -> Table:
    shown = Table(title="Promises kept, %; times of answered requests in ms, p50 / p99")
    for header in ("policy", "tier"):
        shown.add_column(header)
    for header in ("asked", "kept", "in flood", "simulated", "shed", "failed", "TTFT", "ITL"):
        shown.add_column(header, justify="right", no_wrap=True)
    for result in results:
        for tier, seen in result["tiers"].items():
            shares = (seen["kept"], seen["kept_in_flood"], result["simulated"][tier])
            shown.add_row(
                result["policy"],
                tier,
                str(seen["requests"]),
                *(f"{100 * share:.1f}" for share in shares),
                *(str(seen["ended"][how]) for how in ("shed", "failed")),
                *(" / ".join(f"{1e3 * s:,.0f}" for s in seen[k]) for k in ("ttft_s", "itl_s")),
            )
        shown.add_section()
    return shown


def measure(scenario: Scenario, policy: str, seed: int) -> dict[str, Any]:
    """One policy in both hosts, one after the other."""
    expected = simulated(scenario, policy)
    with TemporaryDirectory(prefix="paceline-bench-") as folder:
        keys = {asked.tenant: f"key-of-{asked.tenant}" for asked in scenario.requests}
        run = uvloop.run(live(scenario, policy, seed, Path(folder), keys))
    return {
        "policy": policy,
        "tiers": {tier: met(scenario, tier, run.clients) for tier in scenario.tiers},
        "simulated": expected,
        "behind_p99_s": run.behind_s,
        "lag_s": run.lag_s,
        "trouble": run.trouble,
    }


def main(file: Path, seed: int, policies: Sequence[str]) -> None:
    scenario = load_scenario(file)
    share = capacity(scenario)
    rates = [asked.rate or 0.0 for asked in scenario.requests]
    can = share * sum(rates)
    print(
        f"The fleet can do {can:.1f} requests/s; premium asks for {100 * rates[0] / can:.0f} % of "
        f"it, all together in the flood for {1 / share:.2f} times as much."
    )
    results = [measure(scenario, policy, seed) for policy in policies]
    Console(width=110).print(table(results))
    for result in results:
        if result["trouble"]:
            print(f"{result['policy']}: {result['trouble']}")
    told = {"bench": "flood", "seed": seed, "capacity_per_s": can, "runs": results}
    print(json.dumps(told))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenario", type=Path, default=Path(__file__).with_suffix(".yaml"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--policy", nargs="*", default=list(POLICIES))
    chosen = parser.parse_args()
    main(chosen.scenario, chosen.seed, chosen.policy)
