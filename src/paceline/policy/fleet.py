"""What does a routing policy see, and what does it say?

It sees the workers of a model (`Fleet`), the request (`Ask`) and the places that may be chosen, and
gives a `Choice`. Chance comes with the request, as its seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from paceline.domain.commands import Prediction, RunnerUp
from paceline.domain.facts import Fact
from paceline.policy.standing import Ask, Standing


class Fleet(Protocol):
    """The workers of one model, each at its place."""

    @property
    def turn(self) -> int:
        """Dispatches so far."""
        ...

    @property
    def ids(self) -> Sequence[str]:
        """Workers' ids by place. A place may go to another worker, an id stays."""
        ...

    def load(self, place: int) -> int:
        """Requests in flight from here."""
        ...

    def remembered(self, place: int) -> int:
        """Prompt blocks that the worker at a place is believed to have cached."""
        ...

    def standing(self, place: int, now: float) -> Standing: ...


class Choice(msgspec.Struct, frozen=True):
    """A place, and why."""

    place: int
    because: str
    predicted: Prediction | None = None
    wait: bool = False
    """Not yet: no worker is open to it, and this one would be the best of them."""
    source: int | None = None
    """Another place, that prefills its prompt."""
    runner_up: RunnerUp | None = None
    cost: float = 0.0
    """Promises that it is expected to break, by weight, and what else speaks against it."""


Policy = Callable[[Fleet, Ask, Sequence[int]], Choice]


class Learner(Protocol):
    """A policy with a memory, of which each kernel makes one of its own."""

    def __call__(self, fleet: Fleet, ask: Ask, places: Sequence[int]) -> Choice: ...

    def learn(self, fact: Fact, now: float) -> None:
        """Told every fact before it is acted upon."""
        ...


def lowest(places: Sequence[int], costs: Sequence[float], seed: int) -> int:
    """The place of least cost; among equals a seeded one."""
    least = min(costs)
    equal = [i for i, cost in zip(places, costs, strict=True) if cost == least]
    return equal[seed % len(equal)]


def two_of(places: Sequence[int], seed: int) -> tuple[int, int]:
    """Two places drawn at random, in random order; the same one twice if there is no other."""
    count = len(places)
    first = seed % count
    second = (first + 1 + (seed >> 16) % max(count - 1, 1)) % count
    return places[first], places[second]
