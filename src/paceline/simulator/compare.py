"""Which policy keeps more promises, and is the difference more than chance?

All policies play the same seeds, so that each seed gives one difference between two policies with
the same arrivals and lengths in both: their mean is known much better than either attainment alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import inf, sqrt
from statistics import fmean, stdev
from typing import Literal

import msgspec

from paceline.simulator.oracle import ORACLE
from paceline.simulator.result import Result

NO_MATTER = 0.001
"""Differences in attainment below a tenth of a point are none, however sure they are."""
CLOSE = 0.02
"""Two policies are as good as each other only if all of the interval is within so much attainment:
a test of equivalence. A wide interval that contains 0 shows nothing."""

Verdict = Literal["better", "worse", "tied", "unsure"]
"""unsure: chance can't be told from merit, for there are too few seeds."""

METRICS: dict[str, Callable[[Result], float | None]] = {
    "attainment": lambda r: r.attainment,
    "weighted_attainment": lambda r: r.weighted_attainment,
    "goodput_requests_per_s": lambda r: r.goodput_requests_per_s,
    "goodput_tokens_per_s": lambda r: r.goodput_tokens_per_s,
    "ttft_p50_s": lambda r: r.total.ttft_s.p50,
    "ttft_p90_s": lambda r: r.total.ttft_s.p90,
    "ttft_p99_s": lambda r: r.total.ttft_s.p99,
    "itl_p50_s": lambda r: r.total.itl_s.p50,
    "itl_p90_s": lambda r: r.total.itl_s.p90,
    "itl_p99_s": lambda r: r.total.itl_s.p99,
    "stall_p99_s": lambda r: r.total.stall_s.p99,
    "kv_mean": lambda r: r.kv_mean,
    "kv_p99": lambda r: r.kv_p99,
    "preemptions": lambda r: r.preemptions,
    "shed": lambda r: r.total.statuses.get("shed", 0),
    "degraded": lambda r: r.total.degraded,
    "paused": lambda r: r.total.paused,
    "moved": lambda r: r.total.moved,
    "cost_per_million_tokens": lambda r: r.cost_per_million_tokens,
    "cost_per_million_kept_tokens": lambda r: r.cost_per_million_kept_tokens,
}
"""None of them is ever below 0."""
SHARES = ("attainment", "weighted_attainment", "kv_mean", "kv_p99")
"""Those that are never above 1."""


class Estimate(msgspec.Struct, frozen=True):
    """A mean over seeds and its 95 % interval, which is None with fewer than two of them."""

    mean: float
    low: float | None = None
    high: float | None = None
    """The interval ends where the possible does."""
    margin: float | None = None
    """Half of the interval, before it is cut there."""


class Difference(msgspec.Struct, frozen=True):
    """How much more attainment a policy has than another, seed by seed."""

    policy: str
    to: str
    attainment: Estimate
    verdict: Verdict
    """On the policy, against the other one."""


class Standing(msgspec.Struct, frozen=True):
    """One policy over all seeds."""

    figures: dict[str, Estimate | None]
    """By the names of `METRICS`; None where no run could tell."""
    tiers: dict[str, Estimate]
    """Attainment by tier."""
    to_first: Difference | None
    """None for the first policy."""

    @property
    def attainment(self) -> Estimate:
        """Of all tiers: every run has it."""
        known = self.figures["attainment"]
        assert known is not None
        return known


class Comparison(msgspec.Struct, frozen=True):
    """Policies in one scenario, over the same seeds."""

    scenario: str
    at: dict[str, str]
    """The swept settings that this was played with; empty without a sweep."""
    seeds: tuple[int, ...]
    best: str
    """The highest mean attainment, apart from the oracle's, which no real policy has to match."""
    tied_with_best: tuple[str, ...]
    """The best one, and those that are as good."""
    not_told_apart: tuple[str, ...]
    """Those that may be as good as the best one or not: more seeds would tell."""
    policies: dict[str, Standing]
    """In the order in which they were named; the first is what others are compared with."""
    results: tuple[Result, ...]

    @property
    def tiers(self) -> tuple[str, ...]:
        """Those that any request had, in the scenario's order."""
        return tuple(dict.fromkeys(t for s in self.policies.values() for t in s.tiers))

    def of(self, policy: str) -> tuple[Result, ...]:
        """A policy's results, by seed."""
        return _of(self.results, policy)

    def difference(self, policy: str, to: str) -> Difference:
        return difference(self.of(policy), self.of(to))


def compare(results: Sequence[Result], at: Mapping[str, str] | None = None) -> Comparison:
    """Needs at least one result; all are of one scenario with the same settings."""
    names = tuple(dict.fromkeys(result.policy for result in results))
    runs = {name: _of(results, name) for name in names}
    rivals = [name for name in names if name != ORACLE] or names
    best = max(rivals, key=lambda name: fmean(r.attainment for r in runs[name]))
    verdicts = {name: difference(runs[name], runs[best]).verdict for name in rivals if name != best}
    return Comparison(
        scenario=results[0].scenario,
        at=dict(at or {}),
        seeds=tuple(sorted({result.seed for result in results})),
        best=best,
        tied_with_best=tuple(n for n in rivals if n == best or verdicts[n] == "tied"),
        not_told_apart=tuple(n for n, verdict in verdicts.items() if verdict == "unsure"),
        policies={name: _standing(runs[name], runs[names[0]]) for name in names},
        results=tuple(result for name in names for result in runs[name]),
    )


def difference(ours: Sequence[Result], theirs: Sequence[Result]) -> Difference:
    """Paired over the seeds that both played."""
    their_attainment = {result.seed: result.attainment for result in theirs}
    gains = [r.attainment - their_attainment[r.seed] for r in ours if r.seed in their_attainment]
    gain = estimate(gains, -1.0, 1.0)
    if gain is None:
        raise ValueError(f"{ours[0].policy} and {theirs[0].policy} have no seed in common")
    return Difference(ours[0].policy, theirs[0].policy, gain, verdict(gain))


def verdict(gain: Estimate) -> Verdict:
    """What a difference in attainment means."""
    if gain.low is None or gain.high is None:
        return "unsure"
    if gain.low <= 0 <= gain.high or abs(gain.mean) < NO_MATTER:
        return "tied" if max(-gain.low, gain.high) <= CLOSE else "unsure"
    return "better" if gain.mean > 0 else "worse"


def estimate(values: Sequence[float], least: float = -inf, most: float = inf) -> Estimate | None:
    """Student's interval: the mean's standard error is itself estimated, from few seeds.

    It knows nothing of what is possible, so it is cut at the least and the most that is.
    """
    if not values:
        return None
    mean = fmean(values)
    if len(values) < 2:
        return Estimate(mean)
    margin = t_quantile(len(values) - 1) * stdev(values) / sqrt(len(values))
    return Estimate(mean, max(mean - margin, least), min(mean + margin, most), margin)


def t_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, to three digits after the point."""
    if freedom <= len(SMALL_T):
        return SMALL_T[freedom - 1]
    # The expansion around the normal quantile: Abramowitz and Stegun, 26.7.5.
    return 1.95996 + 2.37227 / freedom + 2.82250 / freedom**2 + 2.55585 / freedom**3


SMALL_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def _of(results: Sequence[Result], policy: str) -> tuple[Result, ...]:
    return tuple(sorted((r for r in results if r.policy == policy), key=lambda r: r.seed))


def _standing(runs: Sequence[Result], first: Sequence[Result]) -> Standing:
    figures = {
        name: estimate(
            [value for run in runs if (value := metric(run)) is not None],
            least=0.0,
            most=1.0 if name in SHARES else inf,
        )
        for name, metric in METRICS.items()
    }
    tiers: dict[str, list[float]] = {}
    for run in runs:
        for tier, group in run.tiers.items():
            tiers.setdefault(tier, []).append(group.attainment)
    return Standing(
        figures=figures,
        tiers={t: share for t, all_ in tiers.items() if (share := estimate(all_, 0.0, 1.0))},
        to_first=None if runs[0].policy == first[0].policy else difference(runs, first),
    )
