"""Which worker prefills a request, and which answers it?"""

from __future__ import annotations

from collections.abc import Sequence

from paceline.kernel.handover import HandOver
from paceline.kernel.live import Live
from paceline.kernel.pool import Pool
from paceline.policy.disagg import apart, conditional, fetching, ways_of
from paceline.policy.fleet import Choice, Policy
from paceline.policy.standing import Ask


class Legs:
    """Puts a request to the policy; in two parts, where workers can share it."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._ways = ways_of(policy)
        self._apart = apart if self._ways is conditional else self._ways
        """For workers some of which answer only what others have prefilled."""

    def choose(
        self, pool: Pool, live: Live, ask: Ask, places: Sequence[int], sources: Sequence[int]
    ) -> Choice:
        """The place that is to answer, and the source that prefills for it, if one does."""
        if live.handover is not None:
            return fetching(self._policy, pool, ask, places, live.handover.worker.place)
        if not sources or live.produced:
            return self._policy(pool, ask, places)
        alone = [i for i in places if pool.at(i).worker.alone]
        if live.whole and alone:
            return self._policy(pool, ask, alone)
        ways = self._ways if len(alone) == len(places) else self._apart
        return ways(pool, ask, places, sources)

    @staticmethod
    def takers(pool: Pool, handover: HandOver, places: Sequence[int], now: float) -> list[int]:
        """Those of the places that can fetch a prompt in time."""
        takers = []
        for i in places:
            link = pool.link(handover.worker.place, i)
            if link is not None and handover.holds(now, link.fetch_s(handover.tokens, now)):
                takers.append(i)
        return takers
