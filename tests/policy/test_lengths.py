from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.policy.lengths import LONGEST, MOST_KEYS, OutputLengths, TokensPerByte

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


def test_tokens_per_byte_follow_what_engines_count() -> None:
    ratio = TokensPerByte()
    assert ratio.tokens("m", 1000) == pytest.approx(250)
    for _ in range(200):
        ratio.learn("m", 1000, 500)
    assert ratio.tokens("m", 2000) == pytest.approx(1000, rel=0.05)
    assert ratio.tokens("another", 1000) == pytest.approx(250)
