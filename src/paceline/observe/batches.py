"""How far is each batch of requests, and what has it cost up to now?

A batch is what its client calls so, by a header of each of its requests; two tenants' batches of
one name are two. What is kept of one is from its first request to its last, whatever the window
that others are counted in. Requests that are of none cost no more here than to be passed over.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from math import inf

import msgspec

from paceline.domain.request import State
from paceline.kernel import Kernel
from paceline.observe.cost import Share
from paceline.observe.ended import Over

MOST = 200
"""Batches that are kept. Another one takes the place of one of the tenant that has the most: the
one that was seen longest ago, of which nothing is known any more."""

Key = tuple[str, str]
"""Tenant and name."""


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
        self._known: dict[Key, Batch] = {}
        """In the order in which they were last seen."""

    def over(self, over: Over) -> None:
        """These requests are over."""
        for life, outcome in over:
            request = outcome.request
            if not request.batch:
                continue
            batch = self._of((request.tenant, request.batch))
            batch.seen(life.done_at - outcome.seconds, life.done_at)
            if outcome.error or outcome.status >= 400:
                batch.failed += 1
            else:
                batch.done += 1
            batch.output_tokens += outcome.output_tokens
            batch.kept_tokens += outcome.output_tokens * outcome.kept

    def took(self, shares: Iterable[Share]) -> None:
        """So much of the workers' time went to these."""
        for share in shares:
            batch = self._known.get((share.tenant, share.batch)) if share.batch else None
            if batch is not None:
                batch.worker_s += share.worker_s
                batch.cost += share.cost

    def look(self, now: float) -> None:
        """See who is there."""
        for batch in self._known.values():
            batch.under_way = batch.waiting = 0
        there: dict[Key, Batch] = {}
        for live in self._kernel.requests.values():
            request = live.request
            if request.batch:
                batch = there.setdefault((request.tenant, request.batch), Batch())
                batch.seen(live.arrived_at, now)
                if live.state is State.QUEUED:
                    batch.waiting += 1
                else:
                    batch.under_way += 1
        for key, seen in islice(there.items(), MOST):
            batch = self._of(key)
            batch.seen(seen.first_at, now)
            batch.under_way, batch.waiting = seen.under_way, seen.waiting

    def newest(self, now: float) -> Iterator[tuple[Key, Batch]]:
        """All that are known, the one that was seen last at first."""
        self.look(now)
        return reversed(self._known.items())

    def _of(self, key: Key) -> Batch:
        """The batch, which is seen now."""
        batch = self._known.pop(key, None)
        if batch is None:
            batch = Batch()
            if len(self._known) >= MOST:
                self._make_room()
        self._known[key] = batch
        return batch

    def _make_room(self) -> None:
        """No tenant's names, however many, are at the cost of another one's batches."""
        ((most, _),) = Counter(tenant for tenant, _ in self._known).most_common(1)
        del self._known[next(key for key in self._known if key[0] == most)]
