"""Do the profiles give back the figures that they were fitted to?"""

import random

import pytest

from paceline.enginemodel import PROFILES, Load
from paceline.enginemodel.profile import (
    DECODE_CONTEXT,
    DECODE_STREAMS,
    FIGURES_MS,
    PREFILL_TOKENS,
    kv_capacity_tokens,
)

TOLERANCE = 0.07


@pytest.mark.parametrize("name", FIGURES_MS)
def test_a_profile_gives_back_the_published_figures(name: str) -> None:
    profile = PROFILES[name]
    prefill_ms, decode_ms = FIGURES_MS[name]
    for tokens, ms in zip(PREFILL_TOKENS, prefill_ms, strict=True):
        load = Load(prefill=tokens, attention=tokens**2 / 2)
        assert profile.step_seconds(load) * 1e3 == pytest.approx(ms, rel=TOLERANCE)
    for streams, step_ms in zip(DECODE_STREAMS, decode_ms, strict=True):
        load = Load(streams=streams, context=streams * DECODE_CONTEXT)
        assert profile.step_seconds(load) * 1e3 == pytest.approx(step_ms, rel=TOLERANCE)


def test_kv_capacity_leaves_room_for_weights_and_activations() -> None:
    # 8B on one 80 GiB GPU: 0.92 * 85.9 GB - 16.1 GB - 2 GB over 128 KiB a token.
    assert kv_capacity_tokens(1, 16.06e9, layers=32, kv_heads=8) == pytest.approx(465_000, rel=0.01)


def test_noise_is_multiplicative_and_centred_on_the_profile() -> None:
    profile, load, rng = PROFILES["h100-llama-8b"], Load(streams=8, context=8000), random.Random(1)
    ratios = sorted(
        profile.step_seconds(load, rng) / profile.step_seconds(load) for _ in range(2001)
    )
    assert ratios[1000] == pytest.approx(1.0, abs=0.005)
    assert ratios[0] > 0.8
    assert ratios[-1] < 1.2
