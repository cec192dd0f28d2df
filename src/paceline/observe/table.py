"""What was counted of whom? Sums, and counts in bins, of many cells at once.

A cell is one combination of model, tier, tenant and worker. Tables of different times or gateways
add up, once their cells have the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from paceline.observe.sketch import BINS, Floats, Ints, bins

MEASURES = ("queued_s", "ttft_s", "itl_s", "stall_s", "gap_s")
"""What is counted in bins; gaps by the relay's own bounds, the others by those of `sketch`."""
TIMED = 4
"""Measures of each request."""
GAP = MEASURES.index("gap_s")
SUMS = (
    "requests",
    "kept",
    "allowed",
    "shed",
    "failed",
    "left",
    "prompt_tokens",
    "cached_tokens",
    "output_tokens",
    "kept_tokens",
    "worker_s",
    "cost",
    "preemptions",
)
"""What is summed up. `allowed`: broken promises that the tiers' `attain` allows."""
OF_A_REQUEST = SUMS.index("worker_s")
"""Sums to which a request that is over adds; the others come from elsewhere."""

OTHER = "other"
"""Whoever is one too many to be counted by name."""

Row = tuple[float, ...]
"""A cell, and what is added to some of its sums."""


class Table(NamedTuple):
    """Once merged, codes and counts have 32 bits each: they are most of what is kept."""

    codes: Ints
    """Of a cell, a measure and a bin, in ascending order."""
    counts: Ints
    """For each code."""
    cells: Ints
    """In ascending order."""
    sums: Floats
    """For each cell a row, with a column for each of `SUMS`."""


EMPTY = Table(
    np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.int64), np.empty((0, len(SUMS)))
)


def of_requests(told: Floats) -> Table:
    """What these requests come to.

    Of each a row: its cell, its measures (not a number: nothing measured), its sums.
    """
    cells = told[:, 0].astype(np.int64)
    measured = told[:, 1 : 1 + TIMED]
    series = cells[:, None] * len(MEASURES) + np.arange(TIMED)
    known = ~np.isnan(measured)
    codes, counts = np.unique(series[known] * BINS + bins(measured[known]), return_counts=True)
    sums = np.zeros((len(told), len(SUMS)))
    sums[:, :OF_A_REQUEST] = told[:, 1 + TIMED :]
    return Table(codes, counts, *_summed(cells, sums))


def of_gaps(cells: Ints, gaps: Ints) -> Table:
    """Gaps between tokens: for each of these cells a row of counts over the relay's bounds."""
    row, place = gaps.nonzero()
    codes = (cells[row] * len(MEASURES) + GAP) * BINS + place
    return merged([EMPTY._replace(codes=codes, counts=gaps[row, place])])


def of_sums(rows: Sequence[Row], *names: str) -> Table:
    """Some sums by themselves: of each row the first is the cell."""
    if not rows:
        return EMPTY
    told = np.array(rows)
    sums = np.zeros((len(rows), len(SUMS)))
    sums[:, [SUMS.index(name) for name in names]] = told[:, 1:]
    cells, sums = _summed(told[:, 0].astype(np.int64), sums)
    return EMPTY._replace(cells=cells, sums=sums)


def merged(tables: Sequence[Table]) -> Table:
    """All of them together."""
    if not tables:
        return EMPTY
    codes, place = np.unique(np.concatenate([t.codes for t in tables]), return_inverse=True)
    counts = np.bincount(place, np.concatenate([t.counts for t in tables]), len(codes))
    cells, sums = _summed(
        np.concatenate([t.cells for t in tables]), np.concatenate([t.sums for t in tables])
    )
    return Table(codes.astype(np.int32), counts.astype(np.int32), cells, sums)


def renumbered(table: Table, numbers: Ints) -> Table:
    """The same with the cells' new numbers, by their old ones. Several may become one."""
    series, places = np.divmod(table.codes, BINS)
    cells, measures = np.divmod(series, len(MEASURES))
    codes = (numbers[cells] * len(MEASURES) + measures) * BINS + places
    return merged([Table(codes, table.counts, numbers[table.cells], table.sums)])


def spread(table: Table, size: int) -> tuple[Ints, Floats]:
    """Counts by cell, measure and bin, and sums by cell, for the cells below `size`."""
    width = size * len(MEASURES) * BINS
    counts = np.bincount(table.codes, table.counts, width).astype(np.int64)
    sums = np.zeros((size, len(SUMS)))
    sums[table.cells] = table.sums
    return counts.reshape(size, len(MEASURES), BINS), sums


def _summed(cells: Ints, sums: Floats) -> tuple[Ints, Floats]:
    """Rows of the same cell in one."""
    if not len(cells):
        return cells, sums
    order = cells.argsort(kind="stable")
    ordered = cells[order]
    first = np.flatnonzero(np.diff(ordered, prepend=-1))
    return ordered[first], np.add.reduceat(sums[order], first, axis=0)
