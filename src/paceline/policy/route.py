"""Which worker gets this request?

Every policy has one signature: it sees the workers of the model (`Fleet`), the request (`Ask`) and
the places that may be chosen, and gives a `Choice`. None keeps state or rolls dice of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from paceline.domain.commands import Prediction
from paceline.policy.headroom import DELAY_WEIGHT, forecast, prediction, risk
from paceline.policy.standing import Ask, Standing

BALANCE_ABOVE = 1.5
"""Prefix affinity gives way where the favourite has so many times the mean load (and 4 more)."""
LOOKED_AT = 16
"""Workers that headroom looks at; of a larger fleet a seeded sample, and those with the prefix."""
HOLDERS = 4
TIE = 0.01
"""Costs this close are equal: a seeded choice keeps several gateways from herding."""


class Fleet(Protocol):
    """The workers of one model, each at its place."""

    @property
    def turn(self) -> int:
        """Dispatches so far."""
        ...

    def load(self, place: int) -> int:
        """Requests in flight from here."""
        ...

    def standing(self, place: int, now: float) -> Standing: ...


class Choice(msgspec.Struct, frozen=True):
    """A place, and why."""

    place: int
    because: str
    predicted: Prediction | None = None


Policy = Callable[[Fleet, Ask, Sequence[int]], Choice]


def _least(fleet: Fleet, ask: Ask, places: Sequence[int]) -> int:
    """The least loaded place; among equals a seeded one."""
    loads = [fleet.load(i) for i in places]
    least = min(loads)
    equal = [i for i, load in zip(places, loads, strict=True) if load == least]
    return equal[ask.seed % len(equal)]


def round_robin(fleet: Fleet, ask: Ask, places: Sequence[int]) -> Choice:
    """Each in turn."""
    return Choice(places[fleet.turn % len(places)], "its turn")


def least_requests(fleet: Fleet, ask: Ask, places: Sequence[int]) -> Choice:
    """The one with the fewest requests in flight from here."""
    i = _least(fleet, ask, places)
    return Choice(i, f"fewest requests ({fleet.load(i)})")


def power_of_two(fleet: Fleet, ask: Ask, places: Sequence[int]) -> Choice:
    """The less loaded of two drawn ones (Mitzenmacher 2001)."""
    first = ask.seed % len(places)
    second = (first + 1 + (ask.seed >> 16) % max(len(places) - 1, 1)) % len(places)
    i = min((places[first], places[second]), key=lambda place: (fleet.load(place), place))
    return Choice(i, f"fewer requests of two ({fleet.load(i)})")


def prefix_affinity(fleet: Fleet, ask: Ask, places: Sequence[int]) -> Choice:
    """The one that holds the longest prefix, unless its load is far above the mean."""
    held = {i: ask.blocks_held.get(i, 0) for i in places}
    best = max(held.values())
    if best:
        i = min((i for i in places if held[i] == best), key=lambda i: (fleet.load(i), i))
        mean = sum(fleet.load(j) for j in places) / len(places)
        if fleet.load(i) <= BALANCE_ABOVE * mean + 4:
            return Choice(i, f"holds {best} of {ask.blocks} blocks")
    i = _least(fleet, ask, places)
    return Choice(i, f"fewest requests ({fleet.load(i)})")


def headroom(fleet: Fleet, ask: Ask, places: Sequence[int]) -> Choice:
    """The one where promises are kept most surely, then where least time is lost."""
    cached, now = ask.cached, ask.now
    seen = []
    for i in _shortlist(ask, places):
        worker = fleet.standing(i, now)
        seen.append((i, worker, forecast(worker, ask, cached.get(i, 0.0))))
    weight = DELAY_WEIGHT / min(expected.delay_s for _, _, expected in seen)
    costs = [
        risk(worker, ask, expected) + weight * expected.delay_s for _, worker, expected in seen
    ]
    least = min(costs)
    equal = [k for k, cost in enumerate(costs) if cost <= least + TIE]
    k = equal[ask.seed % len(equal)]
    i, worker, expected = seen[k]
    because = (
        f"least cost {costs[k]:.3f} of {len(seen)}: "
        f"TTFT {expected.ttft_s * 1e3:.0f} ms, ITL {expected.itl_s * 1e3:.1f} ms"
    )
    return Choice(i, because, prediction(worker, ask, expected, cached.get(i, 0.0)))


def _shortlist(ask: Ask, places: Sequence[int]) -> Sequence[int]:
    """Everybody, or of a large fleet an even sample from a seeded start and the prefix's holders.

    Of 16 drawn, one is among the best tenth of any fleet four times out of five, at a bounded cost.
    """
    count = len(places)
    if count <= LOOKED_AT:
        return places
    sample = [places[(ask.seed + k * count // LOOKED_AT) % count] for k in range(LOOKED_AT)]
    holders = sorted(ask.cached, key=lambda i: (-ask.cached[i], i))[:HOLDERS]
    return sample + [i for i in holders if i in places and i not in sample]


POLICIES: dict[str, Policy] = {
    "headroom": headroom,
    "round-robin": round_robin,
    "least-requests": least_requests,
    "power-of-two": power_of_two,
    "prefix-affinity": prefix_affinity,
}
