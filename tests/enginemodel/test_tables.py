"""Do the tables behave like a GPU, at what was measured, between, and beyond?"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.enginemodel import figures
from paceline.enginemodel.tables import Curve, StepTable, Surface

TABLES = {name: StepTable.of(name) for name in figures.DENSE_MS}
MOE = TABLES["h100-qwen3-30b-a3b"]

tables = st.sampled_from(list(TABLES.values()))
streams = st.integers(0, 2048)
prefills = st.integers(0, 20_000)
contexts = st.integers(0, 1_000_000)
pairs = st.floats(0, 2e9)


@given(tables, streams, prefills, contexts, pairs, st.integers(0, 3), st.floats(1, 1e6))
def test_more_work_never_takes_less_time(
    table: StepTable, n: int, p: int, kv: int, q: float, which: int, more: float
) -> None:
    load = [n, p, kv, q]
    heavier = [x + (int(more) if i == which else 0) for i, x in enumerate(load)]
    assert table.step_seconds(*heavier) >= table.step_seconds(*load) * (1 - 1e-12)  # type: ignore[arg-type]


@given(tables, st.integers(1, 1024), contexts)
def test_no_step_is_quicker_than_reading_the_weights(table: StepTable, n: int, kv: int) -> None:
    assert table.step_seconds(n, 0, kv, 0.0) > table.dense.at(0) > 1e-3


@pytest.mark.parametrize("name", TABLES)
def test_a_table_gives_back_what_was_measured(name: str) -> None:
    table = TABLES[name]
    for tokens, ms in zip(figures.TOKENS, figures.DENSE_MS[name], strict=True):
        assert table.dense.at(tokens) == pytest.approx(ms * 1e-3)
    grids = (
        (table.decode, figures.STREAMS, figures.CONTEXT, figures.DECODE_MS[name]),
        (table.prefill, figures.PREFILL, figures.PAIRS, figures.PREFILL_MS[name]),
    )
    for surface, knots, across, rows in grids:
        for x, row in zip(knots, rows, strict=True):
            assert [surface.at(x, y) for y in across] == pytest.approx([ms * 1e-3 for ms in row])


def test_of_a_mixture_of_experts_the_first_streams_cost_most() -> None:
    # Each token wakes other experts, whose weights must be read, until all of them are awake.
    one, few, many = (MOE.step_seconds(n, 0, 100 * n, 0.0) for n in (1, 32, 256))
    assert few > 4 * one
    assert many < 1.5 * few


def test_of_a_dense_model_the_first_streams_cost_nearly_nothing() -> None:
    dense = TABLES["h100-llama-8b"]
    assert dense.step_seconds(32, 0, 3200, 0.0) < 1.2 * dense.step_seconds(1, 0, 100, 0.0)


def test_a_prompt_after_a_cached_prefix_costs_more_than_one_that_begins() -> None:
    table = TABLES["h100-llama-70b-tp4"]
    begins = table.step_seconds(0, 512, 0, 512 * 256)
    goes_on = table.step_seconds(0, 512, 0, 512 * (60_000 + 256))
    assert goes_on > 1.5 * begins


def test_a_curve_goes_on_as_it_ended() -> None:
    curve = Curve.through((0, 10, 20), (1.0, 2.0, 5.0))
    assert [curve.at(x) for x in (0, 5, 10, 15, 20, 30)] == [1.0, 1.5, 2.0, 3.5, 5.0, 8.0]


def test_a_surface_is_linear_between_its_rows_and_in_proportion_beyond() -> None:
    low, high = Curve.through((0, 10), (0.0, 10.0)), Curve.through((0, 10), (10.0, 20.0))
    surface = Surface((1, 3), (low, high))
    assert [surface.at(x, 5) for x in (1, 2, 3, 6)] == [5.0, 10.0, 15.0, 30.0]
