"""What was lost, when, to which cause, and who was hurt?"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping

import msgspec

from paceline.domain.worker import Worker
from paceline.policy.causes import Cause, Split, dominant
from paceline.policy.look import Loss

LATE_KEPT = 256
"""Newest late events kept of each worker."""
WINDOW_S = 30.0
"""Losses of so many seconds are looked at together: longer than most answers, so that a trouble of
now still counts when the requests that it broke end, and soon over when the trouble is."""
MOST_TENANTS = 32
"""Named apart in one second's losses; the others count together."""
OTHERS = "other"


class Late(msgspec.Struct, frozen=True):
    """A gap, a first token or an answer that was later than promised."""

    at: float
    """When it was over, by the host's clock."""
    what: str
    """step: a gap of all streams of the worker. stream: of one alone. first_token. mean: the mean
    gap of an answer; then `seconds` is all of its gaps together. none: there was no answer."""
    model: str
    worker: str
    seconds: float
    late_s: float
    """Beyond what was promised."""
    cause: Cause
    """Of most of it."""
    split: Split
    """Of `late_s`, which it adds up to."""
    tiers: dict[str, int]
    """Streams hurt, by tier."""
    tenants: dict[str, int]
    request_id: str = ""

    @property
    def streams(self) -> int:
        return sum(self.tiers.values())


class Total(msgspec.Struct):
    """Since the start."""

    seconds: float = 0.0
    gaps: int = 0
    promises: int = 0


class _Second:
    """The losses of one second."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.requests = 0
        self.lost: dict[tuple[str, str, Cause], Loss] = {}


class Losses:
    """Counters for ever, sums for a while, and the newest events of each worker."""

    def __init__(self) -> None:
        self.totals: dict[tuple[str, str, str, Cause], Total] = {}
        """By model, tier, worker and cause."""
        self.late: dict[str, deque[Late]] = {}
        """By worker; those of no worker under the empty name."""
        self._newest = _Second(0)
        self._seconds = deque([self._newest], maxlen=int(WINDOW_S) + 1)

    def request_over(self, now: float) -> None:
        """A request has ended, in whatever way."""
        self._second(now).requests += 1

    def add(self, late: Late, seconds: dict[str, Split], broken: Mapping[str, int]) -> None:
        """Something was late: `seconds` lost by tier, over all streams hurt, and promises."""
        kept = self.late.get(late.worker)
        if kept is None:
            kept = self.late[late.worker] = deque(maxlen=LATE_KEPT)
        kept.append(late)
        for tier, split in seconds.items():
            for cause, s in split.items():
                self._total(late, tier, cause).seconds += s
            total = self._total(late, tier, late.cause)
            total.gaps += late.tiers.get(tier, 0)
            total.promises += broken.get(tier, 0)
        self._recent(late, seconds.values(), sum(broken.values()))

    def _total(self, late: Late, tier: str, cause: Cause) -> Total:
        key = (late.model, tier, late.worker, cause)
        total = self.totals.get(key)
        if total is None:
            total = self.totals[key] = Total()
        return total

    def _recent(self, late: Late, splits: Iterable[Split], promises: int) -> None:
        lost = self._second(late.at).lost
        for split in splits:
            for cause, s in split.items():
                key = (late.model, late.worker, cause)
                loss = lost.get(key)
                if loss is None:
                    loss = lost[key] = Loss(*key, since=late.at)
                loss.seconds += s
        loss = lost.setdefault(
            (late.model, late.worker, late.cause),
            Loss(late.model, late.worker, late.cause, since=late.at),
        )
        loss.gaps += late.streams
        loss.promises += promises
        for name, count in late.tiers.items():
            loss.tiers[name] = loss.tiers.get(name, 0) + count
        for name, count in late.tenants.items():
            known = name in loss.tenants or len(loss.tenants) < MOST_TENANTS
            name = name if known else OTHERS
            loss.tenants[name] = loss.tenants.get(name, 0) + count

    def _second(self, now: float) -> _Second:
        if now >= self._newest.at + 1:
            self._newest = _Second(int(now))
            self._seconds.append(self._newest)
        return self._newest

    def _of_late(self, now: float) -> Iterator[_Second]:
        return (second for second in self._seconds if second.at > now - WINDOW_S)

    def requests(self, now: float) -> int:
        """How many have ended within the window."""
        return sum(second.requests for second in self._of_late(now))

    def recent(self, now: float) -> list[Loss]:
        """What was lost within the window."""
        sums: dict[tuple[str, str, Cause], Loss] = {}
        for second in self._of_late(now):
            for key, loss in second.lost.items():
                found = sums.get(key)
                if found is None:
                    found = sums[key] = Loss(*key, since=loss.since)
                found.seconds += loss.seconds
                found.gaps += loss.gaps
                found.promises += loss.promises
                for name, count in loss.tiers.items():
                    found.tiers[name] = found.tiers.get(name, 0) + count
                for name, count in loss.tenants.items():
                    found.tenants[name] = found.tenants.get(name, 0) + count
        return list(sums.values())

    def forget(self, workers: Iterable[str]) -> None:
        """Workers that are gone for good: nothing grows for ever."""
        gone = set(workers)
        for worker in gone:
            self.late.pop(worker, None)
        for key in [key for key in self.totals if key[2] in gone]:
            del self.totals[key]


def of_request(
    at: float,
    what: str,
    seconds: float,
    split: Split,
    of: tuple[str, str, str, str, str],
) -> Late:
    """One request's lateness; `of`: its id, model, tier, tenant and worker."""
    request_id, model, tier, tenant, worker = of
    late_s, cause = sum(split.values()), dominant(split)
    return Late(
        at, what, model, worker, seconds, late_s, cause, split, {tier: 1}, {tenant: 1}, request_id
    )


def of_step(
    at: float,
    seconds: float,
    split: Split,
    worker: Worker,
    tiers: dict[str, int],
    tenants: dict[str, int],
) -> Late:
    """A gap of all streams of a worker; `split`: of the one that it made latest."""
    late_s, cause = sum(split.values()), dominant(split)
    return Late(at, "step", worker.model, worker.id, seconds, late_s, cause, split, tiers, tenants)
