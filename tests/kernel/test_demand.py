"""Is what each class of requests asks for known soon, and forgotten when it asks no more?"""

from __future__ import annotations

from math import inf

import pytest
from msgspec.structs import replace

from paceline.domain.promise import Promise
from paceline.domain.request import Request
from paceline.kernel.demand import DEMAND_S, MOST_CLASSES, Demand
from paceline.kernel.pool import Pool
from paceline.policy.standing import Claim

PREMIUM = Request(
    id="p", model="m", tenant="t", tier="premium", promise=Promise(1.0, 0.05), weight=8.0
)
FREE = replace(PREMIUM, id="f", tier="free", promise=Promise(4.0, 0.2), weight=1.0)
ASK = replace(
    Pool().ask(PREMIUM, 0.0, 0.0), prompt_tokens=1000.0, output_tokens=200.0, cached={0: 400.0}
)


def after(seconds: float, each_s: float = 0.5, request: Request = PREMIUM) -> Demand:
    """So many seconds of requests that come evenly."""
    demand = Demand()
    for k in range(int(seconds / each_s) + 1):
        demand.came(request, ASK, k * each_s)
    return demand


@pytest.mark.parametrize("seconds", [10.0, 30.0, 300.0])
def test_a_rate_is_known_long_before_its_time_constant_has_passed(seconds: float) -> None:
    (claim,) = after(seconds).above(FREE, seconds)
    assert claim.itl_s == 0.05
    assert claim.prompt_rate == pytest.approx(2 * 600.0, rel=0.1)  # what is cached is not computed
    assert claim.output_rate == pytest.approx(2 * 200.0, rel=0.1)
    assert claim.read_rate == pytest.approx(2 * 200.0 * 1100.0, rel=0.1)


def test_it_fades_when_nobody_comes_any_more() -> None:
    (claim,) = after(60.0).above(FREE, 60.0 + 5 * DEMAND_S)
    assert claim.output_rate < 0.02 * 400.0


def test_one_request_says_nothing_yet() -> None:
    assert after(0.0).above(FREE, 0.0) == []


def test_equals_and_those_above_have_no_claims_to_look_at() -> None:
    assert after(60.0).above(PREMIUM, 60.0) == []
    assert after(60.0, request=FREE).above(PREMIUM, 60.0) == []


def test_who_is_promised_no_pace_claims_none() -> None:
    heavy = replace(PREMIUM, promise=Promise(1.0, inf))
    assert after(60.0, request=heavy).above(FREE, 60.0) == []


def test_a_client_cannot_fill_the_memory_with_promises() -> None:
    demand = Demand()
    for k in range(1, 1000):
        demand.came(replace(PREMIUM, promise=Promise(1.0, 1e-5 * k * k)), ASK, 0.0)
    claims: list[Claim] = demand.above(FREE, 10.0)
    assert len(claims) == MOST_CLASSES
