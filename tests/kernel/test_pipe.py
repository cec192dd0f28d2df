"""The product of bandwidth and delay, by what first tokens show."""

import pytest

from paceline.kernel.pipe import Pipe
from paceline.policy.admit import FULL_PIPE

RATE = 10_000.0


def seen(pipe: Pipe, delay_s: float, ahead: float, prompts: int = 1, tokens: float = 500.0) -> None:
    """Prompts to an engine that takes them in order, each behind so many tokens of others."""
    for _ in range(prompts):
        pipe.through(tokens, ahead, delay_s + (ahead + tokens) / RATE)


def test_before_the_first_token_nothing_is_known() -> None:
    assert Pipe().delay_s == 0.0


def test_an_engine_nearby_needs_nothing_under_way() -> None:
    pipe = Pipe()
    seen(pipe, 0.0, ahead=0.0)
    seen(pipe, 0.0, ahead=4000.0, prompts=50)
    assert pipe.delay_s == pytest.approx(0.0, abs=1e-6)


def test_waiting_for_others_does_not_make_a_worker_seem_far_away() -> None:
    """Else one that is overloaded would be sent ever more."""
    pipe = Pipe()
    seen(pipe, 0.01, ahead=0.0)
    seen(pipe, 0.01, ahead=50_000.0, prompts=500)
    assert pipe.delay_s <= 0.011 + 500.0 / RATE


def test_what_may_be_under_way_grows_until_a_far_worker_is_busy_most_of_the_time() -> None:
    delay_s, rate, pipe, limit = 0.5, 50_000.0, Pipe(), 2000.0
    for _ in range(20):
        for k in range(int(limit // 250)):
            pipe.through(250.0, 250.0 * k, delay_s + 250.0 * (k + 1) / rate)
        limit = max(2000.0, FULL_PIPE * pipe.rate * pipe.delay_s)
    assert 1.5 * delay_s * rate < limit < FULL_PIPE * delay_s * rate


def test_a_delay_that_grows_is_believed_slowly_and_one_that_shrinks_at_once() -> None:
    pipe = Pipe()
    seen(pipe, 0.1, ahead=5000.0)
    seen(pipe, 0.1, ahead=0.0, prompts=20)
    before = pipe.delay_s
    seen(pipe, 1.0, ahead=0.0)
    assert before * 0.9 < pipe.delay_s < 1.5 * before
    seen(pipe, 0.02, ahead=0.0)
    assert pipe.delay_s < 0.5 * before


def test_prompts_that_were_cached_after_all_do_not_make_a_worker_seem_far_away() -> None:
    pipe = Pipe()
    seen(pipe, 0.01, ahead=0.0, prompts=20)
    for _ in range(20):
        pipe.through(8000.0, 0.0, 0.02)
        seen(pipe, 0.01, ahead=0.0, prompts=5)
    assert pipe.delay_s == 0.0


def test_no_time_at_all_says_nothing() -> None:
    pipe = Pipe()
    pipe.through(500.0, 0.0, 0.0)
    assert pipe.delay_s == 0.0
