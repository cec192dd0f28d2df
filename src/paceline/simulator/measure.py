"""Which promises did one run keep, how fast, and at what cost?

Counted are the requests that arrive between `warmup_s` and the end of arrivals; whoever was turned
away, failed, broke off or was left unfinished is a miss. Memory does not grow with the requests:
times go into the buckets of `workload.histogram`, which are within 2.2 % of the truth.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from itertools import accumulate
from math import inf

from paceline.simulator.result import CAUSES, QUANTILES, Group, Result, Series, Times, WorkerUse
from paceline.simulator.scenario import Scenario, SimTier
from paceline.simulator.seen import Seen
from paceline.workload.histogram import bucket, merged, quantile_s

SLOTS = 60
"""Of the time series."""
KV_GRAIN = 1000
"""Shares of KV cache are counted in steps of one in so many."""


class Recorder:
    """Takes what happens in one run, and sums it up at its end."""

    def __init__(self, scenario: Scenario) -> None:
        self._tiers = dict(scenario.tiers)
        self._from_s = min(scenario.warmup_s, scenario.seconds)
        self._until_s = scenario.seconds
        self._slot_s = (self._until_s - self._from_s) / SLOTS
        self._groups: dict[tuple[str, str], _Tally] = defaultdict(_Tally)
        self._slots = [_Slot() for _ in range(SLOTS)]
        self._workers: dict[str, _Use] = defaultdict(_Use)
        self._cost = 0.0
        self._preemptions = 0

    def add(self, seen: Seen) -> None:
        """A request is over."""
        if seen.at_s < self._from_s:
            return
        cause = "" if seen.kept else _cause(seen, self._tiers[seen.tier])
        self._groups[seen.tier, seen.tenant].add(seen, cause)
        self._slots[self._slot(seen.at_s)].add(seen)
        if seen.worker:
            use = self._workers[seen.worker]
            use.requests += 1
            use.kept += seen.kept

    def sample(
        self, now: float, worker_id: str, kv_used: float, running: int, waiting: int
    ) -> None:
        """How a worker stood at one moment."""
        if self._from_s <= now <= self._until_s:
            self._workers[worker_id].sample(kv_used, running, waiting)

    def cost(self, amount: float) -> None:
        """Add what workers cost while requests were counted."""
        self._cost += amount

    def preempted(self, count: int) -> None:
        self._preemptions += count

    def result(self, scenario: str, policy: str, seed: int) -> Result:
        """The run is over."""
        tiers = _by(self._groups, lambda key: key[0])
        total = _Tally.sum(tiers.values())
        seconds = self._until_s - self._from_s
        kv = merged(use.kv for use in self._workers.values())
        return Result(
            scenario=scenario,
            policy=policy,
            seed=seed,
            seconds=seconds,
            attainment=_ratio(total.kept, total.requests) or 0.0,
            weighted_attainment=self._weighted(tiers),
            goodput_requests_per_s=_ratio(total.kept, seconds) or 0.0,
            goodput_tokens_per_s=_ratio(total.kept_tokens, seconds) or 0.0,
            kv_mean=_kv_mean(kv),
            kv_p99=_kv_quantile(kv, 0.99),
            preemptions=self._preemptions,
            cost_per_million_tokens=_ratio(self._cost * 1e6, total.output_tokens),
            cost_per_million_kept_tokens=_ratio(self._cost * 1e6, total.kept_tokens),
            total=total.group(),
            tiers={tier: tiers[tier].group() for tier in self._tiers if tier in tiers},
            tenants={n: t.group() for n, t in _by(self._groups, lambda key: key[1]).items()},
            workers={
                name: use.summary() for name, use in sorted(self._workers.items(), key=_numbered)
            },
            series=self._series(),
        )

    def _slot(self, at_s: float) -> int:
        """Later turns of a conversation may come after the last slot: they belong to it."""
        return min(SLOTS - 1, int((at_s - self._from_s) / self._slot_s)) if self._slot_s else 0

    def _weighted(self, tiers: Mapping[str, _Tally]) -> float:
        kept = sum(self._tiers[name].weight * tally.kept for name, tally in tiers.items())
        asked = sum(self._tiers[name].weight * tally.requests for name, tally in tiers.items())
        return _ratio(kept, asked) or 0.0

    def _series(self) -> Series:
        return Series(
            from_s=self._from_s,
            slot_s=self._slot_s,
            arrivals=tuple(slot.requests for slot in self._slots),
            attainment=tuple(_ratio(slot.kept, slot.requests) for slot in self._slots),
            ttft_p99_s=tuple(_quantile(slot.ttft, 0.99) for slot in self._slots),
            itl_mean_s=tuple(_ratio(slot.itl_sum_s, slot.streams) for slot in self._slots),
        )


class _Spread:
    """Seconds in buckets, and their sum."""

    __slots__ = ("counts", "sum_s")

    def __init__(self) -> None:
        self.counts: Counter[int] = Counter()
        self.sum_s = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bucket(seconds)] += 1
        self.sum_s += seconds

    def merge(self, other: _Spread) -> None:
        self.counts.update(other.counts)
        self.sum_s += other.sum_s

    def times(self) -> Times:
        mean = _ratio(self.sum_s, self.counts.total())
        p50, p90, p99 = (_quantile(self.counts, q) for q in (0.5, 0.9, 0.99))
        curve = [value for q in QUANTILES if (value := _quantile(self.counts, q)) is not None]
        return Times(mean, p50, p90, p99, tuple(curve))


class _Tally:
    """The requests of one tier and tenant."""

    __slots__ = (
        "degraded",
        "itl",
        "kept",
        "kept_tokens",
        "missed",
        "moved",
        "output_tokens",
        "paused",
        "stall",
        "statuses",
        "ttft",
    )

    def __init__(self) -> None:
        self.kept = 0
        self.output_tokens = 0
        self.kept_tokens = 0
        self.degraded = self.paused = self.moved = 0
        self.statuses: Counter[str] = Counter()
        self.missed: Counter[str] = Counter()
        self.ttft, self.itl, self.stall = _Spread(), _Spread(), _Spread()

    @classmethod
    def sum(cls, tallies: Iterable[_Tally]) -> _Tally:
        total = cls()
        for tally in tallies:
            total.merge(tally)
        return total

    @property
    def requests(self) -> int:
        return self.statuses.total()

    def add(self, seen: Seen, cause: str) -> None:
        self.statuses[seen.status] += 1
        self.output_tokens += seen.output_tokens
        self.degraded += seen.degraded
        self.paused += seen.paused
        self.moved += seen.moved
        if cause:
            self.missed[cause] += 1
        else:
            self.kept += 1
            self.kept_tokens += seen.output_tokens
        if seen.ttft_s < inf:
            self.ttft.add(seen.ttft_s)
        if seen.itl_s > 0:
            self.itl.add(seen.itl_s)
            self.stall.add(seen.stall_s)

    def merge(self, other: _Tally) -> None:
        self.kept += other.kept
        self.output_tokens += other.output_tokens
        self.kept_tokens += other.kept_tokens
        self.degraded += other.degraded
        self.paused += other.paused
        self.moved += other.moved
        self.statuses.update(other.statuses)
        self.missed.update(other.missed)
        self.ttft.merge(other.ttft)
        self.itl.merge(other.itl)
        self.stall.merge(other.stall)

    def group(self) -> Group:
        return Group(
            requests=self.requests,
            kept=self.kept,
            attainment=_ratio(self.kept, self.requests) or 0.0,
            statuses=dict(sorted(self.statuses.items())),
            missed={cause: self.missed[cause] for cause in CAUSES if self.missed[cause]},
            output_tokens=self.output_tokens,
            kept_tokens=self.kept_tokens,
            ttft_s=self.ttft.times(),
            itl_s=self.itl.times(),
            stall_s=self.stall.times(),
            degraded=self.degraded,
            paused=self.paused,
            moved=self.moved,
        )


class _Slot:
    """The requests that arrived in one slot of time."""

    __slots__ = ("itl_sum_s", "kept", "requests", "streams", "ttft")

    def __init__(self) -> None:
        self.requests = 0
        self.kept = 0
        self.streams = 0
        self.itl_sum_s = 0.0
        self.ttft: Counter[int] = Counter()

    def add(self, seen: Seen) -> None:
        self.requests += 1
        self.kept += seen.kept
        if seen.ttft_s < inf:
            self.ttft[bucket(seen.ttft_s)] += 1
        if seen.itl_s > 0:
            self.streams += 1
            self.itl_sum_s += seen.itl_s


class _Use:
    """What one worker did, and how full it was."""

    __slots__ = ("kept", "kv", "requests", "running", "waiting")

    def __init__(self) -> None:
        self.requests = 0
        self.kept = 0
        self.kv: Counter[int] = Counter()
        self.running = 0
        self.waiting = 0

    def sample(self, kv_used: float, running: int, waiting: int) -> None:
        self.kv[round(kv_used * KV_GRAIN)] += 1
        self.running += running
        self.waiting += waiting

    def summary(self) -> WorkerUse:
        samples = self.kv.total()
        return WorkerUse(
            requests=self.requests,
            attainment=_ratio(self.kept, self.requests),
            kv_mean=_kv_mean(self.kv),
            running_mean=_ratio(self.running, samples),
            waiting_mean=_ratio(self.waiting, samples),
        )


def _cause(seen: Seen, tier: SimTier) -> str:
    """Which of `CAUSES` a request that kept no promise has."""
    if seen.status != "ok":
        return "failed" if seen.status == "broke" else seen.status
    if seen.ttft_s > tier.ttft_s:
        return "ttft"
    if seen.itl_s > tier.itl_s:
        return "itl"
    return "stall" if seen.stall_s > tier.stall_s else "deadline"


def _by(
    tallies: Mapping[tuple[str, str], _Tally], part: Callable[[tuple[str, str]], str]
) -> dict[str, _Tally]:
    """The tallies summed by a part of their key, in order of name."""
    sums: dict[str, _Tally] = defaultdict(_Tally)
    for key, tally in sorted(tallies.items()):
        sums[part(key)].merge(tally)
    return dict(sorted(sums.items()))


def _numbered(item: tuple[str, object]) -> tuple[int, str]:
    """So that w2 comes before w10."""
    return len(item[0]), item[0]


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _quantile(counts: Mapping[int, int], q: float) -> float | None:
    """To four digits: the buckets are no finer."""
    value = quantile_s(counts, q)
    return None if value is None else float(f"{value:.4g}")


def _kv_mean(counts: Counter[int]) -> float | None:
    return _ratio(sum(share * n for share, n in counts.items()) / KV_GRAIN, counts.total())


def _kv_quantile(counts: Counter[int], q: float) -> float | None:
    """The nearest-rank quantile."""
    ranked = accumulate(counts[share] for share in sorted(counts))
    rank = q * counts.total()
    shares = zip(sorted(counts), ranked, strict=True)
    return next((share / KV_GRAIN for share, seen in shares if seen >= rank), None)
