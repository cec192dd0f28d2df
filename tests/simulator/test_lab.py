"""Does the laboratory claim no more than its seeds can tell?"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from msgspec.structs import replace
from played import played

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import lab  # type: ignore[import-not-found]
from paceline.simulator.compare import Comparison, compare
from paceline.simulator.result import Result


def results(kept: Mapping[str, Sequence[float]]) -> list[Result]:
    run = played("any", 0, 1.0)
    return [
        replace(run, policy=policy, seed=seed, attainment=share)
        for policy, shares in kept.items()
        for seed, share in enumerate(shares)
    ]


def comparison(**others: Sequence[float]) -> Comparison:
    return compare(results({"headroom": (0.98, 0.99, 0.98), **others}))


@pytest.mark.parametrize(
    ("other", "place"),
    [
        ((0.60, 0.61, 0.60), "first"),
        ((0.981, 0.99, 0.981), "first"),
        ((0.60, 0.99, 0.98), "not told apart"),
        ((1.0, 1.0, 0.999), "behind"),
        ((0.60,), "not told apart"),
    ],
)
def test_ours_leads_only_where_that_is_shown(other: Sequence[float], place: str) -> None:
    assert lab.place_of_ours(comparison(other=other)) == place


def test_the_oracle_is_beside_the_contest() -> None:
    assert lab.place_of_ours(comparison(oracle=(1.0, 1.0, 1.0))) == "first"


def test_what_is_not_told_apart_is_counted_by_itself_and_not_bold() -> None:
    sure = results({"headroom": (0.98, 0.99, 0.98), "random": (0.6, 0.61, 0.6)})
    unsure = results({"headroom": (0.98, 0.99, 0.98), "random": (0.6, 0.99, 0.98)})
    played_so = {"a": sure, "b": unsure}
    standings = {name: compare(runs) for name, runs in played_so.items()}
    matrix = lab.matrix_of(played_so)
    assert list(lab.summary(matrix, standings)) == [
        "headroom is first, or tied with the first, in 1 of 2 scenarios, not told apart in 1 (b)."
    ]
    *_, a, b = lab.markdown_of(matrix, standings).splitlines()
    assert a.count("**") == b.count("**") == 2
    assert b.endswith(" ? |")


def test_more_seeds_are_for_scenarios_that_there_are() -> None:
    assert all((lab.SCENARIOS / f"{name}.yaml").is_file() for name in lab.SEEDS)
