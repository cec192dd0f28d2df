"""How far is each batch of requests, and what has it cost up to now?

A batch is what its client calls so, by a header of each of its requests; two tenants' batches of
one name are two. What is kept of one is from its first request to its last, whatever the window
that others are counted in. Requests that are of none cost no more here than to be passed over.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import islice
from math import inf

import msgspec

from paceline.domain.request import State
from paceline.kernel import Kernel
from paceline.observe.cost import Share
from paceline.observe.ended import Over

MOST = 200
"""Batches that are kept. One more takes the place of the one that was seen longest ago, of the
tenant that has the most: what that has counted is gone. Nobody's names are at others' cost."""


class Batch(msgspec.Struct):
    """One of them, up to now. Times are on the clock of those who tell."""

    first_at: float = inf
    """When its first request came..."""
    last_at: float = -inf
    """...and when one of its requests was last there."""
    done: int = 0
    failed: int = 0
    """Requests that ended otherwise than well: turned away, broken off, left by their client."""
    under_way: int = 0
    waiting: int = 0
    """Requests that are at no worker now."""
    output_tokens: int = 0
    kept_tokens: int = 0
    """Of requests that kept their promise."""
    worker_s: float = 0.0
    cost: float = 0.0

    def seen(self, since: float, at: float) -> None:
        """A request of it that came at `since` is there."""
        self.first_at = min(self.first_at, since)
        self.last_at = max(self.last_at, at)


class Batches:
    """Those that were seen last."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._known: dict[str, dict[str, Batch]] = {}
        """By tenant and name: of each tenant in the order in which they were last seen."""

    def over(self, over: Over) -> None:
        """These requests are over."""
        for life, outcome in over:
            request = outcome.request
            if not request.batch:
                continue
            batch = self._of(request.tenant, request.batch)
            batch.seen(life.done_at - outcome.seconds, life.done_at)
            if outcome.error or outcome.status >= 400:
                batch.failed += 1
            else:
                batch.done += 1
            batch.output_tokens += outcome.output_tokens
            batch.kept_tokens += outcome.output_tokens * outcome.kept

    def look(self, now: float) -> None:
        """See who is there."""
        for batches in self._known.values():
            for batch in batches.values():
                batch.under_way = batch.waiting = 0
        there = Counter(
            (live.request.tenant, live.request.batch, live.state is State.QUEUED)
            for live in self._kernel.requests.values()
            if live.request.batch
        )
        for (tenant, name, waits), count in islice(there.items(), MOST):
            batch = self._of(tenant, name)
            batch.seen(now, now)
            if waits:
                batch.waiting = count
            else:
                batch.under_way = count

    def took(self, shares: Iterable[Share]) -> None:
        """So much of the workers' time went to these."""
        for share in shares:
            batch = self._known.get(share.tenant, {}).get(share.batch)
            if batch is not None:
                batch.worker_s += share.worker_s
                batch.cost += share.cost

    def newest(self, now: float) -> list[tuple[str, str, Batch]]:
        """All that are known, with tenant and name: the one that was seen last at first."""
        self.look(now)
        found = [
            (tenant, name, batch)
            for tenant, batches in self._known.items()
            for name, batch in batches.items()
        ]
        return sorted(found, key=lambda each: (-each[2].last_at, *each[:2]))

    def _of(self, tenant: str, name: str) -> Batch:
        """The batch, which is seen now."""
        batches = self._known.setdefault(tenant, {})
        batch = batches.pop(name, None)
        if batch is None:
            batch = Batch()
            if sum(map(len, self._known.values())) >= MOST:
                most = max(self._known.values(), key=len)
                del most[next(iter(most))]
        batches[name] = batch
        return batch
