"""How far is the simulator from live gateways, and how much of that is chance?

    python bench/parity.py [--scenario FILE] [--seconds 60] [--seeds 3] [--policy headroom]

Each seed's requests are played once over sockets, against emulated engines in real time, and so
many times in the simulator; the same decision code runs in both. The simulator's column is the mean
of its runs, `sd` the standard deviation of one of them, and `apart` how many of those the live run
is away: beyond about two it is no longer chance. `clients` is what the driver saw, its own delay
included; all else is what the gateway saw.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import fmean, stdev
from tempfile import TemporaryDirectory
from typing import Any

import uvloop
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
TESTS = ROOT / "tests" / "simulator"
sys.path.insert(0, str(TESTS))

from both_hosts import (  # noqa: E402
    clients_figures,
    differing,
    figures,
    live,
    simulated,
    written_down,
)

from paceline.simulator.load import load_scenario  # noqa: E402
from paceline.simulator.scenario import Scenario  # noqa: E402

DRAWS = 12
"""Simulated runs of the same requests."""

Figures = dict[str, float]


def measure(as_written: Scenario, policy: str, seed: int) -> dict[str, Any]:
    """One seed in both hosts."""
    with TemporaryDirectory(prefix="paceline-bench-") as name:
        folder = Path(name)
        scenario = written_down(as_written, seed, folder / "requests.jsonl")
        run = uvloop.run(live(scenario, policy, seed, folder))
        played = [simulated(scenario, policy, draw) for draw in range(DRAWS)]
        told = [figures(one, scenario, seed) for one in played]
        return {
            "seed": seed,
            "requests": len(run.clients),
            "decided_otherwise": len(differing(run)) + len(differing(played[0])),
            "trouble": run.trouble,
            "behind_p99_s": run.behind_s,
            "lag_s": run.lag_s,
            "live": figures(run, scenario, seed),
            "simulated": {name: fmean(one[name] for one in told) for name in told[0]},
            "sd": {name: stdev(one[name] for one in told) for name in told[0]},
            "clients": clients_figures(run, scenario, seed),
        }


def apart(result: dict[str, Any]) -> Figures:
    """Live less simulated, in standard deviations."""
    live, simulated, sd = result["live"], result["simulated"], result["sd"]
    return {name: (live[name] - simulated[name]) / sd[name] for name in live if sd[name]}


def table(results: list[dict[str, Any]]) -> Table:
    shown = Table(title="one scenario in both hosts; times in ms, shares in %")
    for header in ("seed", "", "live", "simulated", "sd", "apart", "clients"):
        shown.add_column(header, justify="left" if header in ("seed", "") else "right")
    for result in results:
        far = apart(result)
        for name in result["live"]:
            cells = (_cell(name, result[key].get(name)) for key in ("live", "simulated", "sd"))
            seen = _cell(name, result["clients"].get(name))
            shown.add_row(str(result["seed"]), name, *cells, f"{far.get(name, 0.0):+.1f}", seen)
        shown.add_section()
    return shown


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{1e3 * value:.1f}" if name.startswith(("TTFT", "ITL")) else f"{100 * value:.1f}"


def main(file: Path, seconds: float, seeds: int, policy: str) -> None:
    scenario = load_scenario(file, [("seconds", f"{seconds:g}")])
    results = [measure(scenario, policy, seed) for seed in range(1, seeds + 1)]
    Console(width=100).print(table(results))
    for result in results:
        print(f"seed {result['seed']}: {result['decided_otherwise']} commands decided otherwise")
        if result["trouble"]:
            print(f"seed {result['seed']}: {result['trouble']}")
    print(json.dumps({"bench": "parity", "policy": policy, "seconds": seconds, "runs": results}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenario", type=Path, default=TESTS / "parity.yaml")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--policy", default="headroom")
    chosen = parser.parse_args()
    main(chosen.scenario, chosen.seconds, chosen.seeds, chosen.policy)
