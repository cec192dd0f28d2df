"""Is a prefill worker given as much as keeps it busy, and no more?"""

from __future__ import annotations

import pytest

from paceline.policy.saturation import Saturation

STEP = 2048.0


def limit_after(gap_s: float, prompt: float = 1500.0, prompts: int = 400) -> float:
    """What is learned of a worker that needs `gap_s` between prompts unless two more wait there.

    It prefills 10,000 tokens a second, one prompt after the other, and always gets what it may."""
    worker, now, ends_at = Saturation(), 0.0, 0.0
    ahead: list[tuple[float, float, float]] = []
    for _ in range(prompts):
        while len(ahead) * prompt < worker.limit(STEP):
            load = len(ahead) * prompt
            idle_s = gap_s if len(ahead) < 2 else 0.0
            ends_at = max(ends_at, now) + idle_s + prompt / 10_000
            ahead.append((load, now, ends_at))
            worker.sent()
        load, sent_at, now = ahead.pop(0)
        worker.done(load, STEP, prompt, sent_at, now)
    settled = Saturation()
    settled._level = worker._level
    return settled.limit(STEP)


def test_a_worker_that_is_as_fast_with_little_gets_little() -> None:
    assert limit_after(0.0) == STEP


def test_a_worker_with_gaps_between_its_prompts_gets_more() -> None:
    assert limit_after(0.1) > STEP


def test_now_and_then_one_prompt_more_is_tried() -> None:
    worker, limits = Saturation(), []
    for _ in range(64):
        limits.append(worker.limit(STEP))
        worker.sent()
    assert limits.count(2 * STEP) == 4
    assert limits.count(STEP) == 60


@pytest.mark.parametrize("load", [1.0, 1e9])
def test_any_load_is_of_some_level(load: float) -> None:
    Saturation().done(load, STEP, 100.0, 0.0, 0.1)
