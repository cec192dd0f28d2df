"""What is each term of headroom's routing law worth? Without one at a time, on every scenario.

    python bench/ablations.py [--seeds N] [--workers N] [--scenario NAME ...]   # some 17 minutes

Prints a table in Markdown, promises kept in percent, and a JSON line. All is simulation.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from math import inf
from pathlib import Path
from statistics import mean

from paceline.kernel import pool, worker
from paceline.policy import admit, headroom, route, standing
from paceline.simulator.cli import plan
from paceline.simulator.many import Job, play_all, play_job
from paceline.simulator.result import Result

SCENARIOS = Path(__file__).parents[1] / "scenarios"


def no_work() -> None:
    route.WORK_WEIGHT = 0.0  # type: ignore[attr-defined]


def no_harm() -> None:
    headroom.TO_COME = 0.0


def full_harm() -> None:
    headroom.TO_COME = 1.0


def no_delay() -> None:
    route.DELAY_WEIGHT = 0.0  # type: ignore[attr-defined]


def no_slowdown() -> None:
    standing.Standing.slowdown = lambda self, now: 1.0  # type: ignore[method-assign]


def no_waiting() -> None:
    route.is_open = lambda *seen: True  # type: ignore[attr-defined]


def no_correction() -> None:
    worker.Accuracy.correction = property(lambda self: standing.Correction())  # type: ignore[assignment]


def no_balance() -> None:
    route.BALANCE_WEIGHT = 0.0  # type: ignore[attr-defined]


def nothing_reserved() -> None:
    route.limits = lambda ask, forecasts: [inf] * len(forecasts)  # type: ignore[attr-defined]


def no_caution() -> None:
    standing.CAUTION = 0.0


def harm_that_ends() -> None:
    headroom.strain = headroom.broken


def load_as_surprise() -> None:
    """A fleet that fills up teaches that its forecasts were too low."""
    pool.FORESEEN = 0.0


def full_steps_ahead() -> None:
    """Engines get as many prompt tokens as one step takes, whoever streams there."""
    admit.AHEAD = inf


WITHOUT: dict[str, Callable[[], None]] = {
    "headroom": lambda: None,
    "no waiting": no_waiting,
    "no correction": no_correction,
    "nothing reserved for more weight": nothing_reserved,
    "no caution": no_caution,
    "harm ends at the promise": harm_that_ends,
    "load taken for surprise": load_as_surprise,
    "full steps ahead": full_steps_ahead,
    "no balance": no_balance,
    "no price of work": no_work,
    "no harm to residents": no_harm,
    "harm as if it lasted": full_harm,
    "no delay": no_delay,
    "no fast gain, no open gap": no_slowdown,
}


def play_without(job: Job) -> Result:
    """One run, in a process that a term is taken from."""
    WITHOUT[job.at["without"]]()
    return play_job(job)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each cell")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--scenario", nargs="*", help="names; none: all")
    asked = parser.parse_args()
    names = asked.scenario or sorted(path.stem for path in SCENARIOS.glob("*.yaml"))
    kept: dict[str, dict[str, float]] = {name: {} for name in names}
    for without in WITHOUT:
        jobs = [
            Job(job.scenario, job.policy, job.seed, at={"without": without})
            for name in names
            for job in plan(SCENARIOS / f"{name}.yaml", policies=["headroom"], seeds=asked.seeds)
        ]
        # Two processes at least: what is taken away must not stay away here.
        results = play_all(jobs, max(asked.workers, 2), play=play_without)
        for name in names:
            kept[name][without] = 100 * mean(
                result.attainment for result in results if result.scenario == name
            )
    print("| scenario |", " | ".join(WITHOUT), "|\n| --- |" + " --- |" * len(WITHOUT))
    for name, row in kept.items():
        print(f"| {name} |", " | ".join(f"{share:.1f}" for share in row.values()), "|")
    means = (mean(row[without] for row in kept.values()) for without in WITHOUT)
    print("| **mean** |", " | ".join(f"{share:.1f}" for share in means), "|")
    print(json.dumps({"bench": "ablations", "seeds": asked.seeds, "kept": kept}))


if __name__ == "__main__":
    main()
