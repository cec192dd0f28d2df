"""Quotas: what a tenant may use, in virtual time."""

import contextlib
import re
from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.domain.outcome import Outcome
from paceline.domain.promise import ANONYMOUS, Promise, Tenant
from paceline.domain.request import Request
from paceline.gateway.quota import Bucket, OverQuota, Quotas, duration


def tenant(
    name: str = "acme",
    *,
    max_streams: int | None = None,
    tokens_per_minute: int | None = None,
    requests_per_minute: int | None = None,
) -> Tenant:
    return Tenant(name, "standard", b"", max_streams, tokens_per_minute, requests_per_minute)


def request(name: str = "acme", prompt_tokens: int | None = 1, prompt_bytes: int = 0) -> Request:
    return Request(
        "r",
        "m",
        name,
        "standard",
        Promise(),
        prompt_tokens=prompt_tokens,
        prompt_bytes=prompt_bytes,
    )


def outcome(
    of: Request,
    prompt_tokens: int | None = None,
    output_tokens: int = 0,
    status: int = 200,
    worker: str = "w",
) -> Outcome:
    return Outcome(
        request=of,
        worker=worker,
        status=status,
        error="",
        attempts=1,
        because="",
        predicted=None,
        queued_s=0.0,
        ttft_s=0.0,
        itl_s=0.0,
        stall_s=0.0,
        seconds=0.0,
        prompt_tokens=prompt_tokens,
        cached_tokens=None,
        output_tokens=output_tokens,
    )


def refusal(quotas: Quotas, now: float, of: Request | None = None) -> OverQuota:
    with pytest.raises(OverQuota) as caught:
        quotas.admit(of or request(), now)
    return caught.value


def retry_after_s(error: OverQuota) -> int:
    return int(dict(error.headers())["Retry-After"])


# Requests a minute


def test_a_minutes_worth_may_come_at_once_and_then_one_at_a_time() -> None:
    quotas = Quotas([tenant(requests_per_minute=60)])
    for _ in range(60):
        quotas.admit(request(), 100.0)
    assert retry_after_s(refusal(quotas, 100.0)) == 1
    quotas.admit(request(), 101.0)
    refusal(quotas, 101.5)
    quotas.admit(request(), 102.0)


def test_who_comes_back_when_told_is_let_in() -> None:
    quotas = Quotas([tenant(requests_per_minute=7)])
    now = 1e6 + 0.1
    for _ in range(7):
        quotas.admit(request(), now)
    error = refusal(quotas, now)
    assert error.retry_after_s == pytest.approx(60 / 7)
    quotas.admit(request(), now + error.retry_after_s)
    refusal(quotas, now + error.retry_after_s)


def test_a_refused_request_uses_nothing() -> None:
    quotas = Quotas([tenant(requests_per_minute=1, tokens_per_minute=600, max_streams=1)])
    quotas.admit(request(prompt_tokens=600), 0.0)
    quotas.ended(outcome(request(prompt_tokens=600), 600), 0.0)
    for now in range(1, 60):
        refusal(quotas, float(now))
    quotas.admit(request(prompt_tokens=600), 60.0)


def test_the_limit_that_lasts_longest_says_when_to_come_back() -> None:
    quotas = Quotas([tenant(requests_per_minute=60, tokens_per_minute=60)])
    for _ in range(60):
        quotas.admit(request(), 0.0)
    error = refusal(quotas, 0.0, request(prompt_tokens=30))
    assert (error.code, error.retry_after_s) == ("tokens_per_minute", 30.0)
    assert error.message == (
        "more than 60 tokens in a minute (tokens_per_minute): try again in 30s"
    )


amounts = st.lists(st.tuples(st.floats(0, 30), st.integers(1, 50)), min_size=1, max_size=80)


@given(st.integers(1, 200), amounts)
def test_no_span_of_time_ever_holds_more_than_its_share_and_a_minutes_worth(
    per_minute: int, asked: list[tuple[float, int]]
) -> None:
    quotas = Quotas([tenant(requests_per_minute=per_minute, tokens_per_minute=10 * per_minute)])
    now, let_in = 0.0, []
    for pause_s, tokens in asked:
        now += pause_s
        for _ in range(tokens):
            with contextlib.suppress(OverQuota):
                size = min(tokens, 10 * per_minute)
                quotas.admit(request(prompt_tokens=size), now)
                let_in.append((now, size))
    for i, (start, _) in enumerate(let_in):
        count = size = 0
        for at, tokens in let_in[i:]:
            count, size = count + 1, size + tokens
            most = per_minute * (1 + (at - start) / 60) + 1e-3
            assert count <= most
            assert size <= 10 * most


@given(st.floats(0.1, 1e4), st.lists(st.tuples(st.floats(0, 100), st.floats(-1e4, 1e4))))
def test_a_bucket_never_holds_more_than_a_minutes_worth(
    per_minute: float, taken: list[tuple[float, float]]
) -> None:
    bucket, now = Bucket(per_minute), 0.0
    for pause_s, amount in taken:
        now += pause_s
        bucket.take(amount, now)
        assert bucket.level(now) <= bucket.size
        wait_s = bucket.wait_s(1.0, now)
        assert bucket.wait_s(1.0, now + wait_s) == pytest.approx(0.0, abs=1e-5)


# Tokens a minute


def test_a_prompt_is_estimated_and_the_difference_settled_at_the_end() -> None:
    quotas = Quotas([tenant(tokens_per_minute=1000)])
    asked = request(prompt_tokens=None, prompt_bytes=2000)
    quotas.admit(asked, 0.0)
    assert quotas.usage(0.0)[0].left == {"tokens": 500}
    quotas.ended(outcome(asked, prompt_tokens=300, output_tokens=100), 0.0)
    assert quotas.usage(0.0)[0].left == {"tokens": 600}


def test_an_answer_longer_than_the_minute_is_paid_back_before_the_next_request() -> None:
    quotas = Quotas([tenant(tokens_per_minute=600)])
    quotas.admit(request(), 0.0)
    quotas.ended(outcome(request(), prompt_tokens=1, output_tokens=1799), 0.0)
    assert quotas.usage(0.0)[0].left == {"tokens": -1200}
    error = refusal(quotas, 0.0)
    assert dict(error.headers())["x-ratelimit-remaining-tokens"] == "0"
    assert error.retry_after_s == pytest.approx(120.1)
    quotas.admit(request(), 120.1)


def test_a_prompt_larger_than_the_minute_waits_for_all_of_it_and_is_not_refused_for_ever() -> None:
    quotas = Quotas([tenant(tokens_per_minute=600)])
    quotas.admit(request(prompt_tokens=60), 0.0)
    error = refusal(quotas, 0.0, request(prompt_tokens=10_000))
    assert error.retry_after_s == pytest.approx(6.0)
    quotas.admit(request(prompt_tokens=10_000), 6.0)
    assert refusal(quotas, 6.0).retry_after_s == pytest.approx((10_000 - 600 + 1) / 10)


@pytest.mark.parametrize(
    ("status", "worker", "charged"),
    [
        (502, "w", 0),  # every attempt failed
        (503, "", 0),  # no worker was there
        (429, "", 0),  # shed
        (400, "w", 0),  # the engine refused
        (499, "", 0),  # the client left while it waited
        (499, "w", 100),  # the client left while its prompt was read
        (200, "w", 107),  # it broke within its answer
    ],
)
def test_what_no_engine_answered_is_free(status: int, worker: str, charged: int) -> None:
    quotas = Quotas([tenant(tokens_per_minute=1000)])
    asked = request(prompt_tokens=100)
    quotas.admit(asked, 0.0)
    output = 7 if status == 200 else 0
    quotas.ended(outcome(asked, None, output, status, worker), 0.0)
    assert quotas.usage(0.0)[0].left == {"tokens": 1000 - charged}
    assert quotas.usage(0.0)[0].streams == 0


# Requests at once


def test_no_more_requests_are_under_way_than_there_may_be_and_a_place_comes_back() -> None:
    quotas = Quotas([tenant(max_streams=2)])
    quotas.admit(request(), 0.0)
    quotas.admit(request(), 0.0)
    error = refusal(quotas, 0.0)
    assert (error.status, error.code, retry_after_s(error)) == (429, "max_streams", 1)
    quotas.ended(outcome(request(), status=502), 0.5)
    quotas.admit(request(), 0.5)
    refusal(quotas, 1e6)
    assert quotas.usage(0.0)[0].refused == 2


@given(st.integers(1, 5), st.lists(st.booleans(), max_size=60))
def test_places_are_neither_lost_nor_made(most: int, asks: list[bool]) -> None:
    quotas, under_way = Quotas([tenant(max_streams=most)]), 0
    for ask in asks:
        if ask and under_way < most:
            quotas.admit(request(), 0.0)
            under_way += 1
        elif ask:
            refusal(quotas, 0.0)
        elif under_way:
            quotas.ended(outcome(request()), 0.0)
            under_way -= 1
        assert quotas.usage(0.0)[0].streams == under_way


# Who is meant


def test_all_keys_of_a_tenant_draw_on_one_account() -> None:
    keys = [Tenant("acme", "standard", bytes([i]), requests_per_minute=1) for i in (1, 2)]
    quotas = Quotas(keys)
    quotas.admit(request(), 0.0)
    refusal(quotas, 0.0)
    assert len(quotas.usage(0.0)) == 1


def test_tenants_do_not_feel_each_others_limits() -> None:
    quotas = Quotas([tenant(requests_per_minute=1), tenant("bolt", requests_per_minute=1)])
    quotas.admit(request(), 0.0)
    quotas.admit(request("bolt"), 0.0)


def test_who_has_no_account_has_no_limits() -> None:
    quotas = Quotas([tenant(max_streams=1)])
    for _ in range(10):
        assert quotas.admit(request(ANONYMOUS), 0.0) == ()
    quotas.ended(outcome(request(ANONYMOUS)), 0.0)


def test_each_of_several_gateways_grants_an_equal_part() -> None:
    quotas = Quotas([tenant(max_streams=8, requests_per_minute=120)], shared_by=4)
    assert dict(quotas.admit(request(), 0.0))["x-ratelimit-limit-requests"] == "30"
    quotas.admit(request(), 0.0)
    assert refusal(quotas, 0.0).code == "max_streams"


def test_however_small_its_part_a_gateway_can_let_a_request_in() -> None:
    quotas = Quotas([tenant(max_streams=1, requests_per_minute=2)], shared_by=4)
    quotas.admit(request(), 0.0)
    quotas.ended(outcome(request()), 0.0)
    assert refusal(quotas, 0.0).retry_after_s == pytest.approx(120.0)
    quotas.admit(request(), 120.0)


# Reload


def test_a_reload_keeps_what_was_used() -> None:
    quotas = Quotas([tenant(max_streams=1, requests_per_minute=4)])
    quotas.admit(request(), 0.0)
    quotas.reload([tenant(max_streams=1, requests_per_minute=4)])
    assert refusal(quotas, 0.0).code == "max_streams"
    assert quotas.usage(0.0)[0].left == {"requests": 3}


def test_of_another_limit_the_same_share_is_left() -> None:
    quotas = Quotas([tenant(requests_per_minute=4)])
    quotas.admit(request(), 0.0)
    quotas.reload([tenant(requests_per_minute=400)])
    assert quotas.usage(0.0)[0].left == {"requests": 300}
    quotas.reload([tenant(requests_per_minute=4)])
    assert quotas.usage(0.0)[0].left == {"requests": 3}


def test_a_new_limit_counts_the_requests_that_are_under_way_already() -> None:
    quotas = Quotas([tenant()])
    quotas.admit(request(), 0.0)
    quotas.reload([tenant(max_streams=1)])
    refusal(quotas, 0.0)
    quotas.reload([tenant()])
    quotas.admit(request(), 0.0)


def test_a_tenant_that_goes_and_comes_back_still_has_its_requests_under_way() -> None:
    quotas = Quotas([tenant(max_streams=1)])
    quotas.admit(request(), 0.0)
    quotas.reload([])
    quotas.reload([tenant(max_streams=1)])
    refusal(quotas, 0.0)
    quotas.ended(outcome(request()), 0.0)
    quotas.admit(request(), 0.0)
    quotas.ended(outcome(request()), 0.0)


def test_a_tenant_that_is_gone_is_forgotten() -> None:
    quotas = Quotas([tenant(max_streams=1)])
    quotas.admit(request(), 0.0)
    quotas.reload([])
    quotas.ended(outcome(request()), 0.0)
    quotas.reload([])
    assert quotas.usage(0.0) == []


# Headers


def test_rate_headers_are_openais() -> None:
    quotas = Quotas([tenant(requests_per_minute=60, tokens_per_minute=600)])
    assert dict(quotas.admit(request(prompt_tokens=3), 5.0)) == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "1s",
        "x-ratelimit-limit-tokens": "600",
        "x-ratelimit-remaining-tokens": "597",
        "x-ratelimit-reset-tokens": "300ms",
    }


def test_only_limits_that_are_set_are_told() -> None:
    quotas = Quotas([tenant(requests_per_minute=60), tenant("bolt", max_streams=1)])
    assert [name for name, _ in quotas.admit(request(), 0.0)] == [
        f"x-ratelimit-{word}-requests" for word in ("limit", "remaining", "reset")
    ]
    assert quotas.admit(request("bolt"), 0.0) == ()


@pytest.mark.parametrize(
    ("seconds", "written"),
    [
        (-1.0, "0s"),
        (0.0, "0s"),
        (0.02, "20ms"),
        (0.0001, "1ms"),
        (0.9995, "1s"),
        (1.0, "1s"),
        (1.2, "2s"),
        (59.5, "1m0s"),
        (360.0, "6m0s"),
        (3661.0, "1h1m1s"),
    ],
)
def test_times_are_written_as_openai_does(seconds: float, written: str) -> None:
    assert duration(seconds) == written


@given(st.floats(0, 1e6))
def test_a_written_time_is_never_too_short_and_less_than_a_second_too_long(seconds: float) -> None:
    units = {"h": 3600, "m": 60, "s": 1, "ms": 0.001}
    found = re.findall(r"(\d+)(ms|h|m|s)", duration(seconds))
    read = sum(int(number) * units[unit] for number, unit in found)
    assert seconds - 1e-5 <= read <= ceil(seconds) + 1e-9
