"""Which worker prefills a request, and which answers it?"""

from __future__ import annotations

from collections.abc import Sequence

from paceline.kernel.handover import HandOver
from paceline.kernel.live import Live
from paceline.kernel.pool import Pool
from paceline.policy.disagg import fetching, ways_of
from paceline.policy.fleet import Choice, Policy
from paceline.policy.standing import Ask


class Legs:
    """Puts a request to the policy; in two parts, where workers can share it."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._ways, self._apart = ways_of(policy)

    def choose(
        self,
        pool: Pool,
        live: Live,
        ask: Ask,
        places: Sequence[int],
        sources: Sequence[int],
        kept: Sequence[int] = (),
    ) -> Choice | None:
        """The place that is to answer, and the source that prefills for it, if one does; None if
        all are kept for others. A place that is kept may still answer what others prefill: by then
        it will be another's turn."""
        free: Sequence[int] = [i for i in places if i not in kept] if kept else places
        if live.handover is not None:
            source = live.handover.worker.place
            return fetching(self._policy, pool, ask, free, source) if free else None
        sources = [i for i in sources if i not in kept] if kept else sources
        if not sources or live.produced or (live.whole and not free):
            return self._policy(pool, ask, free) if free else None
        alone = [i for i in free if pool.at(i).worker.alone]
        if live.whole and alone:
            return self._policy(pool, ask, alone)
        ways = self._ways if free and len(alone) == len(free) else self._apart
        return ways(pool, ask, free or places, sources)

    @staticmethod
    def takers(pool: Pool, handover: HandOver, places: Sequence[int], now: float) -> list[int]:
        """Those of the places that can fetch a prompt in time."""
        takers = []
        for i in places:
            link = pool.link(handover.worker.place, i)
            if link is not None and handover.holds(now, link.fetch_s(handover.tokens, now)):
                takers.append(i)
        return takers
