"""How many, and how often how long, since the start?

Counted for many requests at once, in arrays with a row for each series: the histograms of the
libraries of Prometheus and OpenTelemetry take 12 and 39 µs a request, these a fraction of one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

import numpy as np

from paceline.observe.sheet import Places, Sheet, Who
from paceline.observe.sketch import Floats, Ints

K = TypeVar("K", bound=Hashable)

ROOM = 16
"""Series that there is room for at first; then twice as many as there are."""


class Histograms:
    """Of one measure, for each series."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self._bounds = np.array(bounds)
        self.counts: Ints = np.zeros((ROOM, len(bounds) + 1), np.int64)
        """By series and bucket."""
        self.seconds: Floats = np.zeros(ROOM)
        """In all."""
        self.least: Floats = np.full(ROOM, np.inf)
        self.most: Floats = np.zeros(ROOM)

    def add(self, series: Ints, seconds: Floats) -> None:
        """These took so long."""
        places = series * self.counts.shape[1] + self._bounds.searchsorted(seconds)
        np.add.at(self.counts.reshape(-1), places, 1)
        np.add.at(self.seconds, series, seconds)
        np.minimum.at(self.least, series, seconds)
        np.maximum.at(self.most, series, seconds)

    def keep(self, series: Ints, more: int) -> None:
        """Only these, in this order, and room for more."""
        self.counts = np.pad(self.counts[series], ((0, more), (0, 0)))
        self.seconds = np.pad(self.seconds[series], (0, more))
        self.least = np.pad(self.least[series], (0, more), constant_values=np.inf)
        self.most = np.pad(self.most[series], (0, more))


class Counts(Generic[K]):
    """Of each series some sums, and histograms of some measures."""

    def __init__(
        self, key: Callable[[Who], K], sums: int = 0, bounds: Sequence[Sequence[float]] = ()
    ) -> None:
        """`key`: of the series that a request belongs to."""
        self.series: dict[K, int] = {}
        """Their rows."""
        self.sums: Floats = np.zeros((sums, ROOM))
        """By place and row."""
        self.histograms = [Histograms(each) for each in bounds]
        self._key = key
        self._places = Places(self._row)
        self._room = ROOM

    def rows(self, sheet: Sheet) -> Ints:
        """Of each request that of its series, which may be new."""
        rows = self._places.of(sheet)
        if len(self.series) > self._room:
            self._keep(np.arange(self._room))
        return rows

    def _row(self, who: Who) -> int:
        return self.series.setdefault(self._key(who), len(self.series))

    def forget(self, gone: Callable[[K], bool]) -> None:
        """Of these nothing more is told."""
        kept = [key for key in self.series if not gone(key)]
        if len(kept) < len(self.series):
            rows = np.array([self.series[key] for key in kept], np.intp)
            self.series = {key: row for row, key in enumerate(kept)}
            self._places.forget()
            self._keep(rows)

    def _keep(self, rows: Ints) -> None:
        self._room = 2 * len(self.series) + ROOM
        more = self._room - len(rows)
        self.sums = np.pad(self.sums[:, rows], ((0, 0), (0, more)))
        for histograms in self.histograms:
            histograms.keep(rows, more)
