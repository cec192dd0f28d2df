"""Which of the requests that wait at the gateway should a worker be looked for next?

The order is that of one sort key:

    tier by weight, lost?, tenant's service in whole quanta, deadline, arrival, id

A request is lost when its promise can no longer be kept, were it sent this moment. Within a tier
those come first that can be helped; among the lost a deadline means nothing and is left out.

Fairness against urgency. Least served tenant first (virtual token counters, Sheng et al., OSDI
2024) would let a request be lost for one with time to spare. Earliest deadline first keeps all
promises to those who wait, on one server, if any order can (Jackson 1955), but lets a tenant that
floods in push the others out. So service counts in whole quanta: tenants in the same quantum go by
deadline as if they were one, and only tenants further apart go by service. The counters of a tier
begin level whenever nobody waits in it, for nobody is owed anything then. Hence a fleet that keeps
up sees deadlines alone, and fairness speaks where a backlog outlasts a quantum. Two tenants that
both always wait are never further apart than a quantum and what was sent but not yet charged.

Starvation. One of every sixteen requests sent is the one that has waited longest of all, so that
lost ones and low tiers go on moving. If it fits nowhere its turn stays due, and others go on.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from math import inf
from operator import attrgetter
from typing import Generic, Protocol, TypeVar

from paceline.domain.request import Request
from paceline.kernel.line import Line

QUANTUM = 4096.0
"""Service, in tokens of prompt, in which tenants count as equally served: some requests' worth, and
so less than half a second of one worker's prefill."""

STARVATION = 16
"""Among so many requests sent one is the oldest; at least 1."""

REMEMBERED = 1024
"""Tenants of one tier whose service is kept in mind while they have nothing waiting."""


class Queued(Protocol):
    """A request that waits, as far as its place in the order is concerned."""

    @property
    def request(self) -> Request: ...
    @property
    def arrived_at(self) -> float: ...
    @property
    def deadline(self) -> float:
        """Latest time of a first token that keeps the promise; inf without a promise."""

    @property
    def needs_s(self) -> float:
        """Expected time from dispatch to first token on a good worker."""

    @property
    def cost(self) -> float:
        """Prompt tokens."""


Item = TypeVar("Item", bound=Queued)

_RANK = attrgetter("rank")


class Waiting(Generic[Item]):
    """The requests that wait for a worker, in order; each operation is O(log n), amortised.

    An item's place is found when it is added: add it again if something about it has changed.
    """

    def __init__(self, quantum: float = QUANTUM, starvation: int = STARVATION) -> None:
        self._quantum = quantum
        self._starvation = starvation
        self._places: dict[str, _Place[Item]] = {}
        self._tiers: list[_Tier] = []
        """Those in which somebody waits, of most weight first."""
        self._by_arrival = Line()
        self._by_loss = Line()
        """Live ones, by the time from which their promise is lost."""
        self._news: dict[str, None] = {}
        """Those that were lost since `newly_lost` was last asked."""
        self._passed_over = 0
        """Requests sent since the oldest was."""

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._places

    def add(self, item: Item) -> None:
        """Let a request wait, or find its place anew."""
        request = item.request
        self.discard(request.id)
        tier = self._find(request)
        if tier is None:
            tier = _Tier(_rank(request), self._quantum)
            insort(self._tiers, tier, key=_RANK)
        self._places[request.id] = _Place(item, tier)
        tier.put(tier.live, request, (item.deadline, item.arrived_at), item.cost)
        self._by_arrival.put(request.id, item.arrived_at)
        if item.deadline < inf:
            self._by_loss.put(request.id, item.deadline - item.needs_s)

    def discard(self, request_id: str) -> Item | None:
        """A request waits no longer, for whatever reason; None if it did not."""
        place = self._places.pop(request_id, None)
        if place is None:
            return None
        self._by_arrival.remove(request_id)
        self._by_loss.remove(request_id)
        self._news.pop(request_id, None)
        tier = place.tier
        tier.remove(place.half, place.request, place.cost)
        if not tier.live.count and not tier.lost.count:
            del self._tiers[bisect_left(self._tiers, tier.rank, key=_RANK)]
        return place.item

    def taken(self, item: Item) -> None:
        """A waiting request was sent to a worker."""
        oldest = self.oldest()
        self._passed_over = 0 if oldest is item else self._passed_over + 1
        self.discard(item.request.id)

    def served(self, item: Item, cost_tokens: float) -> None:
        """A tenant was given so much: uncached prompt tokens and weighted tokens of answers.

        Where nobody waits in the tier it took nothing from anybody, and is not counted.
        """
        tier = self._find(item.request)
        if tier is not None:
            tier.charge(item.request.tenant, cost_tokens)

    def heads(self, now: float) -> list[Item]:
        """The requests to look for a worker for, best first: of each tier the first live one, then
        the first lost one; before them the oldest of all, when its turn has come."""
        self._age(now)
        firsts = [half.first() for tier in self._tiers for half in (tier.live, tier.lost)]
        heads = [self._places[request_id].item for request_id in firsts if request_id is not None]
        overdue = self.overdue
        if overdue is not None:
            heads = [overdue, *(head for head in heads if head is not overdue)]
        return heads

    @property
    def overdue(self) -> Item | None:
        """The oldest of all, if its turn has come."""
        return self.oldest() if self._passed_over >= self._starvation - 1 else None

    def leads(self, item: Item, now: float) -> bool:
        """Would it be the first to go, but for one that is overdue?"""
        return next((head for head in self.heads(now) if head is not self.overdue), item) is item

    def oldest(self) -> Item | None:
        """The one that has waited longest."""
        first = self._by_arrival.first()
        return self._places[first[1]].item if first is not None else None

    def expired(self, now: float, max_wait_s: float) -> list[Item]:
        """Those that have waited so long; they no longer do."""
        items: list[Item] = []
        while (oldest := self.oldest()) is not None and oldest.arrived_at + max_wait_s <= now:
            self.discard(oldest.request.id)
            items.append(oldest)
        return items

    def newly_lost(self, now: float) -> list[Item]:
        """Those whose promise was lost since this was last asked; they wait on."""
        self._age(now)
        items = [self._places[request_id].item for request_id in self._news]
        self._news.clear()
        return items

    def of_tier(self, request: Request) -> int:
        """How many of a request's tier wait."""
        tier = self._find(request)
        return tier.live.count + tier.lost.count if tier is not None else 0

    def ahead_of(self, item: Item) -> tuple[int, float]:
        """Live requests of its tier and of those above, and their prompt tokens.

        What a newcomer may have to wait for: at most, as fair share may bring it forward.
        """
        rank = _rank(item.request)
        above = [tier.live for tier in self._tiers if tier.rank <= rank]
        return sum(half.count for half in above), sum(half.cost for half in above)

    def _age(self, now: float) -> None:
        """Take those over to the lost whose last moment has come."""
        while (first := self._by_loss.first()) is not None and first[0] <= now:
            _, request_id = self._by_loss.pop()
            place = self._places[request_id]
            tier = place.tier
            place.half = tier.lost
            tier.put(tier.lost, place.request, (place.item.arrived_at,), place.cost)
            tier.remove(tier.live, place.request, place.cost)
            self._news[request_id] = None

    def _find(self, request: Request) -> _Tier | None:
        rank = _rank(request)
        at = bisect_left(self._tiers, rank, key=_RANK)
        here = self._tiers[at : at + 1]
        return here[0] if here and here[0].rank == rank else None


def _rank(request: Request) -> tuple[float, str]:
    """Tiers of more weight come first, those of equal weight by name."""
    return -request.weight, request.tier


class _Place(Generic[Item]):
    """Where an item stands, as it was when it was added: what it is now may differ."""

    __slots__ = ("cost", "half", "item", "request", "tier")

    def __init__(self, item: Item, tier: _Tier) -> None:
        self.item = item
        self.tier = tier
        self.half = tier.live
        self.request = item.request
        self.cost = item.cost


class _Tier:
    """The waiting requests of one tier, and what its tenants have been given."""

    __slots__ = ("_floor", "_quantum", "_service", "live", "lost", "rank")

    def __init__(self, rank: tuple[float, str], quantum: float) -> None:
        self.rank = rank
        self.live = _Half()
        self.lost = _Half()
        self._quantum = quantum
        self._service: dict[str, float] = {}
        """Tokens given to each tenant since somebody waits here."""
        self._floor = 0.0
        """Where tenants begin that come, or come back: nobody saves up by staying away."""

    def put(self, half: _Half, request: Request, key: tuple[float, ...], cost: float) -> None:
        tenant = request.tenant
        if not self._waits(tenant):
            self._raise_floor()
            self._service[tenant] = max(self._service.get(tenant, 0.0), self._floor)
        half.put(request.id, tenant, key, cost)
        self._settle(tenant)
        self._forget()

    def remove(self, half: _Half, request: Request, cost: float) -> None:
        self._raise_floor()
        half.remove(request.id, request.tenant, cost)
        self._settle(request.tenant)

    def charge(self, tenant: str, tokens: float) -> None:
        self._service[tenant] = self._service.get(tenant, self._floor) + tokens
        self._settle(tenant)
        self._forget()

    def _waits(self, tenant: str) -> bool:
        return tenant in self.live.lines or tenant in self.lost.lines

    def _settle(self, tenant: str) -> None:
        """Find a tenant's place anew after its service or its first request may have changed."""
        quanta = self._service[tenant] // self._quantum
        self.live.settle(tenant, quanta)
        self.lost.settle(tenant, quanta)

    def _raise_floor(self) -> None:
        """To the quantum of the least served tenant with a live request.

        The lost do not count: while they are passed over, newcomers would begin as low as they.
        """
        least = self.live.least_quanta()
        if least is not None:
            self._floor = max(self._floor, least * self._quantum)

    def _forget(self) -> None:
        """Keep memory bounded: of those that don't wait only the most served have to be known."""
        waiting = len(self.live.lines) + len(self.lost.lines)
        if len(self._service) <= waiting + 2 * REMEMBERED:
            return
        idle = [tenant for tenant in self._service if not self._waits(tenant)]
        idle.sort(key=lambda tenant: (-self._service[tenant], tenant))
        for tenant in idle[REMEMBERED:]:
            del self._service[tenant]


class _Half:
    """The live requests of a tier, or the lost: first the tenant, then the request."""

    __slots__ = ("_tenants", "cost", "count", "lines")

    def __init__(self) -> None:
        self.lines: dict[str, Line] = {}
        """Each tenant's requests."""
        self.count = 0
        self.cost = 0.0
        self._tenants = Line()
        """By service in quanta, then by their first request."""

    def put(self, request_id: str, tenant: str, key: tuple[float, ...], cost: float) -> None:
        line = self.lines.get(tenant)
        if line is None:
            line = self.lines[tenant] = Line()
        line.put(request_id, key)
        self.count += 1
        self.cost += cost

    def remove(self, request_id: str, tenant: str, cost: float) -> None:
        line = self.lines[tenant]
        line.remove(request_id)
        if not line:
            del self.lines[tenant]
        self.count -= 1
        self.cost = self.cost - cost if self.count else 0.0  # let no rounding stay behind

    def settle(self, tenant: str, quanta: float) -> None:
        line = self.lines.get(tenant)
        if line is None:
            self._tenants.remove(tenant)
        else:
            self._tenants.put(tenant, (quanta, line.first()))

    def first(self) -> str | None:
        """The request whose turn it is."""
        first = self._tenants.first()
        if first is None:
            return None
        (_, (_, request_id)), _ = first
        return str(request_id)

    def least_quanta(self) -> float | None:
        first = self._tenants.first()
        return first[0][0] if first is not None else None
