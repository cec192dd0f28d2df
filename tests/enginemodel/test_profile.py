"""Do the profiles give back the figures that they were fitted to?"""

import random
from collections.abc import Callable
from statistics import fmean, pstdev

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from paceline.enginemodel import PROFILES, Load, Profile
from paceline.enginemodel.profile import (
    DECODE_CONTEXT,
    DECODE_STREAMS,
    FIGURES_MS,
    PREFILL_TOKENS,
    kv_capacity_tokens,
    lognormal_mean_and_worst,
)

TOLERANCE = 0.08
DENSE = sorted(FIGURES_MS.keys() - {"h100-qwen3-30b-a3b"})
STEADY = replace(PROFILES["h100-llama-8b"], noise_sigma=0.0, hiccup_share=0.0)


def check_figures(profile: Profile) -> None:
    prefill_ms, decode_ms = FIGURES_MS[profile.name]
    for tokens, ms in zip(PREFILL_TOKENS, prefill_ms, strict=True):
        load = Load(prefill=tokens, attention=tokens**2 / 2)
        assert profile.step_seconds(load) * 1e3 == pytest.approx(ms, rel=TOLERANCE)
    for streams, step_ms in zip(DECODE_STREAMS, decode_ms, strict=True):
        load = Load(streams=streams, context=streams * DECODE_CONTEXT)
        assert profile.step_seconds(load) * 1e3 == pytest.approx(step_ms, rel=TOLERANCE)


@pytest.mark.parametrize("name", FIGURES_MS)
def test_a_profile_gives_back_the_published_figures(name: str) -> None:
    check_figures(PROFILES[name])


@pytest.mark.parametrize("name", DENSE)
def test_without_its_table_a_dense_model_follows_them_too(name: str) -> None:
    check_figures(replace(PROFILES[name], table=None))


def test_kv_capacity_leaves_room_for_weights_and_activations() -> None:
    # 8B on one 80 GiB GPU: 0.92 * 85.9 GB - 16.1 GB - 2 GB over 128 KiB a token.
    assert kv_capacity_tokens(1, 16.06e9, layers=32, kv_heads=8) == pytest.approx(465_000, rel=0.01)


def test_noise_is_multiplicative_and_centred_on_the_profile() -> None:
    profile, load = replace(STEADY, noise_sigma=0.03), Load(streams=8, context=8000)
    rng = random.Random(1)
    ratios = sorted(
        profile.step_seconds(load, rng) / profile.step_seconds(load) for _ in range(2001)
    )
    assert ratios[1000] == pytest.approx(1.0, abs=0.005)
    assert ratios[0] > 0.8
    assert ratios[-1] < 1.2


def test_a_profile_without_noise_draws_nothing() -> None:
    rng = random.Random(1)
    before = rng.getstate()
    assert STEADY.noise(rng, 7) == (1.0, 1.0)
    assert rng.getstate() == before


@given(st.integers(0, 2**32), st.floats(0.0, 0.5), st.just(0.0) | st.floats(1e-9, 0.2))
def test_of_one_step_the_mean_is_the_worst(seed: int, sigma: float, share: float) -> None:
    profile = replace(STEADY, noise_sigma=sigma, hiccup_share=share)
    mean, worst = profile.noise(random.Random(seed))
    assert mean == pytest.approx(worst)


@given(st.integers(0, 2**32), st.integers(1, 10**6), st.floats(0.0, 0.5))
def test_the_worst_step_is_no_better_than_the_mean(seed: int, steps: int, sigma: float) -> None:
    profile = replace(STEADY, noise_sigma=sigma, hiccup_share=1e-4)
    mean, worst = profile.noise(random.Random(seed), steps)
    assert 0.0 < mean <= worst * (1 + 1e-12)


@pytest.mark.parametrize("extreme", [0.0, 1 - 2**-53])
def test_noise_is_finite_whatever_is_drawn(extreme: float) -> None:
    class Fixed(random.Random):
        def random(self) -> float:
            return extreme

    mean, worst = lognormal_mean_and_worst(0.1, 1000, Fixed())
    assert 0.1 < mean <= worst < 10


@pytest.mark.parametrize("count", [2, 5, 64])
def test_steps_drawn_together_spread_like_steps_drawn_one_by_one(count: int) -> None:
    rng, sigma = random.Random(1), 0.2
    together = [lognormal_mean_and_worst(sigma, count, rng) for _ in range(4000)]
    each = [[rng.lognormvariate(0.0, sigma) for _ in range(count)] for _ in range(4000)]
    one_by_one = [(fmean(steps), max(steps)) for steps in each]
    moments: tuple[Callable[[list[float]], float], ...] = (fmean, pstdev)
    for moment in moments:
        for drawn, expected in zip(
            zip(*together, strict=True), zip(*one_by_one, strict=True), strict=True
        ):
            assert moment(list(drawn)) == pytest.approx(moment(list(expected)), rel=0.06)


@pytest.mark.parametrize("steps", [1, 10, 1000])
def test_hiccups_come_as_often_together_as_one_by_one(steps: int) -> None:
    profile, rng = replace(STEADY, hiccup_share=0.01), random.Random(1)
    drawn = [profile.noise(rng, steps) for _ in range(40_000 // steps)]
    # One in a hundred takes three times as long on average: two more for each hiccup.
    assert fmean(mean for mean, _ in drawn) == pytest.approx(1.02, abs=0.004)
    assert max(worst for _, worst in drawn) < 4.0
    assert min(worst for _, worst in drawn if worst > 1.0) > 2.0
