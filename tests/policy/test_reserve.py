"""Do those of more weight keep workers that are fast enough for them?"""

from __future__ import annotations

from math import inf

import pytest
import standings
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from standings import ASK

from paceline.policy.headroom import Forecast, forecast
from paceline.policy.reserve import WITHIN, limits
from paceline.policy.standing import Claim, Standing

PROMISE_S = 0.05
CLAIM = Claim(itl_s=PROMISE_S, prompt_rate=2_000.0, output_rate=400.0, read_rate=400_000.0)
CLAIMED = replace(ASK, claims=[CLAIM])


def worker(streams: int) -> tuple[Standing, Forecast]:
    there = standings.worker(streams, kv=1_000.0 * streams)
    return there, forecast(there, ASK, 0.0)


def reserved(claim: Claim, *streams: int) -> list[int]:
    """Which workers are, of some that have so many streams."""
    allowed = limits(replace(ASK, claims=[claim]), [worker(n) for n in streams])
    return [i for i, itl_s in enumerate(allowed) if itl_s < inf]


def times(claim: Claim, factor: float) -> Claim:
    return Claim(
        claim.itl_s,
        factor * claim.prompt_rate,
        factor * claim.output_rate,
        factor * claim.read_rate,
    )


def test_who_has_nobody_above_may_go_anywhere() -> None:
    assert limits(ASK, [worker(3), worker(5)]) == [inf, inf]


def test_the_workers_that_are_fastest_now_are_kept() -> None:
    assert reserved(CLAIM, 40, 5, 20) == [1]


def test_others_may_come_as_long_as_they_leave_it_within_the_promise() -> None:
    (allowed,) = limits(CLAIMED, [worker(1)])
    assert allowed == pytest.approx(WITHIN * PROMISE_S)


def test_a_claim_on_all_of_the_fleet_keeps_all_of_it() -> None:
    assert reserved(times(CLAIM, 100.0), 1, 2, 3) == [0, 1, 2]


def test_a_worker_too_slow_for_the_promise_serves_others() -> None:
    assert reserved(replace(CLAIM, itl_s=1e-4), 1, 2) == []


def test_of_several_claims_on_a_worker_the_strictest_counts() -> None:
    looser = replace(CLAIM, itl_s=2 * PROMISE_S)
    allowed = limits(replace(ASK, claims=[looser, CLAIM]), [worker(1)])
    assert allowed == [pytest.approx(WITHIN * PROMISE_S)]


@given(st.lists(st.integers(0, 200), min_size=1, max_size=8), st.floats(0.1, 10.0))
def test_who_asks_for_more_is_kept_no_fewer_workers(streams: list[int], more: float) -> None:
    assert len(reserved(CLAIM, *streams)) <= len(reserved(times(CLAIM, 1.0 + more), *streams))
