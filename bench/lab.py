"""Which policy keeps the most promises, in which trouble, and is it better than last time?

Plays every scenario of `scenarios/` with every policy over the same seeds, on all cores. Prints the
matrix: promises kept in percent, with 95 % intervals over seeds; * marks the best and what is tied
with it, ? what so few seeds can't tell from it. The oracle, which knows what nobody can, is beside
the contest.

The last release's matrix is `scenarios/results.json` (`--save` writes it anew). A run is the same
wherever it is played, so any change since then is a change of the code; listed are those whose
interval, paired by seed, does not contain 0. Ends with status 1 if headroom got worse somewhere.
Prints, last, one JSON line.

    python bench/lab.py [--scenario NAME ...] [--policy NAME ...] [--seeds N] [--workers N]
                        [--save] [--markdown FILE]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Literal

import msgspec
from rich.console import Console
from rich.table import Table

from paceline import __version__
from paceline.domain.errors import PacelineError
from paceline.simulator.cli import ALL_POLICIES, CORES, Watch, plan
from paceline.simulator.compare import (
    CLOSE,
    Comparison,
    Estimate,
    Verdict,
    compare,
    estimate,
    verdict,
)
from paceline.simulator.many import play_all
from paceline.simulator.oracle import ORACLE
from paceline.simulator.report import MARKS, mark
from paceline.simulator.result import Result

SCENARIOS = Path(__file__).parent.parent / "scenarios"
STORED = SCENARIOS / "results.json"
OURS = "headroom"
NEAR = 0.03
"""Share of all promises by which a policy may be behind the oracle and still be near it."""

SEEDS = {
    "agents": 10,
    "batch-fill": 4,
    "bursts": 4,
    "crash-one-of-four": 4,
    "disaggregated": 6,
    "hung": 4,
    "slow-link": 6,
    "slow-worker-chats": 6,
}
"""Runs of each cell, where three tell little."""
USUAL_SEEDS = 3

WIDE = 200
"""Columns of the terminal that the matrix may take."""

Matrix = dict[str, dict[str, tuple[float, ...]]]
"""Attainment by scenario and policy, one figure a seed, from seed 0 on."""


class Stored(msgspec.Struct, frozen=True):
    """The matrix of a release."""

    version: str
    attainment: Matrix


class Change(msgspec.Struct, frozen=True):
    """What became of one cell since then."""

    scenario: str
    policy: str
    gain: Estimate
    verdict: Verdict


def played(
    scenarios: Sequence[str], policies: Sequence[str], seeds: int | None, workers: int
) -> tuple[dict[str, list[Result]], Watch]:
    """All results by scenario; without a number of seeds each has its own."""
    jobs = [
        job
        for name in scenarios
        for job in plan(
            SCENARIOS / f"{name}.yaml",
            policies=policies,
            seeds=seeds or SEEDS.get(name, USUAL_SEEDS),
        )
    ]
    with Watch(len(jobs)) as watch:
        results = play_all(jobs, workers, watch.on_done)
    by_scenario: dict[str, list[Result]] = {}
    for result in results:
        by_scenario.setdefault(result.scenario, []).append(result)
    return by_scenario, watch


def matrix_of(by_scenario: Mapping[str, Sequence[Result]]) -> Matrix:
    matrix: Matrix = {}
    for scenario, results in by_scenario.items():
        for policy in dict.fromkeys(result.policy for result in results):
            kept = tuple(round(r.attainment, 6) for r in results if r.policy == policy)
            matrix.setdefault(scenario, {})[policy] = kept
    return matrix


def changes(now: Matrix, then: Matrix) -> Iterator[Change]:
    """Of all cells that both have, over the seeds that both played."""
    for scenario, row in now.items():
        for policy, kept in row.items():
            before = then.get(scenario, {}).get(policy, ())
            gain = estimate([new - old for new, old in zip(kept, before, strict=False)])
            if gain is not None:
                yield Change(scenario, policy, gain, verdict(gain))


def table_of(matrix: Matrix, standings: Mapping[str, Comparison], watch: Watch) -> Table:
    """One row a scenario."""
    table = Table(title=f"Promises kept, % ({MARKS})", box=None)
    table.add_column("scenario", no_wrap=True)
    policies = list(next(iter(matrix.values())))
    for policy in policies:
        table.add_column(policy.replace("-", "-\n"), justify="right", no_wrap=True)
    table.add_column("core s", justify="right", no_wrap=True)
    for scenario, row in matrix.items():
        cells = (_cell(row[policy], mark(standings[scenario], policy)) for policy in policies)
        table.add_row(scenario, *cells, f"{watch.core_s[scenario]:.0f}")
    means = (f"{fmean(fmean(row[p]) for row in matrix.values()) * 100:.1f} " for p in policies)
    table.add_section()
    table.add_row("mean", *means, f"{watch.core_s.total():.0f}")
    return table


def _cell(kept: Sequence[float], marked: str) -> str:
    attainment = estimate(kept)
    assert attainment is not None
    margin = "" if attainment.margin is None else f"\n±{attainment.margin * 100:.1f} "
    mean = f"{attainment.mean * 100:.1f}{marked}{margin}"
    return f"[bold]{mean}[/bold]" if marked == "*" else mean


def markdown_of(matrix: Matrix, standings: Mapping[str, Comparison]) -> str:
    """The matrix for the docs; the best and its ties are bold, ? is as above."""
    policies = list(next(iter(matrix.values())))
    lines = [f"| scenario | {' | '.join(policies)} |", f"|---|{'---:|' * len(policies)}"]
    for scenario, row in matrix.items():
        cells = []
        for policy in policies:
            text = _cell(row[policy], " ").replace("\n", "").strip()
            marked = mark(standings[scenario], policy)
            cells.append(f"**{text}**" if marked == "*" else f"{text} {marked}".strip())
        lines.append(f"| {scenario} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def summary(matrix: Matrix, standings: Mapping[str, Comparison]) -> Iterator[str]:
    """How headroom stands, as far as it was played."""
    if not all(OURS in row for row in matrix.values()):
        return
    places = {name: place_of_ours(standings[name]) for name in matrix}
    first = sum(place == "first" for place in places.values())
    said = f"{OURS} is first, or tied with the first, in {first} of {len(matrix)} scenarios"
    for place in ("not told apart", "behind"):
        if names := [name for name in matrix if places[name] == place]:
            said += f", {place} in {len(names)} ({', '.join(names)})"
    yield f"{said}."
    if all(ORACLE in row for row in matrix.values()):
        gaps = {name: fmean(row[ORACLE]) - fmean(row[OURS]) for name, row in matrix.items()}
        far = [f"{name} by {gap * 100:.1f}" for name, gap in gaps.items() if gap > NEAR]
        near = f"{len(matrix) - len(far)} of {len(matrix)} scenarios"
        exceptions = f"; not in {', '.join(far)}" if far else ""
        yield f"{OURS} is within {NEAR * 100:.0f} points of the oracle in {near}{exceptions}."


def place_of_ours(comparison: Comparison) -> Literal["first", "not told apart", "behind"]:
    """First, or tied with the first: surely no more than `CLOSE` behind any other."""
    if OURS not in (*comparison.tied_with_best, *comparison.not_told_apart):
        return "behind"
    others = [name for name in comparison.policies if name not in (OURS, ORACLE)]
    least = [comparison.difference(OURS, name).attainment.low for name in others]
    sure = all(low is not None and low >= -CLOSE for low in least)
    return "first" if sure else "not told apart"


def since(version: str, changed: Sequence[Change]) -> Iterator[str]:
    sure = [change for change in changed if change.verdict in ("better", "worse")]
    moved = sum(change.gain.mean != 0 for change in changed)
    yield f"Since {version}, {moved} of {len(changed)} cells changed, {len(sure)} beyond doubt."
    for change in sorted(sure, key=lambda change: change.gain.mean):
        margin = change.gain.margin or 0.0
        points = f"{change.gain.mean * 100:+.1f} ±{margin * 100:.1f} points"
        yield f"  {change.scenario}, {change.policy}: {points}, {change.verdict}"


def main() -> int:
    names = sorted(path.stem for path in SCENARIOS.glob("*.yaml"))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scenario", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--policy", nargs="+", choices=ALL_POLICIES, default=list(ALL_POLICIES))
    parser.add_argument("--seeds", type=int, help="runs of each cell; else as many as it takes")
    parser.add_argument("--workers", type=int, default=CORES, help="processes")
    parser.add_argument("--save", action="store_true", help=f"write {STORED.name} anew")
    parser.add_argument("--markdown", type=Path, help="write the matrix to this file too")
    args = parser.parse_args()
    if args.save and (args.scenario, args.policy) != (names, list(ALL_POLICIES)):
        parser.error("--save is of the whole matrix: without --scenario and --policy")

    try:
        by_scenario, watch = played(args.scenario, args.policy, args.seeds, args.workers)
    except PacelineError as error:
        print(error, file=sys.stderr)
        return 2
    matrix = matrix_of(by_scenario)
    standings = {name: compare(results) for name, results in by_scenario.items()}
    console = Console(highlight=False, width=WIDE)
    console.print(
        table_of(matrix, standings, watch), *summary(matrix, standings), watch.pace(), sep="\n"
    )
    changed = []
    if STORED.exists():
        stored = msgspec.json.decode(STORED.read_bytes(), type=Stored)
        changed = list(changes(matrix, stored.attainment))
        console.print(*since(stored.version, changed), sep="\n")
    if args.markdown:
        args.markdown.write_text(markdown_of(matrix, standings), encoding="utf-8")
    if args.save:
        text = msgspec.json.format(msgspec.json.encode(Stored(__version__, matrix)), indent=1)
        STORED.write_bytes(text + b"\n")
    core_s = {scenario: round(seconds, 1) for scenario, seconds in watch.core_s.items()}
    line = {"bench": "lab", "core_s": core_s, "attainment": matrix, "changes": changed}
    print(msgspec.json.encode(line).decode())
    return any(change.policy == OURS and change.verdict == "worse" for change in changed)


if __name__ == "__main__":
    sys.exit(main())
