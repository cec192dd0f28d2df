from __future__ import annotations

from math import ceil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_engine import SyntheticEngine, Truth, dense, mixture_of_experts

from paceline.domain.facts import Step
from paceline.policy.steptime import Load, StepTimeEstimator
from paceline.policy.windows import MOST_STEPS, WITHHELD, PrefillWindows

STEP_S = 0.02
KV = 5000.0


class Worker:
    """Ten streams in steps of 20 ms; steps with prefill are said to take 100 ms."""

    def __init__(self, windows: PrefillWindows) -> None:
        self.windows, self.now = windows, 0.0
        self.settled: list[tuple[Load, float]] = []

    def step(self, seconds: float = STEP_S, first: str = "", streams: int = 10) -> None:
        self.now += seconds
        if first:
            self.windows.first_token(first, self.now)
        seen = self.windows.stepped(Step(self.now, seconds, streams, streams), KV)
        self.settled += [(observation.load, observation.seconds) for observation in seen]

    def prefills(self) -> list[float]:
        return [load.prefill for load, _ in self.settled]


def test_plain_steps_are_settled_one_step_late() -> None:
    worker = Worker(PrefillWindows(2048))
    for _ in range(5):
        worker.step()
    assert worker.settled == [(Load(10, 0, KV, 0), STEP_S)] * 4


def test_a_short_prompt_is_booked_on_the_step_of_its_first_token() -> None:
    worker = Worker(PrefillWindows(2048))
    worker.step()
    worker.windows.dispatched("a", 300, 100, worker.now)
    for seconds, first in ((STEP_S, ""), (0.1, "a"), (STEP_S, ""), (STEP_S, "")):
        worker.step(seconds, first)
    assert worker.prefills() == [0, 0, 300, 0]
    assert worker.settled[2] == (Load(10, 300, KV, 300 * (100 + 150)), 0.1)


def test_a_long_prompt_is_booked_backwards_on_as_few_steps_as_hold_it() -> None:
    worker = Worker(PrefillWindows(1010))
    worker.windows.dispatched("a", 2500, 0, worker.now)
    for seconds, first in ((STEP_S, ""), (0.1, ""), (0.1, ""), (0.1, "a"), (STEP_S, "")):
        worker.step(seconds, first)
    assert worker.prefills() == [0, 1000, 1000, 500]
    attention = sum(load.q for load, _ in worker.settled)
    assert attention == pytest.approx(2500**2 / 2)


def test_two_prompts_share_the_step_in_which_the_first_one_ends() -> None:
    worker = Worker(PrefillWindows(1010))
    worker.windows.dispatched("a", 1400, 0, worker.now)
    worker.windows.dispatched("b", 1200, 0, worker.now)
    for seconds, first in ((0.1, ""), (0.1, "a"), (0.1, "b"), (STEP_S, "")):
        worker.step(seconds, first)
    assert worker.prefills() == [1000, 1000, 600]


def test_steps_that_a_waiting_prompt_may_have_touched_are_not_settled() -> None:
    worker = Worker(PrefillWindows(1010))
    worker.windows.dispatched("a", 2500, 0, worker.now)
    for _ in range(10):
        worker.step()
    assert len(worker.settled) == 10 - ceil(2500 / 1000) - 1


def test_steps_that_an_aborted_prompt_may_have_touched_teach_nothing() -> None:
    worker = Worker(PrefillWindows(1010))
    worker.step()
    worker.windows.dispatched("a", 2500, 0, worker.now)
    worker.step(0.1)
    worker.step(0.1)
    worker.windows.departed("a")
    for _ in range(3):
        worker.step()
    assert [seconds for _, seconds in worker.settled] == [STEP_S] * 3


def test_books_that_do_not_balance_teach_nothing() -> None:
    worker = Worker(PrefillWindows(1010))
    worker.step()
    worker.windows.dispatched("a", 9000, 0, worker.now)  # far more than one step can hold
    worker.step(0.1, "a")
    for _ in range(3):
        worker.step()
    assert worker.prefills() == [0, 0, 0]


def test_on_an_idle_worker_the_time_to_first_token_is_the_observation() -> None:
    windows, seen = PrefillWindows(1000), []
    for i in range(WITHHELD):
        sent_at = 10.0 * i
        windows.dispatched(f"r{i}", 2000, 0, sent_at)
        windows.first_token(f"r{i}", sent_at + 0.3)
        for step in range(5):
            ended_at = sent_at + 0.3 + step * STEP_S
            streams = min(step, 1)
            seen += windows.stepped(Step(ended_at, streams * STEP_S, streams, streams), 0)
    firsts = [observation for observation in seen if observation.load.prefill]
    assert len(firsts) == WITHHELD
    assert (firsts[0].load, firsts[0].steps) == (Load(0, 1000, 0, 1_000_000), 2.0)
    assert [first.seconds for first in firsts] == pytest.approx([0.3] * WITHHELD)


def test_memory_stays_bounded_when_a_prompt_never_gets_its_token() -> None:
    worker = Worker(PrefillWindows())
    worker.windows.dispatched("hung", 10**9, 0, 0.0)
    for _ in range(2 * MOST_STEPS):
        worker.step()
    assert len(worker.windows._past) <= MOST_STEPS
    assert not worker.settled


def test_strangers_and_late_echoes_are_ignored() -> None:
    worker = Worker(PrefillWindows(2048))
    worker.windows.departed("nobody")
    worker.step(first="nobody")
    worker.step()
    assert worker.prefills() == [0]


@given(st.integers(0, 2**32 - 1), st.sampled_from([512, 2048]), st.floats(0.5, 4))
@settings(max_examples=15, deadline=None)
def test_what_is_booked_is_what_the_engine_prefilled(seed: int, budget: int, rate: float) -> None:
    engine = SyntheticEngine(
        dense, np.random.default_rng(seed), PrefillWindows(budget), budget=budget, rate=rate
    )
    truth, booked = [], []
    for load, observations in engine.steps(300):
        truth.append(load)
        booked += [o.load for o in observations if o.load.streams]
    with_streams = [load for load in truth if load.streams]
    found = sum(load in set(with_streams) for load in booked)
    # What was sent during an idle worker's first prefill may have begun unseen: books that differ.
    # Of 240 runs three found less than 0.85, all with small steps that are always full.
    assert found >= 0.75 * len(booked)
    assert len(booked) >= 0.8 * len(with_streams)


@pytest.mark.parametrize("budget", [512, 1024, 2048])
def test_the_prefill_budget_is_learned(budget: int) -> None:
    windows = PrefillWindows()
    engine = SyntheticEngine(dense, np.random.default_rng(3), windows, budget=budget, rate=1.0)
    engine.teach(StepTimeEstimator(), 2000)
    assert windows.budget == budget


@pytest.mark.parametrize("budget", [512, 1024, 2048, 8192])
def test_the_prefill_budget_is_learned_of_an_engine_that_always_has_prompts(budget: int) -> None:
    windows = PrefillWindows()
    rng = np.random.default_rng(3)
    engine = SyntheticEngine(dense, rng, windows, budget=budget, rate=10.0, outputs=(50, 150))
    engine.teach(StepTimeEstimator(), 400)
    assert windows.budget == budget


def test_a_prompt_that_would_need_a_quiet_step_teaches_nothing() -> None:
    worker = Worker(PrefillWindows(1010))
    worker.windows.dispatched("a", 1400, 0, worker.now)
    for seconds, first in ((STEP_S, ""), (0.15, "a"), (STEP_S, ""), (STEP_S, "")):
        worker.step(seconds, first)
    assert worker.prefills() == [0]


def test_a_told_budget_is_not_questioned() -> None:
    windows = PrefillWindows(4096)
    SyntheticEngine(dense, np.random.default_rng(3), windows).teach(StepTimeEstimator(), 500)
    assert windows.budget == 4096


@pytest.mark.parametrize("truth", [dense, mixture_of_experts])
@pytest.mark.parametrize("overhead_s", [0.0, 0.01])
def test_an_engine_seen_through_its_chunks_gives_back_its_step_times(
    truth: Truth, overhead_s: float
) -> None:
    windows, estimator = PrefillWindows(), StepTimeEstimator()
    rng = np.random.default_rng(3)
    engine = SyntheticEngine(truth, rng, windows, overhead_s=overhead_s)
    engine.teach(estimator, 3000)
    model = estimator.model()
    for streams in (4, 16, 32):
        for prompt in (0, 100, 500, 1500):
            load = Load(streams, prompt, streams * 1000.0, prompt**2 / 2)
            assert model.expected_s(load) == pytest.approx(truth(load), rel=0.12)
    assert windows.overhead_s == pytest.approx(overhead_s, abs=0.003)


def test_the_coefficients_of_a_dense_engine_come_back() -> None:
    estimator = StepTimeEstimator()
    SyntheticEngine(dense, np.random.default_rng(3), PrefillWindows()).teach(estimator, 4000)
    base_s, *slopes, kv_s, q_s = estimator.model().theta
    assert base_s == pytest.approx(0.0119, rel=0.05)
    assert np.mean(slopes[-3:]) == pytest.approx(2.4e-5, rel=0.1)
    assert kv_s == pytest.approx(9e-8, rel=0.15)
    assert q_s == pytest.approx(1.6e-9, rel=0.15)


def test_a_first_token_that_comes_late_does_not_make_prefill_look_free() -> None:
    worker = Worker(PrefillWindows(1010))
    for _ in range(5):
        worker.step()
    worker.windows.dispatched("a", 800, 0, worker.now)
    worker.step(0.4)
    worker.step()
    worker.step(STEP_S, "a")  # the engine's server was busy: the prompt was prefilled two steps ago
    for _ in range(3):
        worker.step()
    assert 800 not in worker.prefills()
