"""How do several gateways see their fleet as one? Each tells its counts, and they are added up."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from paceline.domain.errors import InvalidRequest
from paceline.observe.cluster import Of, Snapshot
from paceline.observe.sketch import ACCURACY, BINS, Ints
from paceline.observe.table import MEASURES, OF_A_REQUEST, SUMS, Table, merged, renumbered

VERSION = 1
"""To be raised when a bin, a measure or a sum changes its meaning."""


class Sketches(msgspec.Struct, frozen=True, kw_only=True):
    """What a gateway has counted in some time, for others to add to theirs."""

    version: int = VERSION
    at: float
    """Unix time of its end."""
    covered_s: float
    accuracy: float = ACCURACY
    measures: tuple[str, ...] = MEASURES
    sums: tuple[str, ...] = SUMS
    cells: tuple[Of, ...]
    codes: list[int]
    """(cell * measures + measure) * 1024 + bin, in ascending order."""
    counts: list[int]
    """For each code."""
    told_of: list[int]
    """Cells that have sums."""
    totals: list[list[float]]
    """Their sums."""


def exported(snapshot: Snapshot, at: float) -> Sketches:
    """A snapshot to be sent, with the cells that are spoken of only."""
    table = snapshot.table
    series = len(MEASURES) * BINS
    used = np.unique(np.concatenate([table.cells, table.codes // series]))
    numbers = np.zeros(len(snapshot.of), np.int64)
    numbers[used] = np.arange(len(used))
    small = renumbered(table, numbers)
    return Sketches(
        at=at,
        covered_s=snapshot.covered_s,
        cells=tuple(snapshot.of[cell] for cell in used),
        codes=small.codes.tolist(),
        counts=small.counts.tolist(),
        told_of=small.cells.tolist(),
        totals=small.sums.tolist(),
    )


def merged_sketches(told: Sequence[Sketches]) -> Snapshot:
    """Several gateways' counts as those of one.

    What each has seen of the workers themselves (their time, cost and preemptions) is left out: all
    have seen the same.
    """
    numbers: dict[Of, int] = {}
    tables = []
    for one in told:
        if (one.version, one.measures, one.sums) != (VERSION, MEASURES, SUMS):
            raise InvalidRequest("these sketches are of another version of Paceline")
        new = _ints([numbers.setdefault(of, len(numbers)) for of in one.cells])
        sums = np.array(one.totals, np.float64).reshape(-1, len(SUMS))
        sums[:, OF_A_REQUEST:] = 0.0
        table = Table(_ints(one.codes), _ints(one.counts), _ints(one.told_of), sums)
        tables.append(renumbered(table, new))
    return Snapshot(tuple(numbers), merged(tables), max((one.covered_s for one in told), default=0))


def _ints(numbers: Sequence[int]) -> Ints:
    return np.array(numbers, np.int64)
