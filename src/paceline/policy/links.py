"""How long does a prompt's KV cache take from one worker to another?

A latency and seconds per token, learned for each link from what decode legs took beyond their first
step. What is on the link before it counts too: whether transfers share it or go one after the
other, the last of them is through when all are. They are seen through queues, so the fit has to
bear outliers; and few lengths may be all that comes, so it leans on a prior.
"""

from __future__ import annotations

from collections import deque
from math import sqrt

PRIOR_S = 0.010
PRIOR_TOKEN_S = 320 * 1024 / 10e9
"""KV cache of a 70B model, 320 KiB a token, at 10 GB/s."""
PRIOR = [(tokens, PRIOR_S + tokens * PRIOR_TOKEN_S) for tokens in (256.0, 8192.0)]
"""What the prior is taken to have seen..."""
PRIOR_WEIGHT = 0.25
"""...and for how much of one observation that counts."""
ROUNDS = 4
BIN_SAMPLES = 8
"""Observations kept for each doubling of length: older ones are forgotten."""
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
        self._sent: dict[str, float] = {}
        """And those on it."""
        self._seen: dict[int, deque[tuple[float, float, float]]] = {}
        """(weight, tokens, seconds) by the number of bits in the length."""
        self._count = 0

    def expected_s(self, tokens: float) -> float:
        """Seconds for so many tokens, of all that are on the link together."""
        return self.latency_s + tokens * self.token_s

    def through_s(self, ready_s: float, tokens: float) -> float:
        """Seconds from now until a prompt of so many tokens is through that is prefilled in
        `ready_s`: the link must have carried all before it by then."""
        return max(ready_s, self._before_s) + self.expected_s(tokens)

    def fetch_s(self, tokens: float) -> float:
        """The same of one that is prefilled, and goes before all that still are to come."""
        return self.expected_s(tokens + self.on_it)

    def is_open(self, ready_s: float, tokens: float) -> bool:
        """May another prompt be sent to be prefilled, so that the link has always one to carry? Of
        a link that little was seen of, one at a time: it may be slow."""
        if self._count < LEAST_SEEN and self.learns:
            return not self._coming and not self._sent
        return self._before_s <= ready_s + self.token_s * tokens

    @property
    def on_it(self) -> float:
        """Tokens on their way."""
        return sum(self._sent.values())

    @property
    def _before_s(self) -> float:
        return (sum(self._coming.values()) + self.on_it) * self.token_s

    def awaits(self, request_id: str, tokens: float) -> None:
        """A prompt will go this way."""
        self._coming[request_id] = tokens

    def carries(self, request_id: str, tokens: float) -> None:
        """It does now."""
        self._coming.pop(request_id, None)
        self._sent[request_id] = tokens

    def forget(self, request_id: str) -> None:
        """It is through, or does not come."""
        self._coming.pop(request_id, None)
        self._sent.pop(request_id, None)

    def observe(self, tokens: float, seconds: float, beside_s: float) -> None:
        """So many tokens took so long: what is left of a decode leg's time without `beside_s`, what
        the rest of it was expected to take. Below zero, if that was too much."""
        noise_s = beside_s + max(seconds, PRIOR_S)
        bin_ = self._seen.setdefault(int(tokens).bit_length(), deque(maxlen=BIN_SAMPLES))
        bin_.append((1.0 / noise_s**2, tokens, seconds))
        self._count += 1
        if self._count <= BIN_SAMPLES or self._count % REFIT_EVERY == 0:
            self._fit()

    def _fit(self) -> None:
        """Least squares; what is far off is weighted down and the fit done again."""
        seen = [point for bin_ in self._seen.values() for point in bin_]
        points = [(PRIOR_WEIGHT / y**2, x, y) for x, y in PRIOR] + seen
        for _ in range(ROUNDS):
            self.latency_s, self.token_s = _line(points)
            points[len(PRIOR) :] = [self._trusted(*point) for point in seen]

    def _trusted(self, weight: float, tokens: float, seconds: float) -> tuple[float, float, float]:
        """An observation as it counts beside the line so far."""
        miss = abs(seconds - self.expected_s(tokens)) * sqrt(weight)
        return weight * min(1.0, USUAL_MISS / max(miss, USUAL_MISS)), tokens, seconds


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
