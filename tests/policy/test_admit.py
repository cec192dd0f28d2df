"""Who may go to a worker now, and who had better wait?"""

from __future__ import annotations

from functools import partial

import pytest
import standings
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from standings import ASK

from paceline.domain.promise import Promise
from paceline.policy.admit import is_open, is_worth
from paceline.policy.headroom import forecast
from paceline.policy.standing import Ask, Standing

worker = partial(standings.worker, kv_capacity=100_000.0)


def may_go(there: Standing, ask: Ask = ASK) -> bool:
    return is_open(there, ask, forecast(there, ask, 0.0))


def test_an_idle_worker_takes_whatever_comes() -> None:
    huge = replace(ASK, prompt_tokens=1e6, promise=Promise(1e-3, 1e-4))
    assert may_go(worker(streams=0, kv=0.0), huge)


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


@pytest.mark.parametrize(("itl_s", "open_"), [(0.0085, False), (0.1, True)])
def test_a_worker_is_closed_where_the_request_would_break_what_others_were_promised(
    itl_s: float, open_: bool
) -> None:
    assert may_go(worker(promised={(itl_s, 50.0): 10})) is open_


@pytest.mark.parametrize(("loss", "worth_it"), [(0.0, True), (0.4, True), (0.6, False)])
def test_the_harm_may_be_what_the_request_is_worth_and_no_more(loss: float, worth_it: bool) -> None:
    assert is_worth(ASK, loss, harm=1.0) is worth_it


def test_whose_promise_is_lost_goes_where_it_does_next_to_no_harm() -> None:
    assert is_worth(ASK, loss=1.0, harm=0.01)
    assert not is_worth(ASK, loss=1.0, harm=0.5)


def test_whoever_is_overdue_counts_for_all_its_weight() -> None:
    overdue = replace(ASK, overdue=True)
    assert is_worth(overdue, loss=1.0, harm=1.9)
    assert not is_worth(overdue, loss=1.0, harm=2.1)


tokens = st.floats(0.0, 5000.0)


@given(tokens, tokens)
def test_what_is_closed_stays_closed_with_more_before_it(ahead: float, more: float) -> None:
    assert may_go(worker(ahead=ahead)) or not may_go(worker(ahead=ahead + more))


risks = st.floats(0.0, 1.0)


@given(risks, risks, risks, risks)
def test_what_is_not_worth_it_is_not_where_more_breaks(
    loss: float, more_loss: float, harm: float, more_harm: float
) -> None:
    worse = is_worth(ASK, max(loss, more_loss), harm + more_harm)
    assert is_worth(ASK, loss, harm) or not worse
