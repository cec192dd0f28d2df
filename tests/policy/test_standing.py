"""What depends on the worker alone."""

from __future__ import annotations

from msgspec.structs import replace
from standings import MODEL, worker

from paceline.policy.standing import Curve, InFlight, Standing


def test_a_worker_of_which_nothing_is_due_yet_is_as_slow_as_it_was() -> None:
    """Prompts that are prefilled for others show nothing before they are done."""
    idle = InFlight(0, 0, 0.0, 0.0, 0.0, 0.0, 2048.0, 0.0, float("inf"), last_step_at=1e5)
    slow = replace(MODEL, slowdown=3.0)
    assert Standing(slow, Curve(slow.theta), idle, {}).slowdown(0.0) == 3.0


def test_a_gap_that_is_open_for_longer_than_a_step_makes_the_worker_slow() -> None:
    there = worker(streams=10)
    assert there.slowdown(0.0) == 1.0
    assert there.slowdown(1.0) > 10.0
