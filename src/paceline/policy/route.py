"""Which worker gets this request?

Every policy has one signature: it sees the workers of the model (`FleetView`), the request (`Ask`)
and the places that may be chosen, and gives a `Choice`. None keeps state or rolls dice of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
import numpy as np

from paceline.domain.commands import Prediction
from paceline.policy.headroom import TIE, Forecast, cost, prediction
from paceline.policy.view import Ask, FleetView

BALANCE_ABOVE = 1.5
"""Prefix affinity gives way where the favourite has so many times the mean load (and 4 more)."""


class Choice(msgspec.Struct, frozen=True):
    """A place in the view, and why."""

    place: int
    because: str
    predicted: Prediction | None = None


Policy = Callable[[FleetView, Ask, Sequence[int]], Choice]


def _load(view: FleetView, i: int) -> float:
    return float(view.streams[i] + view.arriving[i])


def _least(view: FleetView, ask: Ask, places: Sequence[int]) -> int:
    """The least loaded place; among equals a seeded one."""
    least = min(_load(view, i) for i in places)
    equal = [i for i in places if _load(view, i) == least]
    return equal[ask.seed % len(equal)]


def round_robin(view: FleetView, ask: Ask, places: Sequence[int]) -> Choice:
    """Each in turn."""
    return Choice(places[view.turn % len(places)], "its turn")


def least_requests(view: FleetView, ask: Ask, places: Sequence[int]) -> Choice:
    """The one with the fewest requests in flight from here."""
    i = _least(view, ask, places)
    return Choice(i, f"fewest requests ({_load(view, i):.0f})")


def power_of_two(view: FleetView, ask: Ask, places: Sequence[int]) -> Choice:
    """The less loaded of two drawn ones (Mitzenmacher 2001)."""
    first = ask.seed % len(places)
    second = (first + 1 + (ask.seed >> 16) % max(len(places) - 1, 1)) % len(places)
    i = min((places[first], places[second]), key=lambda place: (_load(view, place), place))
    return Choice(i, f"fewer requests of two ({_load(view, i):.0f})")


def prefix_affinity(view: FleetView, ask: Ask, places: Sequence[int]) -> Choice:
    """The one that holds the longest prefix, unless its load is far above the mean."""
    held = {i: ask.blocks_held.get(i, 0) for i in places}
    best = max(held.values())
    if best:
        i = min((i for i in places if held[i] == best), key=lambda i: (_load(view, i), i))
        mean = sum(_load(view, j) for j in places) / len(places)
        if _load(view, i) <= BALANCE_ABOVE * mean + 4:
            return Choice(i, f"holds {best} of {ask.blocks} blocks")
    i = _least(view, ask, places)
    return Choice(i, f"fewest requests ({_load(view, i):.0f})")


def headroom(view: FleetView, ask: Ask, places: Sequence[int]) -> Choice:
    """The one where promises are kept most surely, then where least time is lost."""
    forecast = Forecast(view, ask)
    costs = cost(view, ask, forecast)
    if len(places) < len(view.ids):
        barred = np.ones(len(view.ids), dtype=bool)
        barred[list(places)] = False
        costs[barred] = np.inf
    equal = np.flatnonzero(costs <= costs.min() + TIE)
    i = int(equal[ask.seed % len(equal)])
    expected = prediction(view, ask, forecast, i)
    because = (
        f"least cost {costs[i]:.3f} of {len(places)}: "
        f"TTFT {expected.ttft_s * 1e3:.0f} ms, ITL {expected.itl_s * 1e3:.1f} ms"
    )
    return Choice(i, because, expected)


POLICIES: dict[str, Policy] = {
    "headroom": headroom,
    "round-robin": round_robin,
    "least-requests": least_requests,
    "power-of-two": power_of_two,
    "prefix-affinity": prefix_affinity,
}
