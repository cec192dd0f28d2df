from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_engine import Truth, dense, mixture_of_experts

from paceline.policy.steptime import (
    ROOFLINE,
    Load,
    StepModel,
    StepTimeEstimator,
    features,
    nonnegative,
    pool_prior,
)

LOADS = st.builds(
    lambda n, p, context, q: Load(n, p, n * context, q),
    st.integers(0, 300).map(float),
    st.one_of(st.just(0.0), st.floats(1, 4000)),
    st.floats(0, 8000),
    st.floats(0, 1e7),
)
TRUTHS = {"dense": dense, "mixture of experts": mixture_of_experts}


def some_loads(rng: np.random.Generator, count: int, prefill_share: float = 0.15) -> list[Load]:
    """A wandering number of streams, with a prompt in some steps."""
    loads, streams = [], 1
    for i in range(count):
        streams = int(np.clip(streams + rng.integers(-3, 4), 1, 200))
        kv = streams * (700 + 400 * np.sin(i / 100))
        p = float(rng.integers(30, 1800)) if rng.random() < prefill_share else 0.0
        loads.append(Load(streams, p, kv, p * p / 2))
    return loads


def taught(
    truth: Truth = dense, count: int = 600, noise: float = 0.02, seed: int = 1
) -> StepTimeEstimator:
    rng = np.random.default_rng(seed)
    estimator = StepTimeEstimator()
    for load in some_loads(rng, count):
        estimator.observe(load, truth(load) * rng.lognormal(0, noise))
    return estimator


STEADY = Load(40, 0, 28_000, 0)
LONG_PROMPT = Load(40, 1500, 28_000, 1_125_000)


@given(st.lists(st.tuples(LOADS, st.floats(1e-4, 10)), max_size=40), LOADS, LOADS)
@settings(max_examples=60, deadline=None)
def test_more_work_never_takes_less_time_whatever_was_observed(
    observed: list[tuple[Load, float]], load: Load, more: Load
) -> None:
    estimator = StepTimeEstimator()
    for seen, seconds in observed:
        estimator.observe(seen, seconds)
    model = estimator.model()
    assert min(model.theta) >= 0
    for name in ("streams", "prefill", "kv", "q"):
        grown = msgspec.structs.replace(load, **{name: getattr(load, name) + getattr(more, name)})
        assert 0 <= model.expected_s(load) <= model.expected_s(grown) * (1 + 1e-12)
    assert estimator.expected_s(load) == pytest.approx(model.expected_s(load))


@given(st.integers(1, 10), st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_nonnegative_least_squares_meets_the_optimality_conditions(size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(size + 5, size)), rng.normal(size=size + 5)
    gram, target = a.T @ a, a.T @ b
    x = nonnegative(gram, target, np.maximum(rng.normal(size=size), 0))
    slope = gram @ x - target
    assert (x >= 0).all()
    np.testing.assert_allclose(slope[x > 0], 0, atol=1e-7)
    assert (slope[x == 0] >= -1e-7).all()


@pytest.mark.parametrize("name", TRUTHS)
def test_step_times_are_learned_within_a_few_percent(name: str) -> None:
    truth = TRUTHS[name]
    estimator = taught(truth)
    unseen = some_loads(np.random.default_rng(7), 300)
    normal = msgspec.structs.replace(estimator.model(), slowdown=1.0)
    errors = [abs(normal.expected_s(load) / truth(load) - 1) for load in unseen]
    assert np.median(errors) < 0.02
    assert np.quantile(errors, 0.95) < 0.06


@pytest.mark.parametrize("name", TRUTHS)
def test_fifty_steps_are_enough_for_ten_percent(name: str) -> None:
    truth = TRUTHS[name]
    estimator = taught(truth, count=50)
    ahead = some_loads(np.random.default_rng(1), 100)[50:]
    assert np.median([abs(estimator.expected_s(x) / truth(x) - 1) for x in ahead]) < 0.1


@pytest.mark.parametrize("name", TRUTHS)
@pytest.mark.parametrize("noise", [0.0, 0.02, 0.08])
def test_a_threefold_slowdown_is_noticed_within_five_tokens_and_so_is_its_end(
    name: str, noise: float
) -> None:
    truth, rng = TRUTHS[name], np.random.default_rng(5)
    estimator = taught(truth, noise=noise)
    for _ in range(5):
        estimator.observe(STEADY, 3 * truth(STEADY) * rng.lognormal(0, noise))
    assert estimator.slowdown > 2.2
    for _ in range(5):
        estimator.observe(STEADY, truth(STEADY) * rng.lognormal(0, noise))
    assert estimator.slowdown < 1.5


def test_a_slowdown_that_passes_teaches_nothing_about_load() -> None:
    estimator = taught()
    before = estimator.model()
    for factor in (3.0, 1.0):
        for _ in range(200):
            estimator.observe(STEADY, factor * dense(STEADY))
    after = estimator.model()
    for load in (STEADY, LONG_PROMPT):
        assert after.expected_s(load) == pytest.approx(before.expected_s(load), rel=0.05)


@pytest.mark.parametrize("factor", [0.4, 0.9, 1.12, 2.5])
def test_a_change_that_stays_ends_in_the_coefficients_also_for_rare_loads(factor: float) -> None:
    estimator = taught()
    rng = np.random.default_rng(3)
    for load in some_loads(rng, 8000, prefill_share=0.0):
        estimator.observe(load, factor * dense(load) * rng.lognormal(0, 0.02))
    assert estimator.slowdown == pytest.approx(1, abs=0.16)
    assert estimator.expected_s(STEADY) == pytest.approx(factor * dense(STEADY), rel=0.05)
    rare = estimator.expected_s(LONG_PROMPT) / (factor * dense(LONG_PROMPT))
    assert rare == pytest.approx(1, abs=0.17)


def test_a_single_hiccup_changes_nothing_that_matters() -> None:
    estimator = taught()
    before = estimator.expected_s(STEADY)
    estimator.observe(STEADY, 20 * dense(STEADY))
    assert estimator.expected_s(STEADY) == pytest.approx(before, rel=0.05)
    for load in some_loads(np.random.default_rng(2), 200):
        estimator.observe(load, dense(load))
    assert estimator.expected_s(STEADY) == pytest.approx(dense(STEADY), rel=0.02)


def test_a_load_never_seen_does_not_look_like_a_slow_worker() -> None:
    estimator = StepTimeEstimator()
    plain, prompt = Load(4, 0, 2000, 0), Load(4, 1500, 2000, 1_125_000)
    for _ in range(100):
        estimator.observe(plain, 0.02)
    for _ in range(10):  # far dearer than the first guess, as on a CPU
        estimator.observe(prompt, 0.5)
        for _ in range(5):
            estimator.observe(plain, 0.02)
        assert estimator.slowdown == pytest.approx(1, abs=0.1)
    assert estimator.expected_s(plain) == pytest.approx(0.02, rel=0.1)
    assert estimator.expected_s(prompt) == pytest.approx(0.5, rel=0.2)


def test_rare_prompts_are_remembered_through_thousands_of_plain_steps() -> None:
    estimator = taught()
    for load in some_loads(np.random.default_rng(4), 5000, prefill_share=0.0):
        estimator.observe(load, dense(load))
    assert estimator.expected_s(LONG_PROMPT) == pytest.approx(dense(LONG_PROMPT), rel=0.05)


def test_a_window_of_steps_teaches_as_its_single_steps_would() -> None:
    estimator, rng = StepTimeEstimator(), np.random.default_rng(6)
    loads = some_loads(rng, 1200)
    for begin in range(0, len(loads), 4):
        steps = [(load, 1.0) for load in loads[begin : begin + 4]]
        estimator.observe_window(steps, sum(dense(load) for load, _ in steps))
    assert estimator.expected_s(STEADY) == pytest.approx(dense(STEADY), rel=0.05)
    assert estimator.expected_s(LONG_PROMPT) == pytest.approx(dense(LONG_PROMPT), rel=0.1)


def test_the_quantiles_cover_what_they_say() -> None:
    estimator, rng = taught(noise=0.1), np.random.default_rng(8)
    covered = []
    for load in some_loads(rng, 2000):
        model = estimator.model()
        seconds = dense(load) * rng.lognormal(0, 0.1)
        ratio = seconds / model.expected_s(load)
        covered.append((ratio <= model.p50, ratio <= model.p90, ratio <= model.p99))
        estimator.observe(load, seconds)
    np.testing.assert_allclose(np.mean(covered, axis=0), [0.5, 0.9, 0.99], atol=0.03)
    assert estimator.model().spread == pytest.approx(0.1, rel=0.3)


def test_a_new_worker_starts_from_what_its_like_have_learned() -> None:
    pool = [taught(seed=i).model() for i in range(3)]
    slow_one = taught(lambda load: 4 * dense(load)).model()
    newcomer = StepTimeEstimator(pool_prior([*pool, slow_one, StepModel()]))
    assert newcomer.expected_s(LONG_PROMPT) == pytest.approx(dense(LONG_PROMPT), rel=0.1)
    for _ in range(3):  # a faster machine: its first plain steps tell the scale
        newcomer.observe(STEADY, dense(STEADY) / 2)
    assert newcomer.expected_s(LONG_PROMPT) == pytest.approx(dense(LONG_PROMPT) / 2, rel=0.15)
    assert pool_prior([]) == ROOFLINE


def test_an_exported_model_predicts_the_same_when_imported() -> None:
    estimator = taught()
    exported = msgspec.json.decode(msgspec.json.encode(estimator.to_dict()))
    imported = StepTimeEstimator.from_dict(exported)
    for load in (STEADY, LONG_PROMPT):
        normal_s = estimator.expected_s(load) / estimator.slowdown
        assert imported.expected_s(load) == pytest.approx(normal_s)
    assert imported.model().p99 == pytest.approx(estimator.model().p99)


def test_the_same_observations_give_the_same_model() -> None:
    assert taught().model() == taught().model()


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("inf"), float("nan")])
def test_impossible_times_are_ignored(seconds: float) -> None:
    estimator = taught()
    before = estimator.model()
    estimator.observe(STEADY, seconds)
    estimator.observe_window([], 1.0)
    assert estimator.model() == before


def test_features_add_up_to_the_tokens_of_the_step() -> None:
    assert sum(features(100, 5000, 0, 0)[1:-2]) == 5100
