from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.workload import transform
from paceline.workload.traces import Arrival

TRACE = [Arrival(float(i), 1000, 10, blocks=(1, i)) for i in range(1000)]


def test_speeding_up_squeezes_time_and_drops_nothing() -> None:
    fast = transform.sped_up(TRACE, 4)
    assert len(fast) == len(TRACE)
    assert transform.mean_rate(fast) == pytest.approx(4 * transform.mean_rate(TRACE))


@given(st.floats(0.1, 4.0), st.integers(0, 2**32))
def test_repopulating_changes_the_rate_and_keeps_the_time(factor: float, seed: int) -> None:
    arrivals = transform.repopulated(TRACE, factor, Random(seed))
    assert len(arrivals) == pytest.approx(factor * 1000, abs=90)
    assert arrivals[-1].at_s <= TRACE[-1].at_s + transform.COPY_DELAY_S
    assert arrivals == sorted(arrivals, key=lambda a: a.at_s)
    assert arrivals == transform.repopulated(TRACE, factor, Random(seed))


def test_copies_share_prefixes_with_each_other_and_not_with_the_originals() -> None:
    arrivals = transform.repopulated(TRACE, 2.0, Random(0))
    heads = {arrival.blocks[0] for arrival in arrivals}
    assert heads == {1, 1 + transform.COPY_BLOCKS}


def test_limits_bound_count_and_time() -> None:
    assert len(transform.limited(TRACE, 7)) == 7
    assert transform.limited(TRACE, None, 5.0)[-1].at_s == 4.0
    assert len(transform.limited(TRACE, 3, 5.0)) == 3


def test_clipping_keeps_the_beginning_of_a_prompt() -> None:
    (clipped,) = transform.clipped(TRACE[5:6], prompt_tokens=500, output_tokens=4)
    assert (clipped.prompt_tokens, clipped.output_tokens, clipped.blocks) == (500, 4, (1,))
    assert transform.clipped(TRACE) == TRACE


def test_tiers_are_dealt_in_proportion() -> None:
    dealt = transform.with_tiers(TRACE, {"premium": 1, "standard": 3}, Random(0))
    premium = sum(arrival.tier == "premium" for arrival in dealt)
    assert premium == pytest.approx(250, abs=60)
    assert {arrival.tier for arrival in dealt} == {"premium", "standard"}


def test_merging_keeps_the_order_of_time() -> None:
    both = transform.merged(transform.marked(TRACE, tier="a"), transform.marked(TRACE, tier="b"))
    assert len(both) == 2000
    assert both == sorted(both, key=lambda a: a.at_s)
