"""How do routing rules compare on one fleet? The table of 0003-routing-cost.md, in simulation.

python docs/design/0003_compare.py     # about a minute and a half
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "kernel"))

from virtual_fleet import VirtualFleet, attainment, poisson

from paceline.domain.promise import Promise
from paceline.policy.headroom import Forecast, forecast, headroom
from paceline.policy.route import POLICIES, Choice, Fleet
from paceline.policy.standing import Ask

FAST, SLOW = "h100-llama-8b", "a100-llama-8b"
PROMISE = Promise(ttft_s=0.5, itl_s=0.02)
SECONDS, SEEDS = 30, (1, 2, 3)
CASES = (
    ("4 equal, 70/s", [FAST] * 4, 70, False),
    ("4 equal, 90/s (too much)", [FAST] * 4, 90, False),
    ("4 equal, one 3 × slower for 10 s, 60/s", [FAST] * 4, 60, True),
    ("2 fast, 2 slow, 25/s", [FAST, FAST, SLOW, SLOW], 25, False),
    ("2 fast, 2 slow, 40/s", [FAST, FAST, SLOW, SLOW], 40, False),
    ("2 fast, 2 slow, 55/s (too much)", [FAST, FAST, SLOW, SLOW], 55, False),
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


def kept(workers: list[str], rate: float, throttled: bool, policy: str, seed: int) -> float:
    fleet = VirtualFleet(workers, policy, seed=seed)
    if throttled:
        fleet.slow("w0", 3.0, 10, 20)
    return attainment(fleet.run(poisson(rate, SECONDS, 10 + seed, PROMISE)))


def main() -> None:
    POLICIES.update({"threshold": threshold, "most headroom": most_headroom})
    rules = ("headroom", "threshold", "most headroom", "least-requests", "round-robin")
    print("| fleet and load |", " | ".join(rules), "|\n| --- |" + " --- |" * len(rules))
    for name, workers, rate, throttled in CASES:
        row = [
            100 * mean(kept(workers, rate, throttled, rule, seed) for seed in SEEDS)
            for rule in rules
        ]
        print(f"| {name} |", " | ".join(f"{share:.1f}" for share in row), "|", flush=True)


if __name__ == "__main__":
    main()
