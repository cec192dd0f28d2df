"""How do routing rules compare on one fleet? The table of 0003-routing-cost.md, in simulation.

python docs/design/0003_compare.py     # about a minute and a half
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from paceline.policy.headroom import Forecast, forecast, headroom
from paceline.policy.route import POLICIES, Choice, Fleet
from paceline.policy.standing import Ask
from paceline.simulator.scenario import Fault, Requests, Scenario, SimTier, Workers
from paceline.simulator.simulation import play

SEEDS = (1, 2, 3)
EQUAL = (Workers(profile="h100-llama-8b", count=4),)
MIXED = (
    Workers(profile="h100-llama-8b", count=2),
    Workers(profile="a100-llama-8b", count=2, name="old"),
)
THROTTLED = Fault(kind="slow", worker="w0", at_s=10.0, for_s=10.0, factor=3.0)
CASES = (
    ("4 equal, 70/s", EQUAL, 70.0, ()),
    ("4 equal, 90/s (too much)", EQUAL, 90.0, ()),
    ("4 equal, one 3 × slower for 10 s, 60/s", EQUAL, 60.0, (THROTTLED,)),
    ("2 fast, 2 slow, 25/s", MIXED, 25.0, ()),
    ("2 fast, 2 slow, 40/s", MIXED, 40.0, ()),
    ("2 fast, 2 slow, 55/s (too much)", MIXED, 55.0, ()),
)


def rooms(fleet: Fleet, ask: Ask, places: Sequence[int]) -> dict[int, tuple[float, Forecast]]:
    """Headroom and forecast of each place."""
    found = {}
    for i in places:
        worker = fleet.standing(i, ask.now)
        seen = forecast(worker, ask, ask.cached.get(i, 0.0))
        found[i] = headroom(worker, ask, seen), seen
    return found


def threshold(fleet: Fleet, ask: Ask, places: Sequence[int]) -> Choice:
    """The first design: least cost among those with enough headroom, else most headroom."""
    found = rooms(fleet, ask, places)
    fits = [i for i in places if found[i][0] >= ask.margin]
    if fits:
        return Choice(min(fits, key=lambda i: (found[i][1].delay_s, i)), "")
    return Choice(max(places, key=lambda i: (found[i][0], -i)), "")


def most_headroom(fleet: Fleet, ask: Ask, places: Sequence[int]) -> Choice:
    """The worker that is farthest from breaking a promise."""
    found = rooms(fleet, ask, places)
    return Choice(max(places, key=lambda i: (found[i][0], -i)), "")


def kept(
    workers: tuple[Workers, ...], rate: float, faults: tuple[Fault, ...], policy: str, seed: int
) -> float:
    """Share of promises."""
    scenario = Scenario(
        about="Which rule keeps the most promises on this fleet?",
        seconds=30.0,
        workers=workers,
        tiers={"t": SimTier(ttft_s=0.5, itl_s=0.02)},
        requests=(Requests(rate=rate, prompt=(800, 5000), output=(150, 600)),),
        faults=faults,
    )
    return play(scenario, policy, seed).attainment


def main() -> None:
    POLICIES.update({"threshold": threshold, "most headroom": most_headroom})
    rules = ("headroom", "threshold", "most headroom", "least-requests", "round-robin")
    print("| fleet and load |", " | ".join(rules), "|\n| --- |" + " --- |" * len(rules))
    for name, workers, rate, faults in CASES:
        row = [
            100 * mean(kept(workers, rate, faults, rule, seed) for seed in SEEDS) for rule in rules
        ]
        print(f"| {name} |", " | ".join(f"{share:.1f}" for share in row), "|", flush=True)


if __name__ == "__main__":
    main()
