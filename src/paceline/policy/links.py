"""How long does a prompt's KV cache take from one worker to another?

A latency and seconds per token, learned for each link from what decode legs took beyond their first
step. What is on the link before it counts too: whether transfers share it or go one after the
other, the last of them is through when all are. They are seen through queues, so the fit has to
bear outliers; and few lengths may be all that comes, so it leans on a prior.
"""

from __future__ import annotations

from collections import deque
from math import inf

PRIOR_S = 0.010
PRIOR_TOKEN_S = 320 * 1024 / 10e9
"""KV cache of a 70B model, 320 KiB a token, at 10 GB/s."""
PRIOR = [(tokens, PRIOR_S + tokens * PRIOR_TOKEN_S) for tokens in (256.0, 8192.0)]
"""What the prior is taken to have seen..."""
PRIOR_WEIGHT = 0.1
"""...and for how much of one observation that counts."""
ROUNDS = 4
KEPT = 32
"""Observations that are fitted."""
FADE = 0.92
"""Weight of an observation after each further one."""
REFIT_EVERY = 4
LEAST_SEEN = 3
"""Observations before a link is used as one that is known."""
USUAL_MISS = 0.25
"""Errors above this share of the leg's time count for less (Huber 1964)."""


class TransferTime:
    """One link, or all links between two nodes."""

    __slots__ = ("_coming", "_count", "_seen", "_sent", "latency_s", "learns", "token_s")

    def __init__(self, learns: bool = True) -> None:
        self.learns = learns
        """Can it be seen when a transfer begins? Not where both workers begin at once."""
        self.latency_s = PRIOR_S
        self.token_s = PRIOR_TOKEN_S
        self._coming: dict[str, float] = {}
        """Tokens that are to go this way, by request: still being prefilled, or held."""
        self._sent: dict[str, tuple[float, float]] = {}
        """And those on it, with when they should be there."""
        self._seen: deque[tuple[float, float, float]] = deque(maxlen=KEPT)
        """(tokens, seconds, seconds beside them), the newest first."""
        self._count = 0

    def expected_s(self, tokens: float) -> float:
        """Seconds for so many tokens, of all that are on the link together."""
        return self.latency_s + tokens * self.token_s

    def through_s(self, ready_s: float, tokens: float, now: float) -> float:
        """Seconds from now until a prompt of so many tokens is through that is prefilled in
        `ready_s`: the link must have carried all before it by then."""
        return max(ready_s, self._before_s(now)) + self.expected_s(tokens)

    def fetch_s(self, tokens: float, now: float) -> float:
        """The same of one that is prefilled, and goes before all that still are to come."""
        return self.expected_s(tokens + self.on_it) + self._late_s(now)

    def is_open(self, ready_s: float, tokens: float, now: float) -> bool:
        """May another prompt be sent to be prefilled, so that the link has always one to carry? Of
        a link that little was seen of, one at a time: it may be slow."""
        if self._count < LEAST_SEEN and self.learns:
            return not self._coming and not self._sent
        return self._before_s(now) <= ready_s + self.token_s * tokens

    @property
    def on_it(self) -> float:
        """Tokens on their way."""
        return sum(tokens for tokens, _ in self._sent.values())

    def _before_s(self, now: float) -> float:
        """Until all is through that is to go this way already."""
        return (sum(self._coming.values()) + self.on_it) * self.token_s + self._late_s(now)

    def _late_s(self, now: float) -> float:
        """What has not come although it is due tells of a slow link before it comes. How much
        longer it takes is not known: as much again is likely (Lindy's law)."""
        due_at = next(iter(self._sent.values()))[1] if self._sent else inf
        return max(now - due_at, 0.0)

    def awaits(self, request_id: str, tokens: float) -> None:
        """A prompt will go this way."""
        self._coming[request_id] = tokens

    def carries(self, request_id: str, tokens: float, due_at: float) -> None:
        """It does now, and should be there then."""
        self._coming.pop(request_id, None)
        self._sent[request_id] = tokens, due_at

    def forget(self, request_id: str) -> None:
        """It is through, or does not come."""
        self._coming.pop(request_id, None)
        self._sent.pop(request_id, None)

    def observe(self, tokens: float, seconds: float, beside_s: float) -> None:
        """So many tokens took so long: what is left of a decode leg's time without `beside_s`, what
        the rest of it was expected to take. Below zero, if that was too much."""
        self._seen.appendleft((tokens, seconds, beside_s))
        self._count += 1
        if self._count <= KEPT or self._count % REFIT_EVERY == 0:
            self._fit()

    def _fit(self) -> None:
        """Least squares, in shares of a leg's time; what is far off is weighted down, and the fit
        done again."""
        count = len(self._seen)
        usual_s = max(sum(seconds for _, seconds, _ in self._seen) / count, PRIOR_S)
        noises = [beside_s + usual_s for _, _, beside_s in self._seen]
        misses = [0.0] * count
        for _ in range(ROUNDS):
            points = [
                (FADE**age * USUAL_MISS / max(miss, USUAL_MISS) / noise_s**2, tokens, seconds)
                for age, (noise_s, miss, (tokens, seconds, _)) in enumerate(
                    zip(noises, misses, self._seen, strict=True)
                )
            ]
            prior = PRIOR_WEIGHT * sum(weight for weight, _, _ in points) / count
            self.latency_s, self.token_s = _line(points + [(prior, *point) for point in PRIOR])
            noises = [beside_s + self.expected_s(tokens) for tokens, _, beside_s in self._seen]
            misses = [
                abs(seconds - self.expected_s(tokens)) / noise_s
                for noise_s, (tokens, seconds, _) in zip(noises, self._seen, strict=True)
            ]


def _line(points: list[tuple[float, float, float]]) -> tuple[float, float]:
    """The line through (weight, x, y) of least squares, neither part of it below zero."""
    total = sum(w for w, _, _ in points)
    x = sum(w * x for w, x, _ in points) / total
    y = sum(w * y for w, _, y in points) / total
    xx = sum(w * x * x for w, x, _ in points) / total
    xy = sum(w * x * y for w, x, y in points) / total
    slope = max((xy - x * y) / max(xx - x * x, 1e-9), 0.0)
    if y - slope * x < 0.0:
        return 0.0, max(xy / xx, 0.0)
    return y - slope * x, slope
