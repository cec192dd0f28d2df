"""Is the road not taken the next best one?"""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from standings import ASK, worker

from paceline.policy.route import headroom
from paceline.policy.standing import Standing


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
