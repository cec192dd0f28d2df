"""Is the road not taken the next best one?"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from standings import ASK, worker

from paceline.domain.promise import Promise
from paceline.policy import headroom as part
from paceline.policy.route import TIE, headroom
from paceline.policy.standing import Ask, Standing


class Fleet:
    """Workers by place."""

    turn = 0

    def __init__(self, workers: Sequence[Standing]) -> None:
        self.workers = workers
        self.ids = [f"w{i}" for i in range(len(workers))]

    def load(self, place: int) -> int:
        return self.workers[place].everyone

    def remembered(self, place: int) -> int:
        return 0

    def standing(self, place: int, now: float) -> Standing:
        return self.workers[place]


streams = st.lists(st.integers(0, 60), min_size=1, max_size=12)


@given(streams, st.integers(0, 2**32))
def test_it_is_another_one_and_costs_no_less_unless_they_tie(counts: list[int], seed: int) -> None:
    fleet = Fleet([worker(n, kv=1000.0 * n) for n in counts])
    ask = replace(ASK, seed=seed)
    choice = headroom(fleet, ask, range(len(counts)))
    other = choice.runner_up
    if len(counts) == 1:
        assert other is None
        return
    assert other is not None
    assert other.worker_id != fleet.ids[choice.place]
    assert other.costs_more > -0.011


@given(streams.filter(lambda counts: len(counts) > 1))
def test_without_the_one_chosen_it_is_the_one_chosen(counts: list[int]) -> None:
    """As far as the price of work and balance, which depend on who else is there, let it."""
    fleet = Fleet([worker(n, kv=1000.0 * n) for n in counts])
    places = range(len(counts))
    choice = headroom(fleet, ASK, places)
    assert choice.runner_up is not None
    named = fleet.workers[fleet.ids.index(choice.runner_up.worker_id)]
    rest = [i for i in places if i != choice.place]
    instead = fleet.workers[headroom(fleet, ASK, rest).place]
    assert abs(named.everyone - instead.everyone) <= 2


def costs_of(workers: Sequence[Standing], ask: Ask) -> list[float]:
    """By the formula of `paceline.policy.headroom`, nothing left out."""
    forecasts = [part.forecast(each, ask, 0.0) for each in workers]
    least_s = min(seen.delay_s for seen in forecasts)
    busy = sum(seen.busy for seen in forecasts) / len(forecasts)
    backlog_s = sum(seen.backlog_s for seen in forecasts) / len(forecasts)
    return [
        ask.weight * part.loss(each, ask, seen)
        + part.harm(each, ask, seen)
        + part.DELAY_WEIGHT * seen.delay_s / least_s
        + part.WORK_WEIGHT * busy * seen.work
        + part.BALANCE_WEIGHT * seen.backlog_s / backlog_s
        for each, seen in zip(workers, forecasts, strict=True)
    ]


itls = st.sampled_from((0.009, 0.02, 1.0))
crowd = st.tuples(st.integers(10, 14), st.sampled_from((0.0, 100.0, 3000.0)), itls)


@given(
    st.lists(crowd, min_size=2, max_size=12),
    st.sampled_from((0.03, 9.0)),
    itls,
    st.integers(0, 2**32),
)
def test_those_that_were_not_asked_what_they_break_would_have_been_no_better(
    crowds: list[tuple[int, float, float]], ttft_s: float, itl_s: float, seed: int
) -> None:
    workers = [
        worker(n, ahead, kv=1000.0 * n, promised={(promise_s, 1.0): n})
        for n, ahead, promise_s in crowds
    ]
    ask = replace(ASK, promise=Promise(ttft_s, itl_s), seed=seed)
    choice = headroom(Fleet(workers), ask, range(len(workers)))
    costs = costs_of(workers, ask)
    equal = [k for k, cost in enumerate(costs) if cost <= min(costs) + TIE]
    assert choice.place == equal[seed % len(equal)]
    chosen = costs.pop(choice.place)
    assert choice.runner_up is not None
    assert choice.runner_up.costs_more == pytest.approx(min(costs) - chosen, abs=1e-9)
