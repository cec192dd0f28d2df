"""Does a worker's room say how near its promises are?"""

from __future__ import annotations

from math import inf
from pathlib import Path

import pytest

from paceline.domain.promise import Promise
from paceline.domain.request import Request
from paceline.domain.worker import Worker, WorkerReport
from paceline.kernel.ledger import Entry
from paceline.kernel.worker import WorkerState
from paceline.observe import room as module
from paceline.observe.room import Room, room


def a_worker(streams: int = 0, itl_s: float = 0.05, capacity: int | None = None) -> WorkerState:
    state = WorkerState(Worker("w", "m", "http://w"), 0)
    state.reported(WorkerReport(True, kv_capacity_tokens=capacity))
    for i in range(streams):
        request = Request(f"r{i}", "m", "t", "s", Promise(1.0, itl_s))
        entry = Entry(request, 100.0, 0.0, 0.0)
        state.sent(entry, None, 0.0)
        state.first_token(entry, 0.0)
    return state


def seen(state: WorkerState, now: float = 0.01) -> Room:
    return room(state, now)


def test_an_idle_worker_has_all_the_room_that_its_cache_leaves() -> None:
    assert seen(a_worker()) == Room(headroom=0.95, itl_s=0.0, slowdown=1.0, kv_used=None)


def test_the_tightest_promise_counts() -> None:
    loose, tight = seen(a_worker(4, itl_s=0.2)), seen(a_worker(4, itl_s=0.05))
    assert loose.itl_s == tight.itl_s > 0
    assert tight.headroom == pytest.approx(1 - tight.itl_s / 0.05)
    assert tight.headroom < loose.headroom


def test_nothing_promised_leaves_what_the_cache_leaves() -> None:
    assert seen(a_worker(4, itl_s=inf, capacity=800)).headroom == pytest.approx(0.45, abs=0.01)
    assert seen(a_worker(4, itl_s=inf, capacity=800)).kv_used == pytest.approx(0.5, abs=0.01)


def test_a_cache_that_runs_full_takes_the_room() -> None:
    assert seen(a_worker(10, itl_s=10.0, capacity=1000)).headroom < 0


def test_a_gap_that_is_open_counts_before_it_closes() -> None:
    state = a_worker(4)
    soon, late = seen(state, 0.001), seen(state, 5.0)
    assert late.slowdown > 10 * soon.slowdown
    assert late.headroom < 0 < soon.headroom


def test_to_look_changes_nothing() -> None:
    """It must not lead to other decisions than a replay of the facts."""
    state = a_worker(4)
    before = seen(state, 1.0), state.ledger.streams, state.timing.model(), state.last_step_at
    seen(state, 100.0)
    assert before == (seen(state, 1.0), state.ledger.streams, state.timing.model(), 0.0)
    assert "settle" not in Path(module.__file__).read_text()
