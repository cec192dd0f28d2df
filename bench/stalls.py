"""What does it cost to have a cause for each late token?

    python bench/stalls.py [--rounds 5]

A simulated minute of a busy fleet is recorded fact by fact, each step apart as a live gateway sees
it, and replayed into fresh kernels, in turn with and without the observer. CPU time of one thread,
the least of all rounds, since other work on the machine can only add to it.
"""

from __future__ import annotations

import argparse
import gc
import json
from statistics import median
from time import perf_counter, process_time

from rich.console import Console
from rich.table import Table

from paceline.domain.commands import Command
from paceline.domain.facts import Fact, RequestArrived, StepsSeen
from paceline.kernel import Kernel, Settings
from paceline.observe.stalls import Stalls
from paceline.simulator.scenario import Network, Requests, Scenario, SimTier, Workers
from paceline.simulator.simulation import Simulation

Log = list[tuple[float, Fact]]


def recorded(rate: float, workers: int) -> Log:
    log: Log = []

    def note(now: float, fact: Fact, commands: list[Command]) -> None:
        log.append((now, fact))

    scenario = Scenario(
        about="Chat, and a long document now and then.",
        seconds=60.0,
        workers=(Workers(profile="h100-llama-70b-tp4", count=workers),),
        tiers={"chat": SimTier(ttft_s=1.0, itl_s=0.04), "documents": SimTier(ttft_s=20.0)},
        requests=(
            Requests(rate=rate, tier="chat", prompt=(300, 1500), output=(120, 400)),
            Requests(kind="documents", rate=rate / 30, tier="documents"),
        ),
        network=Network(jitter_s=0.0003),
    )
    Simulation(scenario, "headroom", 1, log=note).run()
    return log


def replay(log: Log, observed: bool) -> float:
    """CPU seconds."""
    kernel = Kernel(Settings())
    handle = kernel.handle
    stalls = Stalls(kernel)
    gc.collect()
    begun = process_time()
    if observed:
        for now, fact in log:
            stalls.saw(now, fact, handle(fact, now))
    else:
        for now, fact in log:
            handle(fact, now)
    return process_time() - begun


def request_share(log: Log) -> float:
    """Of the observer's time, what goes to facts that are no steps: those of requests, mostly."""
    kernel = Kernel(Settings())
    stalls = Stalls(kernel)
    steps_s = others_s = 0.0
    for now, fact in log:
        commands = kernel.handle(fact, now)
        begun = perf_counter()
        stalls.saw(now, fact, commands)
        took_s = perf_counter() - begun
        if isinstance(fact, StepsSeen):
            steps_s += took_s
        else:
            others_s += took_s
    return others_s / (steps_s + others_s)


def main(rounds: int) -> None:
    table = Table("streams a step", "kernel µs/token", "observer µs/token", "µs/step",
                  "µs/request", title="What attribution and diagnosis add")  # fmt: skip
    results = []
    for rate, workers in ((40.0, 8), (8.0, 8), (4.0, 8)):
        log = recorded(rate, workers)
        steps = [s for _, fact in log if isinstance(fact, StepsSeen) for s in fact.steps]
        tokens = sum(step.tokens * step.count for step in steps)
        requests = sum(isinstance(fact, RequestArrived) for _, fact in log)
        off, on = [], []
        for _ in range(rounds):
            off.append(replay(log, False))
            on.append(replay(log, True))
        only = [(now, fact) for now, fact in log if isinstance(fact, StepsSeen)]
        extra_s = max(min(on) - min(off), 0.0)
        share = median(request_share(log) for _ in range(rounds))
        result = {
            "rate_per_s": rate,
            "workers": workers,
            "streams_a_step": tokens / len(steps),
            "kernel_us_per_token": 1e6 * min(off) / tokens,
            "observer_us_per_token": 1e6 * extra_s * (1.0 - share) / tokens,
            "observer_us_per_step": 1e6 * extra_s * (1.0 - share) / len(only),
            "observer_us_per_request": 1e6 * extra_s * share / requests,
        }
        results.append(result)
        table.add_row(
            f"{result['streams_a_step']:.1f}",
            f"{result['kernel_us_per_token']:.2f}",
            f"{result['observer_us_per_token']:.2f}",
            f"{result['observer_us_per_step']:.1f}",
            f"{result['observer_us_per_request']:.0f}",
        )
    Console().print(table)
    print(json.dumps({"bench": "stalls", "results": results}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    main(parser.parse_args().rounds)
