"""Is a worker's pace that of its last steps, and of no others?"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.policy.pace import LAST, LEAST, SLOW, Pace, Seen, of_late


def steps(times: float, number: int = 1, aged: float = 1.0) -> list[Seen]:
    """So many times as long as normal, one by one; normal is `aged` times as fast as its best."""
    return [(0.05, 0.05 * (times - 1.0), 0.05 * aged, 1)] * number


@pytest.mark.parametrize("slow", [2, 5, 9, 20])
def test_the_healthy_steps_before_do_not_make_a_slow_worker_look_better(slow: int) -> None:
    pace = of_late([*steps(1.0, 30), *steps(8.0, slow)])
    assert pace.times == pytest.approx(8.0)
    assert pace.steps == slow


def test_a_worker_that_has_recovered_is_well_after_a_few_steps() -> None:
    assert of_late([*steps(8.0, 30), *steps(1.0, 3)]).times == pytest.approx(1.0)


def test_a_hiccup_is_no_pace() -> None:
    assert of_late([*steps(1.0, 19), *steps(60.0)]).times == pytest.approx(1.0)
    assert of_late([*steps(2.0, 19), *steps(60.0)]).times == pytest.approx(2.0)


def test_a_pace_that_is_not_slow_is_that_of_all_the_last_steps() -> None:
    uneven = [*steps(0.6, 10), *steps(1.4, 10)] * 2
    assert of_late(uneven).times == pytest.approx(1.0)
    assert of_late(uneven).steps == LAST


def test_few_steps_say_nothing() -> None:
    assert of_late(steps(9.0, LEAST - 1)) == Pace()
    assert of_late([]) == Pace()


def test_steps_told_together_count_as_many() -> None:
    assert of_late([(0.05, 0.0, 0.05, 500)]).steps == LAST
    assert of_late([*steps(1.0, 20), (0.05, 0.35, 0.05, 500)]).times == pytest.approx(8.0)


def test_its_own_best_and_its_like_are_two_measures() -> None:
    """What is twice as slow as its like by nature is as fast as ever."""
    pace = of_late(steps(2.0, 20, aged=2.0))
    assert pace.times == pytest.approx(2.0)
    assert pace.times_itself == pytest.approx(1.0)


seen = st.tuples(
    st.floats(1e-4, 1.0), st.floats(-0.5e-4, 9.0), st.floats(1e-4, 1.0), st.integers(1, 60)
)


@given(st.lists(seen, max_size=40))
def test_whatever_was_seen_there_is_a_pace_and_never_out_of_bounds(last: list[Seen]) -> None:
    pace = of_late(last)
    times = [1.0 + slow_s / normal_s for normal_s, slow_s, _, _ in last] or [1.0]
    assert 0.0 <= pace.steps <= LAST
    if pace.steps:
        assert 0.99 * min(times) <= pace.times <= 1.01 * max(times)
    assert pace.times < SLOW or pace.steps > 0.0
