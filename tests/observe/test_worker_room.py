"""Does a worker's room say how near its promises are?"""

from __future__ import annotations

from math import inf
from pathlib import Path

import pytest

from paceline.domain.facts import RequestArrived, WorkerAdded
from paceline.domain.promise import Promise
from paceline.domain.request import Request
from paceline.domain.worker import Worker, WorkerReport
from paceline.kernel import Kernel
from paceline.kernel.ledger import Entry
from paceline.kernel.worker import WorkerState
from paceline.observe import room as module
from paceline.observe.room import Next, Room, next_ones, room


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
    found = seen(a_worker())
    assert (found.headroom, found.least, found.itl_s) == (0.95, "kv", 0.0)
    assert (found.slowdown, found.kv_used) == (1.0, None)


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


def arriving(state: WorkerState, name: str, prompt: float, ttft_s: float, at: float = 0.0) -> None:
    request = Request(name, "m", "t", "s", Promise(ttft_s, inf))
    state.sent(Entry(request, prompt, 0.0, at, at + ttft_s), None, at)


def test_prompts_ahead_take_the_room_of_the_first_token() -> None:
    state, next_one = a_worker(2, itl_s=inf), Next(500.0, 1.0)
    before = room(state, 0.01, next_one)
    for i in range(40):
        arriving(state, f"p{i}", 4000.0, 60.0)
    after = room(state, 0.02, next_one)
    assert after.ttft_s > 10 * before.ttft_s
    assert after.least == "ttft"
    assert after.headroom == pytest.approx(1.0 - after.ttft_s)
    assert after.headroom < 0 < before.headroom
    assert room(state, 0.02, Next(500.0)).least != "ttft"  # who comes next was promised nothing


def test_who_comes_next_is_no_better_off_than_who_waits_there_already() -> None:
    """However few tokens are ahead: the engine may have no place for more sequences."""
    state = a_worker(2, itl_s=inf)
    arriving(state, "p", 10.0, 2.0)
    assert seen(state, 1.0).headroom == pytest.approx(0.5)
    assert seen(state, 3.0).headroom == pytest.approx(-0.5)
    assert seen(state, 3.0).least == "ttft"


def test_next_comes_one_like_those_that_are_there() -> None:
    kernel = Kernel()
    kernel.handle(WorkerAdded(Worker("w", "m", "http://w")), 0.0)
    assert next_ones(kernel) == {"m": Next()}
    for name, ttft_s in (("loose", 9.0), ("tight", 0.5)):
        promise = Promise(ttft_s, inf)
        kernel.handle(RequestArrived(Request(name, "m", "t", "s", promise)), 0.0)
    assert next_ones(kernel)["m"].ttft_s == 0.5


def test_a_worker_that_only_decodes_need_not_prefill_who_comes_next() -> None:
    decoding = WorkerState(Worker("d", "m", "http://d", role="decode"), 0)
    assert room(decoding, 0.0, Next(9000.0, 0.5)).headroom > 0.9


def test_to_look_changes_nothing() -> None:
    """It must not lead to other decisions than a replay of the facts."""
    state = a_worker(4)
    before = seen(state, 1.0), state.ledger.streams, state.timing.model(), state.last_step_at
    seen(state, 100.0)
    assert before == (seen(state, 1.0), state.ledger.streams, state.timing.model(), 0.0)
    assert "settle" not in Path(module.__file__).read_text()
