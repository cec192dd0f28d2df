"""How slow were tokens, and when? A grid of shares from histograms over time."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate, zip_longest

import msgspec

from paceline.dashboard.said import History

LEVELS = (0.0, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4)
"""Shares of a moment's tokens above which a cell takes the next colour."""
FEWEST_ROWS = 8
FASTEST = 0.005
"""Share of all tokens that may be faster than the lowest row: they are counted in it. Chunks that
come together give gaps of nothing, and would make the picture tall for the least that matters."""


class Column(msgspec.Struct, frozen=True):
    """One moment."""

    at: float
    """Unix time of its start."""
    seconds: float
    levels: list[int]
    """For each row from fast to slow: 0 for none, up to `len(LEVELS)`."""
    p50: float | None
    p99: float | None


class Heat(msgspec.Struct, frozen=True):
    bounds_s: list[float]
    """Lower bound of each row, and the upper one of the last."""
    columns: list[Column]
    tokens: int


def heat(history: History, shown_s: Sequence[float] = ()) -> Heat:
    """The grid over the rows that have something, and over the bounds that shall be `shown_s`."""
    edges = [0.0, *history.gap_bounds_s]
    if edges[1:]:
        edges[0] = edges[1] / 2**0.5
        edges.append(edges[-1] * 2**0.5)
    counts = [slot.total.gap_counts or [] for slot in history.slots]
    everything = [sum(each) for each in zip_longest(*counts, fillvalue=0)]
    used = _slower_than_the_fastest(everything)
    used += [max(bisect_left(edges, s) - 1, 0) for s in shown_s if edges[1:]]
    low, high = _rows(min(used, default=0), max(used, default=0), len(edges) - 1)
    columns = [
        Column(
            slot.begin,
            slot.seconds,
            _levels(each, low, high),
            slot.total.gap_s.p50 if slot.total.gap_s else None,
            slot.total.gap_s.p99 if slot.total.gap_s else None,
        )
        for slot, each in zip(history.slots, counts, strict=True)
    ]
    return Heat(edges[low : high + 2], columns, sum(map(sum, counts)))


def _slower_than_the_fastest(counts: Sequence[int]) -> list[int]:
    """Rows that have tokens, without those below which hardly any are."""
    few = FASTEST * sum(counts)
    return [i for i, so_far in enumerate(accumulate(counts)) if counts[i] and so_far > few]


def _rows(low: int, high: int, rows: int) -> tuple[int, int]:
    """One row of air on both sides, and enough rows to be a picture."""
    low, high = max(low - 1, 0), min(high + 1, max(rows - 1, 0))
    while high - low + 1 < min(FEWEST_ROWS, rows):
        low, high = max(low - 1, 0), min(high + 1, rows - 1)
    return low, high


def _levels(counts: Sequence[int], low: int, high: int) -> list[int]:
    total = sum(counts)
    if not total:
        return [0] * (high - low + 1)
    padded = [*counts, *[0] * (high + 1 - len(counts))]
    shown = [sum(padded[: low + 1]), *padded[low + 1 : high + 1]]
    return [bisect_left(LEVELS, n / total) for n in shown]
