"""Was a request's promise kept?"""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from paceline.domain.outcome import Outcome
from paceline.domain.promise import Promise
from paceline.domain.request import Request

ASKED = Request("r", "m", "t", "premium", Promise(ttft_s=0.5, itl_s=0.04), deadline_s=10.0)
GOOD = Outcome(
    request=ASKED,
    worker="w",
    status=200,
    error="",
    attempts=1,
    because="",
    predicted=None,
    queued_s=0.0,
    ttft_s=0.4,
    itl_s=0.03,
    stall_s=0.1,
    seconds=9.0,
    prompt_tokens=10,
    cached_tokens=0,
    output_tokens=100,
)


def test_a_promise_is_kept_if_all_of_it_is() -> None:
    assert GOOD.kept


@pytest.mark.parametrize(
    "changed",
    [{"ttft_s": 0.6}, {"itl_s": 0.05}, {"seconds": 10.1}, {"status": 429}, {"error": "it broke"}],
    ids=str,
)
def test_one_part_that_is_missed_breaks_it(changed: dict[str, object]) -> None:
    assert not replace(GOOD, **changed).kept


def test_a_degraded_request_is_measured_by_what_it_was_promised_at_first() -> None:
    relaxed = replace(ASKED, tier="standard", promise=Promise(ttft_s=5.0))
    degraded = replace(GOOD, degraded_to=relaxed)
    assert degraded.kept
    assert not replace(degraded, ttft_s=0.6).kept
