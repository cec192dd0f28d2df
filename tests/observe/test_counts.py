"""Do many requests counted at once come to what they would one by one?"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from outcomes import OUTCOME

from paceline.observe.counts import ROOM, Counts
from paceline.observe.sheet import sheet_of

BOUNDS = (0.1, 0.5, 1.0)
durations = st.sampled_from([0.0, 0.05, 0.1, 0.2, 0.5, 0.7, 1.0, 9.0])
told = st.lists(st.tuples(st.integers(0, 3 * ROOM), durations), min_size=1, max_size=60)


@settings(deadline=None)
@given(st.lists(told, min_size=1, max_size=4))
def test_histograms_are_those_that_one_gets_by_adding_each(
    sheets: list[list[tuple[int, float]]],
) -> None:
    counts = Counts(lambda who: who.worker, bounds=[BOUNDS])
    (histograms,) = counts.histograms
    expected: dict[str, list[float]] = defaultdict(list)
    for rows in sheets:
        sheet = sheet_of(*[replace(OUTCOME, worker=str(w), seconds=s) for w, s in rows])
        histograms.add(counts.rows(sheet), sheet.seconds)
        for number, seconds in rows:
            expected[str(number)].append(seconds)
    assert list(counts.series) == list(expected)
    for worker, row in counts.series.items():
        values = expected[worker]
        places = [bisect_left(BOUNDS, value) for value in values]
        assert histograms.counts[row].tolist() == [places.count(i) for i in range(4)]
        assert histograms.seconds[row] == pytest.approx(sum(values))
        assert (histograms.least[row], histograms.most[row]) == (min(values), max(values))


def test_series_that_are_gone_leave_the_others_as_they_were() -> None:
    counts = Counts(lambda who: who.worker, 1)
    sheet = sheet_of(*[replace(OUTCOME, worker=str(i % 5)) for i in range(13)])
    np.add.at(counts.sums[0], counts.rows(sheet), 1.0)
    counts.forget(lambda worker: worker in "03")
    np.add.at(counts.sums[0], counts.rows(sheet_of(replace(OUTCOME, worker="4"))), 1.0)
    found = {worker: counts.sums[0, row] for worker, row in counts.series.items()}
    assert found == {"1": 3, "2": 3, "4": 3}
