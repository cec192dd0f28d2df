"""How much do requests of each promise and weight ask for, lately?"""

from __future__ import annotations

from math import exp, inf

from paceline.domain.request import Request
from paceline.kernel.ledger import class_of
from paceline.kernel.rate import Rate
from paceline.policy.standing import Ask, Claim

DEMAND_S = 30.0
"""Time constant: longer than bursts, shorter than what makes a fleet grow."""
LEAST_SHARE = 0.05
"""Of the time constant: for so long after its first request nothing is said of a class."""
MOST_CLASSES = 64
"""Headers may ask for any promise: the classes that come after so many are not looked at."""


class _Class:
    """Requests of one promise and weight."""

    def __init__(self, now: float) -> None:
        self.since = now
        self.prompts, self.outputs, self.read = (Rate(DEMAND_S) for _ in range(3))


class Demand:
    """The demand on one model."""

    def __init__(self) -> None:
        self._classes: dict[tuple[float, float], _Class] = {}

    def came(self, request: Request, ask: Ask, now: float) -> None:
        """A request is looked at for the first time."""
        key = class_of(request)
        known = self._classes.get(key)
        if known is None:
            if len(self._classes) >= MOST_CLASSES or key[0] == inf:
                return
            known = self._classes[key] = _Class(now)
        known.prompts.add(ask.prompt_tokens - max(ask.cached.values(), default=0.0), now)
        known.outputs.add(ask.output_tokens, now)
        known.read.add(ask.output_tokens * (ask.prompt_tokens + 0.5 * ask.output_tokens), now)

    def above(self, request: Request, now: float) -> list[Claim]:
        """What those of more weight than a request ask for."""
        claims = []
        for (itl_s, weight), known in self._classes.items():
            if weight <= request.weight:
                continue
            full = 1.0 - exp((known.since - now) / DEMAND_S)
            if full > LEAST_SHARE:
                rates = (known.prompts, known.outputs, known.read)
                claims.append(Claim(itl_s, *(rate.at(now) / full for rate in rates)))
        return claims
