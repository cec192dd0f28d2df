"""At what pace are those who wait sent?"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.kernel.room import LEAST_BUSY_S, RATE_S, Pace

MOMENTS = st.lists(st.floats(0.0, 3 * RATE_S), max_size=30).map(sorted)


@given(MOMENTS, st.floats(1.0, 1e4))
def test_the_pace_does_not_depend_on_how_often_it_is_looked_at(
    looks: list[float], cost: float
) -> None:
    often, once = Pace(), Pace()
    for now in looks:
        often.passed(now, busy=True)
    for pace in (often, once):
        pace.passed(3 * RATE_S, busy=True)
        pace.sent(cost)
    assert often.seconds_for(100.0) == pytest.approx(once.seconds_for(100.0))


def test_at_an_even_pace_work_takes_as_long_as_it_did_so_far() -> None:
    pace = Pace()
    for step in range(1, 1001):
        pace.passed(step / 20, busy=True)
        pace.sent(50.0)
    assert pace.seconds_for(1000.0) == pytest.approx(1.0, rel=0.01)


def test_the_time_when_nobody_waits_says_nothing() -> None:
    pace = Pace()
    pace.passed(1.0, busy=True)
    pace.sent(100.0)
    before_s = pace.seconds_for(100.0)
    pace.passed(1000.0, busy=False)
    assert pace.seconds_for(100.0) == before_s


def test_a_pace_of_which_little_was_seen_is_not_known() -> None:
    pace = Pace()
    pace.passed(LEAST_BUSY_S / 2, busy=True)
    pace.sent(100.0)
    assert pace.seconds_for(100.0) == 0.0
