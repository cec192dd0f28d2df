"""How are gaps spread, in bounded memory?

Buckets grow by 2**(1/16), so that a quantile is within 2.2 % of the truth. Counts are kept as a
sparse `{bucket: tokens}`: one answer fills a few dozen buckets, and a whole run at most `BUCKETS`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from math import log2

LEAST_S = 1e-5
PER_OCTAVE = 16
BUCKETS = 24 * PER_OCTAVE
"""From 10 µs to 168 s; what lies outside falls into the first or last bucket."""

Counts = Mapping[int, int]


def bucket(seconds: float) -> int:
    if seconds <= LEAST_S:
        return 0
    return min(BUCKETS - 1, int(log2(seconds / LEAST_S) * PER_OCTAVE))


def middle_s(index: int) -> float:
    """The geometric middle of a bucket."""
    return LEAST_S * float(2 ** ((index + 0.5) / PER_OCTAVE))


def merged(many: Iterable[Counts]) -> Counter[int]:
    total: Counter[int] = Counter()
    for counts in many:
        total.update(counts)
    return total


def quantile_s(counts: Counts, q: float) -> float | None:
    """The nearest-rank quantile; None without any count."""
    rank = q * sum(counts.values())
    seen = 0
    for index in sorted(counts):
        seen += counts[index]
        if seen >= rank:
            return middle_s(index)
    return None
