"""Results of runs that nobody played, for tests of what is made of results."""

from __future__ import annotations

from math import exp
from random import Random

from paceline.simulator.measure import Recorder
from paceline.simulator.result import Result
from paceline.simulator.scenario import Fault, Requests, Scenario, SimTier, Workers
from paceline.simulator.seen import Seen

SCENARIO = Scenario(
    name="one-throttled",
    about="One of <four> workers is throttled & comes back.",
    seconds=120,
    workers=(
        Workers(profile="tiny", count=4, cost_per_hour=4.0),
        Workers(profile="tiny", name="late", added_s=60),
    ),
    tiers={
        "premium": SimTier(ttft_s=0.5, itl_s=0.02, weight=8),
        "standard": SimTier(ttft_s=2.0, itl_s=0.04, stall_s=1.0, weight=2),
    },
    requests=(Requests(rate=5.0),),
    faults=(
        Fault(kind="slow", worker="w3", at_s=30, for_s=20),
        Fault(kind="link", worker="w1", at_s=60, for_s=10, factor=50),
        Fault(kind="crash", worker="*", at_s=90, for_s=2, every_s=10),
    ),
)


def played(policy: str, seed: int, skill: float) -> Result:
    """The lower the skill, the slower everything: 1 keeps nearly all promises, 0 loses many."""
    arrivals, chance = Random(seed), Random(f"{seed} {policy}")
    recorder = Recorder(SCENARIO)
    for number in range(400):
        slow = 1.0 + (1.0 - skill) * chance.random()
        tier = "premium" if arrivals.random() < 0.3 else "standard"
        ttft_s = 0.15 * exp(arrivals.gauss(0.0, 0.6)) * slow**2
        itl_s = 0.012 * exp(arrivals.gauss(0.0, 0.2)) * slow
        kept = SCENARIO.tiers[tier].promise.kept(ttft_s, itl_s, 5 * itl_s)
        worker = f"w{chance.randrange(4)}"
        recorder.add(
            Seen(number * 0.3, tier, "acme", "m", worker, 100, 50, "ok", kept, ttft_s, itl_s)
        )
        recorder.sample(number * 0.3, worker, chance.random(), 5, 1)
    recorder.cost(0.5)
    return recorder.result(SCENARIO.name, policy, seed)
