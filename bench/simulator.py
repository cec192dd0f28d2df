"""How fast is the simulator, and what does a simulated request cost?

Fleets of eight workers at about 70 % of the load at which they just keep 95 % of their promises,
under `headroom` and under a policy that hardly computes. Seconds are CPU time of one process, best
of several runs; the split by part comes from another run, which is sampled every millisecond. How
many times as fast as real a fleet is simulated depends on how many requests a second it serves.
Peak memory is that of this process up to then: ask for one fleet and policy to know theirs.
Prints a table and, last, one JSON line.

    python bench/simulator.py [--fleet NAME ...] [--policy NAME ...] [--runs 3] [--requests 8000]
"""

from __future__ import annotations

import argparse
import json
import resource
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import process_time
from types import FrameType

from msgspec.structs import replace
from rich.console import Console
from rich.table import Table

import paceline
from paceline.simulator.scenario import Requests, Scenario, SimTier, Workers
from paceline.simulator.simulation import Simulation

WORKERS = 8
SAMPLE_S = 0.001


def fleet(about: str, profile: str, tier: SimTier, requests: Requests) -> Scenario:
    return Scenario(
        about=about,
        seconds=1.0,
        workers=(Workers(profile=profile, count=WORKERS),),
        tiers={"standard": tier},
        requests=(requests,),
    )


FLEETS = {
    "8B chat": fleet(
        "Short prompts and answers on small models.",
        "h100-llama-8b",
        SimTier(ttft_s=0.3, itl_s=0.02),
        Requests(rate=520.0, prompt=(150, 1500), output=(100, 500)),
    ),
    "70B chat": fleet(
        "Short prompts and answers on large models.",
        "h100-llama-70b-tp4",
        SimTier(ttft_s=0.6, itl_s=0.035),
        Requests(rate=60.0, prompt=(500, 3000), output=(120, 500)),
    ),
    "70B documents": fleet(
        "Long prompts with short answers.",
        "h100-llama-70b-tp4",
        SimTier(ttft_s=3.0, itl_s=0.08),
        Requests(kind="documents", rate=6.0),
    ),
    "70B agents": fleet(
        "Loops of tool calls with long shared prefixes.",
        "h100-llama-70b-tp4",
        SimTier(ttft_s=1.5, itl_s=0.05),
        Requests(kind="agents", rate=28.0),
    ),
    "70B long answers": fleet(
        "Answers of 1,500 tokens, as reasoning gives them.",
        "h100-llama-70b-tp4",
        SimTier(ttft_s=1.0, itl_s=0.035),
        Requests(rate=22.0, prompt=(300, 2000), output=(1500, 3000)),
    ),
}
POLICIES = ("headroom", "least-requests")

PARTS = {
    "policy": "decide",
    "policy/steptime": "learn",
    "policy/windows": "learn",
    "kernel": "decide",
    "kernel/ledger": "learn",
    "kernel/worker": "learn",
    "enginemodel": "engine",
    "simulator": "play",
    "simulator/measure": "measure",
    "simulator/traffic": "traffic",
    "workload": "traffic",
    "workload/histogram": "measure",
}
"""What each module, or else its folder, does. That the kernel handles facts is part of deciding."""
ROOT = str(Path(paceline.__file__).parent) + "/"


def part(frame: FrameType | None) -> str:
    """Whose code is running, directly or below it."""
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(ROOT):
            module = file.removeprefix(ROOT).removesuffix(".py")
            return PARTS.get(module) or PARTS.get(module.split("/")[0], "other")
        frame = frame.f_back
    return "other"


@contextmanager
def sampled() -> Iterator[Counter[str]]:
    """How often each part was found running, by the clock of the process."""
    found: Counter[str] = Counter()

    def look(number: int, frame: FrameType | None) -> None:
        found[part(frame)] += 1

    before = signal.signal(signal.SIGPROF, look)
    signal.setitimer(signal.ITIMER_PROF, SAMPLE_S, SAMPLE_S)
    try:
        yield found
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        signal.signal(signal.SIGPROF, before)


def measure(scenario: Scenario, policy: str, runs: int) -> dict[str, float]:
    """The best of several runs, and what each part of it took."""
    cpu_s = []
    for _ in range(runs):
        simulation = Simulation(scenario, policy, seed=1)
        began = process_time()
        result = simulation.run()
        cpu_s.append(process_time() - began)
    peak_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with sampled() as found:
        Simulation(scenario, policy, seed=1).run()
    seconds, requests = min(cpu_s), result.total.requests
    steps = sum(r.scheduler.counters.steps for r in simulation.replicas.values())
    each_us = seconds / requests * 1e6
    split = {name: each_us * n / found.total() for name, n in sorted(found.items())}
    return {
        "rate_per_s": requests / scenario.seconds,
        "kept": result.attainment,
        "requests_per_s": requests / seconds,
        "steps_per_s": steps / seconds,
        "times_real_time": scenario.seconds / seconds,
        "us_per_request": each_us,
        "peak_mb": peak_kb / 1024,
        **{f"{name}_us": us for name, us in split.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fleet", nargs="+", choices=list(FLEETS), default=list(FLEETS))
    parser.add_argument("--policy", nargs="+", default=list(POLICIES))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--requests", type=int, default=8000)
    args = parser.parse_args()
    parts = list(dict.fromkeys(PARTS.values()))
    table = Table(title=f"Simulating {WORKERS} workers, one core", box=None)
    columns = ("load/s", "kept %", "requests/s", "steps/s", "x real time", "peak MB", "µs/request")
    for column in ("fleet", "policy", *columns, *parts):
        table.add_column(
            column, justify="left" if column in ("fleet", "policy") else "right", no_wrap=True
        )
    results = []
    for name in args.fleet:
        table.add_section()
        for policy in args.policy:
            scenario = FLEETS[name]
            rate = scenario.requests[0].rate
            assert rate is not None
            scenario = replace(scenario, seconds=args.requests / rate)
            row = measure(scenario, policy, args.runs)
            cells = [
                f"{row['rate_per_s']:.0f}",
                f"{row['kept'] * 100:.1f}",
                f"{row['requests_per_s']:,.0f}",
                f"{row['steps_per_s']:,.0f}",
                f"{row['times_real_time']:,.0f}",
                f"{row['peak_mb']:.0f}",
                f"{row['us_per_request']:.0f}",
                *(f"{row.get(f'{p}_us', 0.0):.0f}" for p in parts),
            ]
            table.add_row(name, policy, *cells)
            rounded = {key: float(f"{value:.4g}") for key, value in row.items()}
            results.append({"fleet": name, "policy": policy, **rounded})
    Console(width=150).print(table)
    print(json.dumps({"bench": "simulator", "workers": WORKERS, "results": results}))


if __name__ == "__main__":
    main()
