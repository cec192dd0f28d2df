"""Are late seconds split into causes that add up, and is the largest the right one?"""

from __future__ import annotations

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.domain.promise import Promise
from paceline.policy.causes import (
    AT_BEST,
    LINK,
    NOTICED_S,
    SLOW,
    STEPS,
    TOKENS,
    Cause,
    Speed,
    beyond,
    dominant,
    late_after_s,
    of_first_token,
    of_gaps,
    step_sums,
)
from paceline.policy.standing import Curve
from paceline.policy.windows import PastStep

CURVE = Curve((0.010, *[1e-4] * 7, 1e-7, 1e-9))
NORMAL = Speed(CURVE)

seconds = st.floats(0.0, 10.0)
splits = st.dictionaries(st.sampled_from(list(Cause)), st.floats(1e-6, 10.0), min_size=1)


def step(seconds: float, streams: int = 10, prefill: int = 0, each: float = 1.0) -> PastStep:
    past = PastStep(100.0, seconds, streams, 10_000.0, each)
    if prefill:
        past.book(prefill, 0)
    return past


def main_cause(past: PastStep, speed: Speed = NORMAL, lag_s: float = 0.0) -> Cause:
    """Of what a step takes beyond 30 ms."""
    return dominant(beyond(of_gaps(step_sums(past, speed, lag_s)), 0.03))


def test_a_long_step_with_a_prompt_in_it_is_others_prefill() -> None:
    assert main_cause(step(0.22, prefill=2000)) is Cause.OTHERS_PREFILL


def test_a_long_step_without_a_prompt_is_a_slow_worker() -> None:
    assert main_cause(step(0.2)) is Cause.SLOW_WORKER


def test_a_prompt_on_a_slowed_worker_leaves_the_rest_to_the_worker() -> None:
    assert main_cause(step(0.5, prefill=500), Speed(CURVE, slowdown=7.0)) is Cause.SLOW_WORKER


def test_a_prompt_that_costs_more_than_was_learned_makes_no_slow_worker() -> None:
    assert main_cause(step(0.5, prefill=500)) is Cause.OTHERS_PREFILL


def test_a_step_that_never_seems_to_end_is_a_hang() -> None:
    assert main_cause(step(4.0)) is Cause.HANG


def test_a_prompt_that_fits_no_budget_that_is_believed_in_makes_no_hang() -> None:
    past = step(1.3)
    past.spoiled, past.unplaced = True, 9000
    assert main_cause(past) is Cause.OTHERS_PREFILL
    past.seconds = 8.0
    assert main_cause(past) is Cause.HANG


def test_what_the_gateway_did_not_look_at_is_its_own() -> None:
    assert main_cause(step(0.4), lag_s=0.35) is Cause.GATEWAY


def test_many_tokens_of_each_stream_at_once_were_held_up_on_their_way() -> None:
    assert main_cause(step(0.4, each=30.0)) is Cause.LINK


def test_a_step_of_too_many_streams_is_nobodys_fault() -> None:
    assert main_cause(step(0.06, streams=500)) is Cause.BATCH


def test_a_worker_slower_than_its_like_is_slow_though_that_is_usual_for_it() -> None:
    slow = Speed(Curve((0.040, *[4e-4] * 7, 4e-7, 4e-9)), like=4.0)
    assert main_cause(step(0.048), slow) is Cause.SLOW_WORKER


@given(
    seconds,
    st.integers(0, 500),
    st.integers(0, 8000),
    st.floats(0.0, 1.0),
    st.floats(1.0, 5.0),
    st.floats(0.5, 5.0),
    st.floats(1.0, 20.0),
)
def test_the_parts_of_a_step_add_up_to_it(
    took_s: float,
    streams: int,
    prefill: int,
    lag_s: float,
    like: float,
    slowdown: float,
    each: float,
) -> None:
    speed = Speed(CURVE, like, 1.0, slowdown)
    sums = step_sums(step(took_s, streams, prefill, each), speed, lag_s)
    assert len(sums) == AT_BEST + 1
    assert sum(sums[:TOKENS]) == pytest.approx(took_s, abs=1e-9)
    assert sum(of_gaps(sums).values()) == pytest.approx(took_s, abs=1e-6)


@given(splits, st.floats(0.0, 50.0))
def test_lateness_is_what_goes_beyond_the_promise_and_no_cause_is_more_than_it_was(
    split: dict[Cause, float], allowed_s: float
) -> None:
    late = beyond(split, allowed_s)
    assert sum(late.values()) == pytest.approx(max(sum(split.values()) - allowed_s, 0.0), abs=1e-6)
    assert all(0.0 < s <= split[cause] * (1 + 1e-9) for cause, s in late.items())


def test_what_had_to_be_done_anyway_uses_up_the_promise_first() -> None:
    split = {Cause.OWN_PREFILL: 0.5, Cause.GATEWAY_QUEUE: 0.3}
    assert beyond(split, 0.5) == {Cause.GATEWAY_QUEUE: pytest.approx(0.3)}
    assert beyond(split, 0.4) == {
        Cause.OWN_PREFILL: pytest.approx(0.1),
        Cause.GATEWAY_QUEUE: pytest.approx(0.3),
    }


def first_token(queued_s: float, uncached: float, *steps: PastStep, waits: bool = True) -> Cause:
    sums = [sum(parts) for parts in zip(*(step_sums(s, NORMAL) for s in steps), strict=True)]
    there_s = sum(s.seconds for s in steps)
    return dominant(of_first_token(queued_s, there_s, sums, uncached, 2048.0, waits))


def test_a_first_token_waits_where_its_time_went() -> None:
    quiet, busy = step(0.02), step(0.22, prefill=2000)
    assert first_token(3.0, 100.0, quiet) is Cause.GATEWAY_QUEUE
    assert first_token(0.0, 2000.0, busy) is Cause.OWN_PREFILL
    assert first_token(0.0, 100.0, busy, busy, busy) is Cause.OTHERS_PREFILL
    assert first_token(0.0, 10.0, *[quiet] * 50) is Cause.ENGINE_QUEUE
    assert first_token(0.0, 10.0, *[quiet] * 50, waits=False) is Cause.LINK


@given(st.lists(st.tuples(seconds, st.integers(0, 4000)), min_size=1, max_size=9), seconds, seconds)
def test_the_parts_of_a_first_token_add_up_to_it(
    parts: list[tuple[float, int]], queued_s: float, unseen_s: float
) -> None:
    steps = [step(s, prefill=tokens) for s, tokens in parts]
    sums = [sum(of) for of in zip(*(step_sums(s, NORMAL) for s in steps), strict=True)]
    there_s = sum(s for s, _ in parts) + unseen_s
    split = of_first_token(queued_s, there_s, sums, 100.0, 2048.0)
    assert sum(split.values()) == pytest.approx(queued_s + there_s, abs=1e-6)
    assert sums[STEPS] >= len(steps)
    assert sums[LINK] + sums[SLOW] <= there_s + 1e-6


def test_a_gap_is_late_by_the_worst_that_was_promised_or_three_times_the_mean() -> None:
    assert late_after_s(Promise(stall_s=0.4, itl_s=0.05)) == 0.4
    assert late_after_s(Promise(itl_s=0.05)) == pytest.approx(0.15)
    assert late_after_s(Promise(ttft_s=1.0)) == NOTICED_S < inf
