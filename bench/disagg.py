"""What does prefilling on workers of its own bring, and is the choice ever worse than none?

    python bench/disagg.py capacity [--quick]     # some ten minutes of two cores
    python bench/disagg.py choice                 # twice that

`capacity`: Llama-70B on four H100s a replica, 3,000 tokens in and 150 out: the highest rate for
each GPU at which 95 % of the promises are kept, aggregated with chunked prefill (the best of three
step sizes) against disaggregated. `choice`: headroom, which decides for each request, against
always in place and always through a prefill worker, on one fleet, over prompt length, load and the
speed of the network. All is simulation; prints tables and a JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from statistics import mean

import msgspec
from msgspec.structs import replace
from rich.console import Console
from rich.table import Table

from paceline.enginemodel import PROFILES, Profile
from paceline.policy import disagg
from paceline.policy.disagg import Sharing
from paceline.policy.fleet import Choice, Fleet
from paceline.policy.route import POLICIES, headroom
from paceline.policy.standing import Ask
from paceline.simulator.scenario import Network, Requests, Scenario, SimTier, Workers
from paceline.simulator.simulation import Simulation

ENGINE = "h100-llama-70b-tp4"
GPUS = 4
"""Of one replica."""
ATTAIN = 0.95
MOST = 6.0
"""Requests a second of one replica that are too many in any case: 18,000 prompt tokens."""


class InPlace:
    """Headroom that never lets another worker prefill."""

    def __call__(self, fleet: Fleet, ask: Ask, places: Sequence[int]) -> Choice:
        return headroom(fleet, ask, places)

    def ways(
        self, fleet: Sharing, ask: Ask, places: Sequence[int], sources: Sequence[int]
    ) -> Choice:
        return headroom(fleet, ask, places)

    def fetching(self, fleet: Sharing, ask: Ask, places: Sequence[int], source: int) -> Choice:
        return disagg.fetching(headroom, fleet, ask, places, source)


class Apart(InPlace):
    """Headroom that always does."""

    def ways(
        self, fleet: Sharing, ask: Ask, places: Sequence[int], sources: Sequence[int]
    ) -> Choice:
        return disagg.apart(fleet, ask, places, sources)


POLICIES["always in place"] = InPlace()
POLICIES["always apart"] = Apart()


class Case(msgspec.Struct, frozen=True):
    """A fleet and how it is used."""

    name: str
    fleet: tuple[Workers, ...]
    policy: str = "headroom"
    budget: int = 8192
    """Tokens of a step."""


def profile(budget: int, workers: Workers) -> Profile:
    found = PROFILES[workers.profile]
    most = min(found.max_num_seqs, budget // 2)
    return replace(found, max_num_batched_tokens=budget, max_num_seqs=most)


def attained(case: Case, scenario: Scenario, seed: int) -> float:
    """Share of the promises kept."""
    played = replace(scenario, workers=case.fleet)
    return Simulation(played, case.policy, seed, partial(profile, case.budget)).run().attainment


# The rate that keeps the promises.


def alike(replicas: int, per_node: int) -> tuple[Workers, ...]:
    return tuple(
        Workers(profile=ENGINE, name=f"w{node}", count=per_node, node=f"n{node}")
        for node in range(replicas // per_node)
    )


def apart(prefill: int, decode: int) -> tuple[Workers, ...]:
    """Two replicas a node; prefill workers come first."""
    roles = ["prefill"] * prefill + ["decode"] * decode
    return tuple(
        Workers(profile=ENGINE, name=f"{role[0]}{i}-", role=role, node=f"n{i // 2}")  # type: ignore[arg-type]
        for i, role in enumerate(roles)
    )


CASES = {
    "one node": [
        *(Case(f"aggregated, steps of {b}", alike(2, 2), budget=b) for b in (512, 2048, 8192)),
        *(
            Case(f"aggregated, steps of {b}, least-requests", alike(2, 2), "least-requests", b)
            for b in (512, 2048)
        ),
        Case("1 prefill + 1 decode", apart(1, 1)),
        Case("1 prefill + 1 decode, always apart", apart(1, 1), "always apart"),
    ],
    "two nodes": [
        *(Case(f"aggregated, steps of {b}", alike(4, 2), budget=b) for b in (512, 2048, 8192)),
        *(
            Case(f"aggregated, steps of {b}, least-requests", alike(4, 2), "least-requests", b)
            for b in (512, 2048)
        ),
        Case("1 prefill + 3 decode", apart(1, 3)),
        Case("2 prefill + 2 decode", apart(2, 2)),
        Case("3 prefill + 1 decode", apart(3, 1)),
        Case("2 prefill + 2 decode, always apart", apart(2, 2), "always apart"),
        Case("3 prefill + 1 decode, always apart", apart(3, 1), "always apart"),
    ],
}
PROMISES = {"TTFT 2 s, ITL 40 ms": (2.0, 0.040), "TTFT 1 s, ITL 25 ms": (1.0, 0.025)}


def loaded(rate: float, ttft_s: float, itl_s: float, seconds: float = 60.0) -> Scenario:
    return Scenario(
        name="capacity",
        about="Llama-70B, 3,000 tokens in, 150 out.",
        seconds=seconds,
        warmup_s=20.0,
        drain_s=60.0,
        workers=(),
        tiers={"t": SimTier(ttft_s=ttft_s, itl_s=itl_s)},
        requests=(Requests(rate=rate, prompt=(3000, 3000), output=(150, 150)),),
    )


def capacity(asked: tuple[Case, tuple[float, float], int]) -> float:
    """Requests a second and GPU: the highest rate, to 5 %, that keeps its promises."""
    case, promise, seeds = asked
    replicas = sum(group.count for group in case.fleet)
    low, high = 0.0, MOST
    while high - low > 0.05 * high:
        each = 0.5 * (low + high)
        scenario = loaded(each * replicas, *promise)
        kept = mean(attained(case, scenario, seed) for seed in range(1, seeds + 1))
        low, high = (each, high) if kept >= ATTAIN else (low, each)
    return low / GPUS


def capacities(seeds: int, processes: int, quick: bool) -> None:
    found: dict[str, dict[str, dict[str, float]]] = {}
    table = Table(title="requests/s and GPU at which 95 % of the promises are kept (simulation)")
    promises = dict(list(PROMISES.items())[: 1 if quick else None])
    jobs = [
        (case, promise, seeds)
        for cases in CASES.values()
        for case in cases
        for promise in promises.values()
    ]
    for name in ("fleet", "way", *promises):
        table.add_column(name)
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        rates = iter(list(pool.map(capacity, jobs)))
    for nodes, cases in CASES.items():
        for case in cases:
            row = {promise: round(next(rates), 3) for promise in promises}
            found.setdefault(nodes, {})[case.name] = row
            table.add_row(nodes, case.name, *(f"{rate:.3f}" for rate in row.values()))
        table.add_section()
    Console().print(table)
    print(json.dumps({"bench": "disagg capacity", "requests_per_s_and_gpu": found}))


# The choice against none.

FLEET = (
    Workers(profile=ENGINE, name="p", count=2, role="prefill", node="a"),
    Workers(profile=ENGINE, name="d", count=2, role="decode", node="b"),
)
RATES = {500: 40.0, 2000: 14.0, 8000: 3.6}
"""Requests a second that are about as many as the fleet can do, by median prompt tokens."""
LOADS = (0.4, 0.7, 0.9)
SPEEDS = (1, 5, 50)
"""GB/s between machines."""
WAYS = ("headroom", "always in place", "always apart")


def choice_scenario(prompt: int, load: float, speed: float) -> Scenario:
    return Scenario(
        name="choice",
        about="One fleet, all ways.",
        seconds=90.0,
        warmup_s=30.0,
        drain_s=60.0,
        workers=FLEET,
        tiers={"t": SimTier(ttft_s=2.0, itl_s=0.035)},
        requests=(
            Requests(rate=load * RATES[prompt], prompt=(prompt, 3 * prompt), output=(150, 400)),
        ),
        network=Network(kv_bytes_per_s=speed * 1e9),
    )


def kept(asked: tuple[str, int, float, float, int]) -> float:
    policy, prompt, load, speed, seed = asked
    return attained(Case("", FLEET, policy), choice_scenario(prompt, load, speed), seed)


def choices(seeds: int, processes: int) -> None:
    points = [(p, load, s) for p in RATES for load in LOADS for s in SPEEDS]
    jobs = [(way, *at, seed) for at in points for way in WAYS for seed in range(1, seeds + 1)]
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        results = dict(zip(jobs, pool.map(kept, jobs), strict=True))
    table = Table(title="% of promises kept (simulation)")
    for name in ("prompt", "load", "GB/s", *WAYS, "against the better", "± by seeds"):
        table.add_column(name, justify="right")
    rows: list[Mapping[str, float]] = []
    for at in points:
        by_seed = {way: [results[(way, *at, s)] for s in range(1, seeds + 1)] for way in WAYS}
        means = {way: mean(found) for way, found in by_seed.items()}
        better = max(WAYS[1:], key=lambda way: means[way])
        apart_by = [
            mine - other for mine, other in zip(by_seed[WAYS[0]], by_seed[better], strict=True)
        ]
        spread = max(apart_by) - min(apart_by)
        cells = [f"{100 * means[way]:.1f}" for way in WAYS]
        gain = mean(apart_by)
        table.add_row(*map(str, at), *cells, f"{100 * gain:+.1f}", f"{50 * spread:.1f}")
        rows.append(dict(zip(("prompt", "load", "GB/s"), at, strict=True)) | means)
    Console().print(table)
    print(json.dumps({"bench": "disagg choice", "kept": rows}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["capacity", "choice"])
    parser.add_argument("--seeds", type=int, default=2, help="runs of each point")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--quick", action="store_true", help="capacity under one promise alone")
    asked = parser.parse_args()
    if asked.what == "capacity":
        capacities(asked.seeds, asked.processes, asked.quick)
    else:
        choices(asked.seeds, asked.processes)


if __name__ == "__main__":
    main()
