from __future__ import annotations

from itertools import islice, pairwise
from math import inf
from random import Random
from statistics import fmean, pstdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.workload.generate import (
    GENERATORS,
    agents,
    arrival_times,
    batch,
    chat,
    fixed,
    independent,
    lognormal,
)
from paceline.workload.prompts import prompt_text


@pytest.mark.parametrize("name", GENERATORS)
def test_a_workload_keeps_its_rate_and_repeats_with_its_seed(name: str) -> None:
    arrivals = list(GENERATORS[name](20.0, 1000.0, Random(1)))
    assert len(arrivals) == pytest.approx(20_000, rel=0.1)
    assert all(0 <= a.at_s < 1000 for a in arrivals)
    assert arrivals == sorted(arrivals, key=lambda a: a.at_s)
    assert arrivals == list(GENERATORS[name](20.0, 1000.0, Random(1)))


@pytest.mark.parametrize("name", GENERATORS.keys() - {"batch"})
def test_a_workload_may_be_endless(name: str) -> None:
    arrivals = list(islice(GENERATORS[name](5.0, inf, Random(1)), 100))
    assert arrivals == sorted(arrivals, key=lambda a: a.at_s)
    assert len(arrivals) == 100


@pytest.mark.parametrize("cv", [0.5, 1.0, 4.0])
def test_gaps_have_the_coefficient_of_variation_asked_for(cv: float) -> None:
    times = list(islice(arrival_times(10.0, Random(2), cv=cv), 50_000))
    gaps = [b - a for a, b in pairwise(times)]
    assert fmean(gaps) == pytest.approx(0.1, rel=0.1)
    assert pstdev(gaps) / fmean(gaps) == pytest.approx(cv, rel=0.1)


def test_a_changed_rate_holds_from_its_second_on_and_a_last_one_of_nothing_is_the_end() -> None:
    factors = [(100.0, 3.0), (200.0, 0.0), (300.0, 0.5), (500.0, 0.0)]
    times = list(arrival_times(50.0, Random(3), factors=factors))
    counts = [sum(a <= t < b for t in times) for a, b in pairwise((0, 100, 200, 300, 500, inf))]
    assert counts == [
        pytest.approx(5_000, rel=0.05),
        pytest.approx(15_000, rel=0.05),
        0,
        pytest.approx(5_000, rel=0.05),
        0,
    ]


def test_arrivals_stay_as_bursty_when_their_rate_changes() -> None:
    times = list(islice(arrival_times(1.0, Random(4), cv=3.0, factors=[(0.0, 40.0)]), 50_000))
    gaps = [b - a for a, b in pairwise(times)]
    assert pstdev(gaps) / fmean(gaps) == pytest.approx(3.0, rel=0.1)


@given(
    steps=st.dictionaries(st.floats(-50, 500), st.floats(0, 20), max_size=8),
    cv=st.floats(0.2, 6),
    seed=st.integers(0, 2**32),
)
def test_times_never_go_back_whatever_the_rate_does(
    steps: dict[float, float], cv: float, seed: int
) -> None:
    times = list(
        islice(arrival_times(2.0, Random(seed), cv=cv, factors=sorted(steps.items())), 500)
    )
    assert times == sorted(times)
    assert all(time >= 0 for time in times)


def test_conversations_are_as_many_at_the_start_as_later() -> None:
    arrivals = list(chat(20.0, 200.0, Random(3)))
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


def test_agents_of_a_family_share_its_tools_and_nothing_with_other_families() -> None:
    calls = list(agents(5.0, 200.0, Random(6), families=3, shared_tokens=1024))
    tools = {call.blocks[:2] for call in calls}
    assert len(tools) == 3
    assert len({block for pair in tools for block in pair}) == 6


def test_agents_send_much_and_get_little_as_those_of_the_public_trace() -> None:
    calls = list(agents(20.0, 1000.0, Random(7)))
    assert fmean(call.prompt_tokens for call in calls) == pytest.approx(8_600, rel=0.1)
    assert fmean(call.output_tokens for call in calls) == pytest.approx(182, rel=0.1)


def test_a_batch_comes_in_one_go_or_in_jobs() -> None:
    assert {a.at_s for a in batch(10.0, 100.0, Random(8))} == {0.0}
    jobs = [a.at_s for a in batch(10.0, 10_000.0, Random(8), turns=50.0)]
    assert len(jobs) / len(set(jobs)) == pytest.approx(50, rel=0.1)


def test_each_job_of_a_batch_has_a_name() -> None:
    assert {a.batch for a in batch(10.0, 100.0, Random(8))} == {"job-1"}
    arrivals = list(batch(10.0, 10_000.0, Random(8), turns=50.0))
    names = {a.at_s: a.batch for a in arrivals}
    assert len(set(names.values())) == len(names)
    assert all(names[a.at_s] == a.batch for a in arrivals)


def test_requests_with_a_shared_prefix_share_just_that() -> None:
    first, second = islice(independent(1.0, 100.0, Random(9), shared_tokens=700), 2)
    assert first.blocks == second.blocks
    assert first.shared_tokens == 700 < first.prompt_tokens
    [other] = islice(independent(1.0, 100.0, Random(9), shared_tokens=700, name="other"), 1)
    assert not set(other.blocks) & set(first.blocks)


def test_lengths_follow_their_distribution() -> None:
    draw, rng = lognormal(100, 1000, most=5000), Random(4)
    lengths = sorted(draw(rng) for _ in range(20_000))
    assert lengths[10_000] == pytest.approx(100, rel=0.1)
    assert lengths[19_800] == pytest.approx(1000, rel=0.2)
    assert lengths[-1] <= 5000
    arrivals = independent(1.0, 50.0, rng, prompts=fixed(9), answers=fixed(3))
    assert {(a.prompt_tokens, a.output_tokens) for a in arrivals} == {(9, 3)}
