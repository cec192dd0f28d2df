from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.policy.predict import StepTimes, itl_s, stall_s, ttft_s
from paceline.policy.steptime import Load, Q, StepModel, StepModels

MODEL = StepModel()
TOKENS = st.floats(0, 5000)


def ttft(
    model: StepTimes[Q] = MODEL,  # type: ignore[assignment]
    streams: Q | float = 16.0,
    kv: Q | float = 16_000.0,
    ahead: Q | float = 0.0,
    own: Q | float = 500.0,
    context: Q | float = 0.0,
    gap_s: Q | float = 0.0,
) -> Q:
    return ttft_s(model, streams, kv, ahead, own, context, 2048.0, 0.002, gap_s)


def test_without_prefill_the_itl_is_a_plain_step() -> None:
    assert itl_s(MODEL, 32, 32_000, 0) == pytest.approx(MODEL.expected_s(Load(32, 0, 32_000)))


def test_prefill_for_half_the_time_doubles_the_itl() -> None:
    base_s = MODEL.expected_s(Load(32, 0, 32_000))
    token_s = (MODEL.expected_s(Load(32, 512, 32_000, 512**2 / 2)) - base_s) / 512
    assert itl_s(MODEL, 32, 32_000, 0.5 / token_s) == pytest.approx(2 * base_s)


@given(st.floats(1, 200), st.floats(0, 200), TOKENS, TOKENS, st.floats(0, 1e6), st.floats(0, 1e6))
def test_itl_and_stall_never_fall_with_load(
    streams: float, more_streams: float, kv: float, more_kv: float, rate: float, more_rate: float
) -> None:
    light = itl_s(MODEL, streams, kv, rate)
    assert 0 < light <= itl_s(MODEL, streams, kv + more_kv, rate + more_rate) * (1 + 1e-9)
    assert stall_s(MODEL, streams, kv, 2048) <= stall_s(MODEL, streams, kv + more_kv, 2048)
    assert stall_s(MODEL, streams, kv, 2048) >= MODEL.expected_s(Load(streams, 0, kv))


@given(TOKENS, TOKENS, TOKENS, TOKENS, st.floats(1, 200))
def test_ttft_never_falls_with_what_is_ahead_or_own(
    ahead: float, more_ahead: float, own: float, more_own: float, streams: float
) -> None:
    less = ttft(streams=streams, ahead=ahead, own=own)
    assert less <= ttft(streams=streams, ahead=ahead + more_ahead, own=own) * (1 + 1e-9)
    assert less <= ttft(streams=streams, ahead=ahead, own=own + more_own) * (1 + 1e-9)


def test_a_prompt_on_an_idle_worker_waits_for_its_own_prefill_only() -> None:
    expected = 0.002 + MODEL.expected_s(Load(0, 500, 0, 125_000))
    assert ttft(streams=0.0, kv=0.0) == pytest.approx(expected)


def test_a_prompt_beyond_the_budget_takes_more_steps() -> None:
    room = 2048 - 16
    full = MODEL.expected_s(Load(16, room, 16_000))
    attention_s = MODEL.theta[-1] * (3 * room) ** 2 / 2
    step_s = MODEL.expected_s(Load(16, 0, 16_000))
    assert ttft(own=3.0 * room) == pytest.approx(0.002 + step_s + 3 * full + attention_s)


def test_an_open_gap_within_a_usual_step_is_no_news_and_a_long_one_is() -> None:
    step_s = MODEL.expected_s(Load(16, 0, 16_000))
    assert ttft(gap_s=step_s / 2) < ttft(gap_s=0.0)
    assert ttft(gap_s=30 * step_s) > 10 * ttft(gap_s=0.0)


def test_a_prefill_under_way_explains_an_open_gap() -> None:
    model, gap_s = MODEL, 0.03
    alone = ttft(model, gap_s=gap_s) / ttft(model)
    behind = ttft(model, ahead=2000.0, gap_s=gap_s) / ttft(model, ahead=2000.0)
    assert behind < alone


def test_many_workers_at_once_are_predicted_like_each_alone() -> None:
    models = [StepModel(slowdown=1 + i / 3, p99=1 + i / 5) for i in range(5)]
    streams, kv = np.arange(5.0) * 20, np.arange(5.0) * 20_000
    ahead, gap_s = np.arange(5.0) * 700, np.arange(5.0) / 50
    fleet = StepModels(models)
    together = ttft(fleet, streams, kv, ahead, 900.0, 100.0, gap_s)
    alone = [
        ttft(m, n, c, w, 900.0, 100.0, g)
        for m, n, c, w, g in zip(models, streams, kv, ahead, gap_s, strict=True)
    ]
    np.testing.assert_allclose(together, alone)
    rates = np.arange(5.0) * 1000
    itls = [itl_s(m, n, c, r) for m, n, c, r in zip(models, streams, kv, rates, strict=True)]
    np.testing.assert_allclose(itl_s(fleet, streams, kv, rates), itls)
    stalls = [stall_s(m, n, c, 2048.0) for m, n, c in zip(models, streams, kv, strict=True)]
    np.testing.assert_allclose(stall_s(fleet, streams, kv, 2048.0), stalls)
