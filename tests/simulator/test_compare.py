"""Is a difference between policies more than chance?"""

from __future__ import annotations

from random import Random
from statistics import fmean

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from played import played

from paceline.simulator.compare import (
    Comparison,
    compare,
    difference,
    estimate,
    t_quantile,
    verdict,
)
from paceline.simulator.oracle import ORACLE
from paceline.simulator.result import Result


def runs(policy: str, skill: float, seeds: int = 3) -> list[Result]:
    return [played(policy, seed, skill) for seed in range(seeds)]


def with_attainment(policy: str, *shares: float) -> list[Result]:
    return [
        msgspec.structs.replace(played(policy, seed, 1.0), attainment=share)
        for seed, share in enumerate(shares)
    ]


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [(1, 12.706), (4, 2.776), (9, 2.262), (10, 2.228), (30, 2.042), (120, 1.980), (10**6, 1.960)],
)
def test_student_is_as_in_the_tables(freedom: int, quantile: float) -> None:
    assert t_quantile(freedom) == pytest.approx(quantile, abs=6e-4)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    rng = Random(1)
    held = 0
    for _ in range(4000):
        guess = estimate([rng.gauss(3.0, 1.0) for _ in range(5)])
        assert guess is not None
        assert guess.low is not None
        assert guess.high is not None
        held += guess.low <= 3.0 <= guess.high
    assert held / 4000 == pytest.approx(0.95, abs=0.015)


@given(st.lists(st.floats(0.0, 1.0), min_size=2, max_size=20))
def test_an_interval_surrounds_its_mean(values: list[float]) -> None:
    guess = estimate(values)
    assert guess is not None
    assert guess.low is not None
    assert guess.high is not None
    assert guess.low <= guess.mean <= guess.high
    assert guess.mean == pytest.approx(fmean(values))


def test_one_seed_tells_no_interval_and_no_winner() -> None:
    gain = difference(with_attainment("a", 0.9), with_attainment("b", 0.5))
    assert gain.attainment.low is None
    assert gain.verdict == "unsure"


def test_pairing_finds_what_seeds_would_hide() -> None:
    """Seeds differ by 30 points, policies by one: only the differences tell."""
    ours = with_attainment("ours", 0.60, 0.75, 0.90)
    theirs = with_attainment("theirs", 0.59, 0.741, 0.89)
    assert difference(ours, theirs).verdict == "better"
    assert difference(theirs, ours).verdict == "worse"


def test_a_small_difference_that_chance_may_explain_is_a_tie() -> None:
    ours, theirs = with_attainment("a", 0.9, 0.8, 0.9), with_attainment("b", 0.9, 0.801, 0.899)
    assert difference(ours, theirs).verdict == "tied"


def test_a_wide_interval_around_none_is_no_tie() -> None:
    """Two seeds, 98 against 61 %: they may be worlds apart."""
    ours, theirs = with_attainment("a", 0.99, 0.97), with_attainment("b", 0.40, 0.82)
    assert difference(ours, theirs).verdict == "unsure"
    comparison = compare([*ours, *theirs])
    assert comparison.tied_with_best == ("a",)
    assert comparison.not_told_apart == ("b",)


def test_as_good_on_average_is_no_tie_if_seeds_disagree() -> None:
    ours, theirs = with_attainment("a", 0.9, 0.5), with_attainment("b", 0.5, 0.9)
    assert difference(ours, theirs).verdict == "unsure"


def test_an_interval_ends_where_the_possible_does() -> None:
    """With two seeds that differ, Student's interval reaches beyond 1 and below 0."""
    runs = [played("a", seed, skill) for seed, skill in ((0, 1.0), (1, 0.0))]
    figures = compare(runs).policies["a"].figures
    kept, ttft_s = figures["attainment"], figures["ttft_p99_s"]
    assert kept is not None
    assert ttft_s is not None
    assert (kept.high, ttft_s.low) == (1.0, 0.0)
    assert kept.margin is not None
    assert kept.margin > 1.0 - kept.mean
    assert ttft_s.margin is not None
    assert ttft_s.high == pytest.approx(ttft_s.mean + ttft_s.margin)


def test_a_sure_difference_of_less_than_a_tenth_of_a_point_is_a_tie() -> None:
    gain = estimate([0.0005, 0.0006, 0.0005])
    assert gain is not None
    assert gain.low is not None
    assert gain.low > 0
    assert verdict(gain) == "tied"


def test_differences_are_taken_over_common_seeds_only() -> None:
    gain = difference(with_attainment("a", 0.9, 0.8, 0.1), with_attainment("b", 0.8, 0.7))
    assert gain.attainment.mean == pytest.approx(0.1)
    with pytest.raises(ValueError, match="no seed in common"):
        difference(with_attainment("a", 0.9), with_attainment("b", 0.9, 0.9)[1:])


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=4))
def test_whoever_is_better_has_someone_worse(shares: list[tuple[float, float]]) -> None:
    ours = with_attainment("a", *(a for a, _ in shares))
    theirs = with_attainment("b", *(b for _, b in shares))
    opposite = {"better": "worse", "worse": "better", "tied": "tied", "unsure": "unsure"}
    assert difference(theirs, ours).verdict == opposite[difference(ours, theirs).verdict]


def test_the_better_policy_comes_out_best() -> None:
    comparison = compare([*runs("weak", 0.0), *runs("strong", 1.0)], {"load": "1.2"})
    assert comparison.best == "strong"
    assert comparison.tied_with_best == ("strong",)
    assert list(comparison.policies) == ["weak", "strong"]
    assert comparison.policies["weak"].to_first is None
    first = comparison.policies["strong"].to_first
    assert first is not None
    assert (first.to, first.verdict) == ("weak", "better")
    assert comparison.seeds == (0, 1, 2)
    assert comparison.tiers == ("premium", "standard")
    assert comparison.difference("weak", "strong").verdict == "worse"


def test_the_oracle_is_never_the_best() -> None:
    comparison = compare([*runs("headroom", 0.8), *runs(ORACLE, 1.0)])
    assert comparison.best == "headroom"
    assert comparison.tied_with_best == ("headroom",)
    assert compare(runs(ORACLE, 1.0)).best == ORACLE


def test_results_may_come_in_any_order() -> None:
    results = [*runs("a", 0.5), *runs("b", 0.5)]
    mixed = [results[i] for i in (2, 4, 0, 3, 1, 5)]
    assert compare(mixed) == compare(results)


def test_a_comparison_survives_json() -> None:
    comparison = compare([*runs("a", 0.5, 2), *runs("b", 0.6, 2)])
    assert msgspec.json.decode(msgspec.json.encode(comparison), type=Comparison) == comparison
