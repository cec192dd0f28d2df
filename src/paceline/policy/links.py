"""How long does a prompt's KV cache take from one worker to another?

A latency and seconds per token, learned for each link from what decode legs took beyond their first
step. Transfers are seen through queues and others' traffic, so the fit has to bear outliers; and
few lengths may be all that comes, so it leans on a prior.
"""

from __future__ import annotations

from collections import deque

PRIOR_S = 0.010
PRIOR_TOKEN_S = 320 * 1024 / 10e9
"""KV cache of a 70B model, 320 KiB a token, at 10 GB/s."""
PRIOR_TOKENS = (256.0, 8192.0)
"""Lengths at which the prior counts as something that was seen..."""
PRIOR_WEIGHT = 0.25
"""...and for how much of one observation."""
BIN_SAMPLES = 8
"""Observations kept for each doubling of length: older ones are forgotten."""
REFIT_EVERY = 4
USUAL_MISS = 0.25
"""Relative errors above this count for less (Huber 1964)."""


class TransferTime:
    """One link, or all links between two nodes."""

    __slots__ = ("_count", "_seen", "latency_s", "token_s")

    def __init__(self) -> None:
        self.latency_s = PRIOR_S
        self.token_s = PRIOR_TOKEN_S
        self._seen: dict[int, deque[tuple[float, float]]] = {}
        """(tokens, seconds) by the number of bits in the length."""
        self._count = 0

    def expected_s(self, tokens: float) -> float:
        """Seconds for so many tokens."""
        return self.latency_s + tokens * self.token_s

    def observe(self, tokens: float, seconds: float) -> None:
        """So many tokens took so long."""
        bin_ = self._seen.setdefault(int(tokens).bit_length(), deque(maxlen=BIN_SAMPLES))
        bin_.append((tokens, max(seconds, 0.0)))
        self._count += 1
        if self._count <= BIN_SAMPLES or self._count % REFIT_EVERY == 0:
            self._fit()

    def _fit(self) -> None:
        """Least relative errors, those that are far off weighted down and the fit done again."""
        points = [point for bin_ in self._seen.values() for point in bin_]
        prior = [(tokens, PRIOR_S + tokens * PRIOR_TOKEN_S) for tokens in PRIOR_TOKENS]
        for _ in range(4):
            weighted = [(PRIOR_WEIGHT * _weight(self, *point), *point) for point in prior]
            for tokens, seconds in points:
                expected_s = self.expected_s(tokens)
                miss = abs(seconds - expected_s) / expected_s
                trust = min(1.0, USUAL_MISS / max(miss, USUAL_MISS))
                weighted.append((trust * _weight(self, tokens, seconds), tokens, seconds))
            self.latency_s, self.token_s = _line(weighted)


def _weight(link: TransferTime, tokens: float, seconds: float) -> float:
    """Errors count relative to what is seen and expected, whichever is longer."""
    return 1.0 / max(seconds, link.expected_s(tokens), 1e-6) ** 2


def _line(points: list[tuple[float, float, float]]) -> tuple[float, float]:
    """The line through (weight, x, y) of least squares, neither part of it below zero."""
    total = sum(w for w, _, _ in points)
    x = sum(w * x for w, x, _ in points) / total
    y = sum(w * y for w, _, y in points) / total
    xx = sum(w * x * x for w, x, _ in points) / total
    xy = sum(w * x * y for w, x, y in points) / total
    slope = max((xy - x * y) / max(xx - x * x, 1e-9), 0.0)
    if y - slope * x < 0.0:
        return 0.0, xy / xx
    return y - slope * x, slope
