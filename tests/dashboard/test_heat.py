"""Does the heat map show where the tokens were?"""

from __future__ import annotations

from fake_admin import BOUNDS_S, FakeAdmin
from hypothesis import given
from hypothesis import strategies as st
from msgspec import convert

from paceline.dashboard.heat import FEWEST_ROWS, LEVELS, heat
from paceline.dashboard.said import Figures, History, Slot
from paceline.dashboard.sections.tokens import Times, times_of
from paceline.dashboard.source import Missing


def history(*counts: list[int]) -> History:
    slots = [Slot(100.0 + 10 * i, 10.0, Figures(gap_counts=each)) for i, each in enumerate(counts)]
    return History(at=200.0, gap_bounds_s=BOUNDS_S, slots=slots)


def only(bin_: int, tokens: int = 100) -> list[int]:
    return [tokens if i == bin_ else 0 for i in range(32)]


def test_all_tokens_of_one_pace_fill_one_row() -> None:
    grid = heat(history(only(10)))
    (column,) = grid.columns
    assert sorted(column.levels)[-2:] == [0, len(LEVELS)]
    row = column.levels.index(len(LEVELS))
    assert grid.bounds_s[row] == BOUNDS_S[9]
    assert grid.bounds_s[row + 1] == BOUNDS_S[10]


def test_a_promise_is_within_the_picture() -> None:
    grid = heat(history(only(3)), [0.5])
    assert grid.bounds_s[0] <= 0.002 < 0.5 <= grid.bounds_s[-1]


def test_a_moment_without_tokens_is_empty() -> None:
    assert not any(heat(history([], only(5))).columns[0].levels)


def test_no_history_is_no_picture() -> None:
    assert heat(History()).tokens == 0
    assert heat(history()).columns == []


@given(st.lists(st.lists(st.integers(0, 10**6), min_size=32, max_size=32), max_size=5))
def test_every_token_is_in_a_cell_and_cells_fit_the_rows(counts: list[list[int]]) -> None:
    grid = heat(history(*counts))
    assert len(grid.bounds_s) - 1 >= FEWEST_ROWS
    assert grid.tokens == sum(map(sum, counts))
    for column, each in zip(grid.columns, counts, strict=True):
        assert len(column.levels) == len(grid.bounds_s) - 1
        assert any(column.levels) == any(each)


def test_a_few_that_came_together_do_not_stretch_the_picture_but_a_late_one_does() -> None:
    usual = only(12, 10_000)
    fast, late = usual.copy(), usual.copy()
    fast[0], late[26] = 1, 1
    assert heat(history(fast)).bounds_s == heat(history(usual)).bounds_s
    assert heat(history(late)).bounds_s[-1] > BOUNDS_S[25]


def test_what_a_gateway_says_can_be_drawn() -> None:
    grid = heat(convert(FakeAdmin().history({}), History))
    assert len(grid.columns) == 60
    assert grid.columns[0].p99


def test_charts_look_back_no_further_than_there_is_something_to_see() -> None:
    young = history(only(5))
    assert times_of(young, 600.0, 200.0) == Times(100.0, 200.0)
    assert times_of(young, 60.0, 200.0) == Times(140.0, 200.0)
    assert times_of(young, 600.0, 110.0) == Times(50.0, 110.0)
    assert times_of(Missing("x"), 600.0, 700.0) == Times(100.0, 700.0)
