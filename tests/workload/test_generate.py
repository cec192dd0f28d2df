from __future__ import annotations

from itertools import islice, pairwise
from random import Random
from statistics import fmean, pstdev

import pytest

from paceline.workload.generate import (
    GENERATORS,
    arrival_times,
    chat,
    fixed,
    independent,
    lognormal,
)
from paceline.workload.prompts import prompt_text


@pytest.mark.parametrize("name", GENERATORS)
def test_a_workload_keeps_its_rate_and_repeats_with_its_seed(name: str) -> None:
    arrivals = GENERATORS[name](5.0, 1000.0, Random(1))
    assert len(arrivals) == pytest.approx(5000, rel=0.1)
    assert all(0 <= a.at_s < 1000 for a in arrivals)
    assert arrivals == sorted(arrivals, key=lambda a: a.at_s)
    assert arrivals == GENERATORS[name](5.0, 1000.0, Random(1))


@pytest.mark.parametrize("cv", [0.5, 1.0, 4.0])
def test_gaps_have_the_coefficient_of_variation_asked_for(cv: float) -> None:
    times = list(islice(arrival_times(10.0, Random(2), cv=cv), 50_000))
    gaps = [b - a for a, b in pairwise(times)]
    assert fmean(gaps) == pytest.approx(0.1, rel=0.1)
    assert pstdev(gaps) / fmean(gaps) == pytest.approx(cv, rel=0.1)


def test_conversations_are_as_many_at_the_start_as_later() -> None:
    arrivals = chat(20.0, 200.0, Random(3))
    early = sum(a.at_s < 50 for a in arrivals)
    late = sum(a.at_s >= 150 for a in arrivals)
    assert early == pytest.approx(late, rel=0.2)


def test_each_turn_of_a_conversation_begins_with_the_turn_before() -> None:
    turns = [a for a in chat(0.2, 60.0, Random(5), turns=10.0) if len(a.blocks) > 2]
    by_conversation: dict[int, list[str]] = {}
    for index, arrival in enumerate(turns):
        by_conversation.setdefault(arrival.blocks[2], []).append(prompt_text(arrival, index))
    longest = max(by_conversation.values(), key=len)
    assert len(longest) >= 3
    assert all(after.startswith(before) for before, after in pairwise(longest))


def test_lengths_follow_their_distribution() -> None:
    draw, rng = lognormal(100, 1000, most=5000), Random(4)
    lengths = sorted(draw(rng) for _ in range(20_000))
    assert lengths[10_000] == pytest.approx(100, rel=0.1)
    assert lengths[19_800] == pytest.approx(1000, rel=0.2)
    assert lengths[-1] <= 5000
    arrivals = independent(1.0, 50.0, rng, prompts=fixed(9), answers=fixed(3))
    assert {(a.prompt_tokens, a.output_tokens) for a in arrivals} == {(9, 3)}
