"""How wrong is the simulator? Three recorded runs of real vLLM engines, played again.

Of each run (tests/data/vllm_runs) the step times are learned from what a gateway would have seen up
to the end of the 60th (100th) answer, by the very estimator that serves. Then the whole run is
simulated from its start: recorded arrivals and lengths in, the engine's own limits, nothing else.
Scored are only the requests that nothing was learned from; no number was fitted to them.

Two conventions are in use: the mean of the requests' own absolute errors, and the error of a figure
of the whole run (its mean, p50, p90, p99), in which errors of single requests cancel. Both are
given. The published figures are the best reported that we know of, their source is not known; who
reports only the second kind has the easier task.

    python bench/fidelity.py [--json]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "policy"))

from vllm_runs import BUDGET, RUNS, Seen, Timeline, learn, read  # type: ignore  # noqa: E402

from paceline.enginemodel import Generation, Load, Profile, Scheduler  # noqa: E402
from paceline.kernel.timing import WorkerTiming  # noqa: E402
from paceline.policy.steptime import StepModel, StepTimeEstimator  # noqa: E402
from paceline.simulator.learned import learned_profile  # noqa: E402

LEARNED_FROM = (60, 100)
PUBLISHED = {"e2e": 6.7, "ttft": 17.6, "itl": 7.1}
PUBLISHED_P99 = 9.2
"""The best reported errors of other simulators that we know of, %: see docs/fidelity.md."""
BLOCK = 16
PROMPT_S = 1.0
"""Who gets the first token within this did not queue. Relative errors of long waits are small, so
these requests' TTFT is scored on its own too, as `prompt ttft`."""

Seconds = NDArray[np.float64]


class Limits(msgspec.Struct, frozen=True):
    """What the run's own record says of its engine."""

    max_num_seqs: int
    kv_tokens: int | None = None
    """None: not recorded; the cache was never near full."""
    ranks: int = 1
    """Data-parallel ranks."""


LIMITS = {
    "RTX4090_Llama-3.1-8B": Limits(256, 41_408),
    "RTXPRO6000_Llama-3.1-8B": Limits(128),
    "RTXPRO6000_Qwen3-30B-A3B-Instruct-2507": Limits(128, ranks=2),
}


class Recorded(msgspec.Struct, frozen=True):
    """A request of a run; times in seconds on the engine's clock."""

    arrived_at: float
    """At the API server, as a gateway sees it."""
    prompt_tokens: int
    output_tokens: int
    first_at: float
    last_at: float


def recorded(path: Path) -> list[Recorded]:
    """In the order of arrival. API server and engine have clocks of their own: the quickest way
    from one to the other is taken to have needed no time."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    offset = min(r["queued_ts"] - r["arrival_time"] for r in lines)
    requests = [
        Recorded(
            r["arrival_time"] + offset,
            r["input_toks"],
            r["output_toks"],
            r["first_token_ts"],
            r["last_token_ts"],
        )
        for r in lines
    ]
    return sorted(requests, key=lambda r: r.arrived_at)


def learned(path: Path, count: int) -> StepModel:
    """What the gateway knows when `count` answers are complete. Of streams still running then only
    their past is used, with the tokens that the complete ones got in such a time."""
    requests = read(path)
    known, rest = requests[:count], requests[count:]
    now = known[-1].last_at
    usual_s = float(np.median([r.itl_s for r in known]))
    running = [
        Seen(r.prompt_tokens, 2 + round((now - r.first_at) / usual_s), r.first_at, now)
        for r in rest
        if r.first_at < now
    ]
    timeline, estimator = Timeline([*known, *running]), StepTimeEstimator()
    for request in known:
        learn(estimator, request, timeline.spans(request))
    return estimator.model()


class Engine:
    """Data-parallel ranks, each with a scheduler of its own, that run their steps together."""

    def __init__(self, profile: Profile, ranks: int) -> None:
        self._profile = profile
        self._ranks = [Scheduler(profile) for _ in range(ranks)]

    @property
    def idle(self) -> bool:
        return not any(rank.running for rank in self._ranks)

    def add(self, generation: Generation) -> None:
        """To the least loaded rank, as vLLM counts: a waiting request is worth four."""
        min(self._ranks, key=lambda rank: 4 * rank.waiting + rank.running).add(generation)

    def step(self) -> tuple[float, list[str], list[str]] | None:
        """Seconds, and who got the first and the last token; None: nothing to do."""
        plans = [(rank, plan) for rank in self._ranks if (plan := rank.plan()) is not None]
        if not plans:
            return None
        loads = [plan.load for _, plan in plans]
        load = Load(
            sum(x.streams for x in loads),
            sum(x.prefill for x in loads),
            sum(x.context for x in loads),
            sum(x.attention for x in loads),
        )
        outcomes = [rank.complete(plan) for rank, plan in plans]
        first = [name for outcome in outcomes for name in outcome.first]
        finished = [name for outcome in outcomes for name in outcome.finished]
        return self._profile.step_seconds(load), first, finished


def simulated(engine: Engine, requests: Sequence[Recorded]) -> list[Recorded]:
    """The same requests, with the token times of a simulation.

    vLLM 0.19 plans a step while the one before it runs (asynchronous scheduling, its default), so
    who comes during a step is in the next but one.
    """
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    coming = [(r.arrived_at, _generation(i, r)) for i, r in enumerate(requests)][::-1]
    now = planned_at = 0.0
    while len(last) < len(requests):
        horizon = now if engine.idle else planned_at
        while coming and coming[-1][0] <= horizon:
            engine.add(coming.pop()[1])
        planned_at = now
        step = engine.step()
        if step is None:
            now = max(now, coming[-1][0])
            continue
        now += step[0]
        first |= dict.fromkeys(step[1], now)
        last |= dict.fromkeys(step[2], now)
    return [
        msgspec.structs.replace(r, first_at=first[str(i)], last_at=last[str(i)])
        for i, r in enumerate(requests)
    ]


def _generation(place: int, request: Recorded) -> Generation:
    """Names for all blocks, so that a preempted request may find what it had computed."""
    blocks = (request.prompt_tokens + request.output_tokens) // BLOCK
    names = [place << 16 | block for block in range(blocks)]
    return Generation(str(place), request.prompt_tokens, request.output_tokens, names)


def figures(requests: Sequence[Recorded]) -> dict[str, Seconds]:
    """End-to-end time, TTFT and mean ITL of each request."""
    arrived, first, last, tokens = (
        np.array([getattr(r, name) for r in requests], dtype=float)
        for name in ("arrived_at", "first_at", "last_at", "output_tokens")
    )
    return {"e2e": last - arrived, "ttft": first - arrived, "itl": (last - first) / (tokens - 1)}


def errors(seen: Seconds, played: Seconds) -> dict[str, float]:
    """Errors in %: of the requests one by one, and (signed) of the run as a whole."""
    each = np.abs(played / seen - 1)
    whole = {
        f"p{share}": np.percentile(played, share) / np.percentile(seen, share) - 1
        for share in (50, 90, 99)
    }
    found = {
        "each_mean": each.mean(),
        "each_median": np.median(each),
        "mean": played.mean() / seen.mean() - 1,
        **whole,
    }
    return {name: round(100 * float(value), 2) for name, value in found.items()}


def score(path: Path, count: int) -> dict[str, dict[str, float]]:
    """Errors of one run, learned from its first `count` answers."""
    limits = LIMITS[path.stem.removesuffix("_requests")]
    worker = WorkerTiming(
        id=path.stem,
        model="",
        step=learned(path, count),
        prefill_budget=BUDGET,
        kv_capacity_tokens=limits.kv_tokens,
        block_size=BLOCK,
    )
    seen = recorded(path)
    engine = Engine(learned_profile(worker, limits.max_num_seqs), limits.ranks)
    played = simulated(engine, seen)
    cut = sorted(r.last_at for r in seen)[count - 1]
    later = [i for i, r in enumerate(seen) if r.last_at > cut]
    truth, guess = figures([seen[i] for i in later]), figures([played[i] for i in later])
    found = {name: errors(truth[name], guess[name]) for name in truth}
    prompt = truth["ttft"] < PROMPT_S
    if prompt.any():
        found["prompt ttft"] = errors(truth["ttft"][prompt], guess["ttft"][prompt])
    return found


def over_all(runs: Sequence[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Mean absolute error over the runs that have the figure."""
    means: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(name for run in runs for name in run):
        rows = [run[name] for run in runs if name in run]
        means[name] = {
            kind: round(float(np.mean([abs(row[kind]) for row in rows])), 2) for kind in rows[0]
        }
    return means


def table(results: dict[str, dict[str, dict[str, float]]]) -> Table:
    shown = Table(
        title="error of the simulation, %, of the requests that nothing was learned from",
        caption=f"best published p99: {PUBLISHED_P99}",
    )
    shown.add_column("run, answers learned from")
    shown.add_column("of")
    for header in ("each: mean", "median", "whole run: mean", "p50", "p90", "p99", "published"):
        shown.add_column(header, justify="right")
    for run, by_figure in results.items():
        for name, row in by_figure.items():
            best = PUBLISHED.get(name, "") if run.startswith("all") else ""
            shown.add_row(run, name, *(f"{value:.1f}" for value in row.values()), str(best))
        shown.add_section()
    return shown


def main() -> None:
    results = {}
    for count in LEARNED_FROM:
        scores = [score(path, count) for path in RUNS]
        for path, found in zip(RUNS, scores, strict=True):
            results[f"{path.stem.removesuffix('_requests')}, {count}"] = found
        results[f"all three, {count}"] = over_all(scores)
    if "--json" not in sys.argv[1:]:
        Console(width=140).print(table(results))
    published = {**PUBLISHED, "p99": PUBLISHED_P99}
    print(json.dumps({"bench": "fidelity", "error_percent": results, "published": published}))


if __name__ == "__main__":
    main()
