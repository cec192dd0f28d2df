"""Who may go to a worker now, and who had better wait?"""

from __future__ import annotations

from functools import partial

import pytest
import standings
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from standings import ASK

from paceline.policy.admit import is_open
from paceline.policy.headroom import forecast
from paceline.policy.standing import Ask, Standing

worker = partial(standings.worker, kv_capacity=100_000.0)


def may_go(there: Standing, ask: Ask = ASK, loss: float = 0.0, harm: float = 0.0) -> bool:
    return is_open(there, ask, forecast(there, ask, 0.0), loss, harm)


def test_an_idle_worker_takes_whatever_comes() -> None:
    huge = replace(ASK, prompt_tokens=1e6)
    assert may_go(worker(streams=0, kv=0.0), huge, loss=1.0, harm=9.0)


@pytest.mark.parametrize(("ahead", "open_"), [(0.0, True), (1000.0, True), (2100.0, False)])
def test_a_worker_has_no_more_prefill_before_it_than_fills_a_step(
    ahead: float, open_: bool
) -> None:
    assert may_go(worker(ahead=ahead)) is open_


@pytest.mark.parametrize(("delay_s", "open_"), [(0.0, False), (0.03, False), (0.3, True)])
def test_a_worker_far_away_may_have_more_before_it(delay_s: float, open_: bool) -> None:
    assert may_go(worker(ahead=2100.0, delay_s=delay_s)) is open_


@pytest.mark.parametrize(("kv", "open_"), [(90_000.0, True), (94_800.0, False)])
def test_nobody_goes_where_the_kv_cache_would_be_full(kv: float, open_: bool) -> None:
    assert may_go(worker(kv=kv)) is open_


@pytest.mark.parametrize(("loss", "open_"), [(0.0, True), (0.4, True), (0.6, False)])
def test_the_harm_may_be_what_the_request_is_worth_and_no_more(loss: float, open_: bool) -> None:
    assert may_go(worker(), loss=loss, harm=1.0) is open_


def test_whose_promise_is_lost_goes_where_it_does_next_to_no_harm() -> None:
    assert may_go(worker(), loss=1.0, harm=0.01)
    assert not may_go(worker(), loss=1.0, harm=0.5)


def test_whoever_is_overdue_counts_for_all_its_weight() -> None:
    overdue = replace(ASK, overdue=True)
    assert may_go(worker(), overdue, loss=1.0, harm=1.9)
    assert not may_go(worker(), overdue, loss=1.0, harm=2.1)


risks = st.floats(0.0, 1.0)


@given(risks, risks, risks, risks, st.floats(0.0, 5000.0), st.floats(0.0, 5000.0))
def test_what_is_closed_stays_closed_when_it_gets_worse(
    loss: float, more_loss: float, harm: float, more_harm: float, ahead: float, more: float
) -> None:
    worse = may_go(worker(ahead=ahead + more), loss=max(loss, more_loss), harm=harm + more_harm)
    assert may_go(worker(ahead=ahead), loss=loss, harm=harm) or not worse
