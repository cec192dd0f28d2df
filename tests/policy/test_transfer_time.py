"""Is a link's speed found from what decode legs take, and does it bear what is not of the link?"""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.policy.links import LEAST_SEEN, PRIOR_S, PRIOR_TOKEN_S, TransferTime

STEP_S = 0.02


def learned(
    token_s: float, count: int = 100, latency_s: float = 0.002, odd: float = 0.0
) -> TransferTime:
    """A link of this speed, of which so many transfers were seen; a share took far longer."""
    rng, link = Random(1), TransferTime()
    for _ in range(count):
        tokens = rng.lognormvariate(7.5, 0.8)
        seconds = latency_s + token_s * tokens + STEP_S * (rng.random() - 0.5)
        if rng.random() < odd:
            seconds += 2.0
        link.observe(tokens, seconds, STEP_S)
    return link


@pytest.mark.parametrize("token_s", [6.5e-6, 65e-6, 650e-6])
@pytest.mark.parametrize("odd", [0.0, 0.1])
def test_the_speed_of_a_link_is_learned(token_s: float, odd: float) -> None:
    link = learned(token_s, odd=odd)
    assert link.expected_s(4000) == pytest.approx(0.002 + token_s * 4000, rel=0.3)


def test_nothing_seen_means_the_prior() -> None:
    assert TransferTime().expected_s(1000) == PRIOR_S + 1000 * PRIOR_TOKEN_S


def test_a_link_that_becomes_slow_is_noticed() -> None:
    link, slow = learned(10e-6), 100e-6
    for _ in range(16):
        link.observe(2000, 2000 * slow, STEP_S)
    assert link.expected_s(2000) == pytest.approx(2000 * slow, rel=0.25)


@given(
    st.lists(st.tuples(st.floats(1, 1e6), st.floats(-10, 100), st.floats(1e-4, 10)), max_size=40)
)
def test_no_transfer_is_ever_expected_to_take_less_than_nothing(
    seen: list[tuple[float, float, float]],
) -> None:
    link = TransferTime()
    for tokens, seconds, beside_s in seen:
        link.observe(tokens, seconds, beside_s)
    assert link.latency_s >= 0.0
    assert link.token_s >= 0.0


def test_what_is_on_a_link_comes_first() -> None:
    link = learned(100e-6)
    alone_s = link.through_s(0.0, 1000, 0.0)
    link.awaits("a", 5000)
    assert link.fetch_s(1000, 0.0) == pytest.approx(alone_s)
    link.carries("a", 5000, 1.0)
    assert link.fetch_s(1000, 0.0) == pytest.approx(alone_s + 5000 * link.token_s)
    assert link.through_s(0.1, 1000, 0.0) == pytest.approx(alone_s + 5000 * link.token_s)
    assert link.through_s(2.0, 1000, 0.0) == pytest.approx(alone_s + 2.0)
    link.forget("a")
    assert link.through_s(0.0, 1000, 0.0) == alone_s


def test_a_link_is_open_as_long_as_it_would_have_nothing_to_carry() -> None:
    link = learned(100e-6)
    link.carries("a", 5000, 1.0)
    assert link.is_open(0.6, 1000, 0.0)
    assert not link.is_open(0.1, 1000, 0.0)


def test_an_unknown_link_is_tried_with_one_prompt_at_a_time() -> None:
    link = TransferTime()
    for _ in range(LEAST_SEEN):
        assert link.is_open(0.1, 1000, 0.0)
        link.awaits("a", 1000)
        assert not link.is_open(0.1, 1000, 0.0)
        link.forget("a")
        link.observe(1000, 0.05, STEP_S)
    link.awaits("a", 1000)
    assert link.is_open(0.1, 1000, 0.0)
    assert TransferTime(learns=False).is_open(0.1, 1000, 0.0)


def test_a_link_is_known_to_be_slow_before_what_is_late_has_come() -> None:
    link = learned(10e-6)
    link.carries("a", 1000, 1.0)
    in_time_s = link.fetch_s(1000, 1.0)
    assert link.fetch_s(1000, 3.0) == pytest.approx(in_time_s + 2.0)
    assert link.is_open(0.1, 1000, 1.0)
    assert not link.is_open(0.1, 1000, 3.0)
