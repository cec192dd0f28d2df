from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.policy.lengths import (
    FRESH,
    LEAST_SHARE,
    LONGEST,
    MOST_KEYS,
    MOST_TABLES,
    OutputLengths,
    TokensPerByte,
    own_share,
)

ANSWERS = st.lists(st.integers(0, 2 * LONGEST), max_size=30)


@given(
    ANSWERS, st.floats(0, 1), st.floats(0, 1), st.integers(0, 2 * LONGEST), st.integers(1, 10**6)
)
def test_quantiles_are_ordered_and_within_bounds(
    answers: list[int], share: float, other: float, produced: int, max_tokens: int
) -> None:
    lengths = OutputLengths()
    for tokens in answers:
        lengths.learn("m", "t", tokens)
    low, high = sorted((share, other))
    short = lengths.quantile("m", "t", low, produced, max_tokens)
    long = lengths.quantile("m", "t", high, produced, max_tokens)
    assert min(produced, max_tokens) <= short <= long <= max_tokens


@given(ANSWERS, st.floats(0, 1), st.integers(0, 2 * LONGEST), st.integers(0, 1000))
def test_having_produced_more_never_makes_the_expected_answer_shorter(
    answers: list[int], share: float, out: int, more: int
) -> None:
    lengths = OutputLengths()
    for tokens in answers:
        lengths.learn("m", "t", tokens)
    now, later = (lengths.quantile("m", "t", share, produced) for produced in (out, out + more))
    assert now <= later * (1 + 1e-9)


def test_quantiles_of_a_tenant_approach_its_own_answers() -> None:
    lengths, rng = OutputLengths(), np.random.default_rng(1)
    answers = rng.lognormal(np.log(300), 0.5, 3000).astype(int)
    for tokens in answers:
        lengths.learn("m", "t", int(tokens))
    for share in (0.25, 0.5, 0.75, 0.9):
        learned = lengths.quantile("m", "t", share)
        assert learned == pytest.approx(np.quantile(answers, share), rel=0.15)


def test_a_new_tenant_is_expected_to_be_like_the_others_of_its_model() -> None:
    lengths = OutputLengths()
    for _ in range(200):
        lengths.learn("m", "old", 2000)
    assert lengths.quantile("m", "new", 0.5) == pytest.approx(2000, rel=0.2)
    assert lengths.quantile("other model", "new", 0.5) < 500
    for _ in range(50):
        lengths.learn("m", "new", 20)
    assert lengths.quantile("m", "new", 0.5) < 40


def test_a_tenant_that_changes_its_ways_is_followed() -> None:
    lengths = OutputLengths()
    for tokens in [1000] * 500 + [50] * 500:
        lengths.learn("m", "t", tokens)
    assert lengths.quantile("m", "t", 0.75) < 70


def test_tenants_without_number_take_bounded_memory() -> None:
    lengths = OutputLengths()
    for i in range(MOST_KEYS + 100):
        lengths.learn("m", f"t{i}", 10)
    assert len(lengths._seen) <= MOST_KEYS
    assert ("m", "") in lengths._seen


@given(
    ANSWERS,
    st.integers(0, 2 * LONGEST),
    st.floats(0, 1),
    st.one_of(st.none(), st.integers(1, 4096)),
)
def test_what_is_left_is_what_the_quantile_leaves(
    answers: list[int], produced: int, share: float, max_tokens: int | None
) -> None:
    lengths = OutputLengths()
    for tokens in answers:
        lengths.learn("m", "t", tokens)
    left = lengths.left("m", "t", float(produced), max_tokens, share)
    total = lengths.quantile("m", "t", share, produced, max_tokens)
    assert left == pytest.approx(max(total - produced, 0.0), abs=1e-6 * max(produced, 1))


@given(st.floats(0, 10**6), st.integers(1, 4096))
def test_no_more_is_to_come_than_was_asked_for(produced: float, max_tokens: int) -> None:
    left = OutputLengths().left("m", "t", produced, max_tokens)
    assert 0.0 <= left <= max(max_tokens - produced, 0.0)


def test_a_stream_that_goes_on_for_long_is_expected_to_go_on() -> None:
    lengths = OutputLengths()
    for tokens in [100] * 50 + [2000] * 50:
        lengths.learn("m", "t", tokens)
    assert lengths.left("m", "t", 10.0, None, 0.3) == pytest.approx(90, abs=20)
    assert lengths.left("m", "t", 500.0, None, 0.3) == pytest.approx(1500, abs=400)


def test_what_is_left_follows_the_answers_within_a_few_of_them() -> None:
    lengths = OutputLengths()
    before = lengths.left("m", "t", 0.0)
    lengths.learn("m", "t", 10_000)
    assert lengths.left("m", "t", 0.0) > before
    for tokens in [50] * (200 + FRESH):
        lengths.learn("m", "t", tokens)
    assert lengths.left("m", "t", 0.0) < 100.0


def test_what_is_left_of_a_new_tenant_is_what_its_model_says() -> None:
    lengths = OutputLengths()
    for tokens in [3000] * 50:
        lengths.learn("m", "old", tokens)
    assert lengths.left("m", "new", 10.0) == lengths.left("m", "", 10.0)
    assert list(lengths._upto) == [("m", "")]


def test_upto_take_bounded_memory() -> None:
    lengths = OutputLengths()
    for i in range(MOST_TABLES + 10):
        lengths.learn("m", f"t{i}", 10)
        lengths.left("m", f"t{i}", 5.0)
    assert len(lengths._upto) <= MOST_TABLES


def test_streams_are_taken_for_quantiles_spread_evenly() -> None:
    shares = sorted(own_share(i) for i in range(100))
    even = LEAST_SHARE + (1.0 - LEAST_SHARE) * np.arange(100) / 100
    assert shares == pytest.approx(even.tolist(), abs=0.02)


def test_tokens_per_byte_follow_what_engines_count() -> None:
    ratio = TokensPerByte()
    assert ratio.tokens("m", 1000) == pytest.approx(250)
    for _ in range(200):
        ratio.learn("m", 1000, 500)
    assert ratio.tokens("m", 2000) == pytest.approx(1000, rel=0.05)
    assert ratio.tokens("another", 1000) == pytest.approx(250)
