"""Assertions on commands: what the kernel answers to facts."""

from __future__ import annotations

from math import inf

import msgspec
import pytest

from paceline.domain.commands import Dispatch, Fail, Hold, Move, Shed
from paceline.domain.facts import (
    ClientLeft,
    DispatchFailed,
    FirstTokenSeen,
    RequestArrived,
    StreamEnded,
    StreamStopped,
    TimerFired,
    WorkerAdded,
    WorkerRemoved,
    WorkerReported,
)
from paceline.domain.promise import Promise
from paceline.domain.request import LIFECYCLE, Event, Request, State
from paceline.domain.worker import Worker, WorkerReport
from paceline.kernel import Kernel, Settings

HEALTHY = WorkerReport(healthy=True)


def request(name: str = "r1", **fields: object) -> Request:
    plain = Request(name, "m", "acme", "standard", Promise(1.0, 0.05), prompt_bytes=2000)
    return msgspec.structs.replace(plain, **fields)


def fleet(count: int = 2, policy: str = "headroom", **fields: object) -> Kernel:
    kernel = Kernel(msgspec.structs.replace(Settings(policy=policy), **fields))
    for i in range(count):
        kernel.handle(WorkerAdded(Worker(f"w{i}", "m", f"http://w{i}")), 0.0)
        kernel.handle(WorkerReported(f"w{i}", HEALTHY), 0.0)
    return kernel


def dispatched(kernel: Kernel, name: str, now: float = 1.0) -> Dispatch:
    (command,) = kernel.handle(RequestArrived(request(name)), now)
    assert isinstance(command, Dispatch)
    return command


def answered(kernel: Kernel, name: str, now: float) -> str:
    """The worker that answers a request at once."""
    worker_id = dispatched(kernel, name, now).worker_id
    kernel.handle(FirstTokenSeen(name, now + 0.05), now + 0.05)
    kernel.handle(StreamEnded(name, 10, itl_s=0.01), now + 0.15)
    return worker_id


def test_a_request_goes_to_a_worker_with_a_reason_and_a_prediction() -> None:
    command = dispatched(fleet(), "r1")
    assert command.worker_id in ("w0", "w1")
    assert command.because
    assert command.predicted is not None
    assert 0 < command.predicted.itl_s < command.predicted.ttft_s
    assert command.predicted.headroom > 0


def test_a_request_that_fails_before_its_first_token_is_tried_elsewhere() -> None:
    kernel = fleet()
    first = dispatched(kernel, "r1")
    (second,) = kernel.handle(DispatchFailed("r1", first.worker_id, "HTTP 500"), 1.1)
    assert isinstance(second, Dispatch)
    assert second.worker_id != first.worker_id
    assert second.attempt == 2


def test_the_retry_budget_ends_with_the_last_workers_word() -> None:
    kernel = fleet(attempts=2)
    first = dispatched(kernel, "r1")
    (second,) = kernel.handle(DispatchFailed("r1", first.worker_id, "HTTP 500"), 1.1)
    assert isinstance(second, Dispatch)
    (end,) = kernel.handle(
        DispatchFailed("r1", second.worker_id, "no answer within 9 s", timed_out=True), 1.2
    )
    assert end == Fail("r1", f"{second.worker_id}: no answer within 9 s", timed_out=True)
    assert not kernel.requests


def test_when_all_engines_are_overloaded_the_client_is_told_to_come_back() -> None:
    kernel = fleet()
    first = dispatched(kernel, "r1")
    (second,) = kernel.handle(DispatchFailed("r1", first.worker_id, "HTTP 429", blame=False), 1.1)
    assert isinstance(second, Dispatch)
    (end,) = kernel.handle(DispatchFailed("r1", second.worker_id, "HTTP 429", blame=False), 1.2)
    assert isinstance(end, Shed)
    assert not end.unavailable
    assert end.retry_after_s > 0
    assert all(w.usable(1.2) for w in kernel.workers.values())


def test_the_timer_is_wanted_soon_while_there_is_work_and_never_else() -> None:
    kernel = fleet(1)
    first = dispatched(kernel, "r1")
    kernel.handle(DispatchFailed("r1", first.worker_id, "connection refused"), 1.0)
    kernel.handle(WorkerReported("w0", WorkerReport(healthy=False)), 1.1)
    for now in (1.2, 2.0, 3.0):
        kernel.handle(TimerFired(), now)
        assert now < kernel.next_deadline() < now + 1.0
    kernel.handle(ClientLeft("r1"), 3.1)
    kernel.handle(TimerFired(), 3.5)
    assert kernel.next_deadline() == inf


def test_the_timer_is_wanted_also_for_who_was_sent_after_it_had_waited() -> None:
    """A worker that hangs with its only request is to be noticed."""
    kernel = fleet(1)
    kernel.handle(WorkerReported("w0", WorkerReport(healthy=False)), 1.0)
    kernel.handle(RequestArrived(request()), 1.0)
    kernel.handle(TimerFired(), 1.5)
    kernel.handle(WorkerReported("w0", HEALTHY), 1.6)
    kernel.handle(TimerFired(), 1.7)
    assert not any(kernel.held().values())
    assert kernel.next_deadline() < inf


def test_a_worker_that_failed_is_avoided_and_then_tried_again() -> None:
    kernel = fleet(policy="least-requests")
    bad = dispatched(kernel, "r1").worker_id
    kernel.handle(DispatchFailed("r1", bad, "connection refused"), 1.0)
    soon = {dispatched(kernel, f"s{i}", 1.1).worker_id for i in range(6)}
    assert bad not in soon
    later = {dispatched(kernel, f"t{i}", 5.0).worker_id for i in range(9)}
    assert bad in later


def test_without_a_usable_worker_a_request_waits_and_goes_when_one_comes() -> None:
    kernel = fleet(1)
    kernel.handle(WorkerReported("w0", WorkerReport(healthy=False, because="down")), 1.0)
    (hold,) = kernel.handle(RequestArrived(request()), 2.0)
    assert isinstance(hold, Hold)
    assert kernel.held() == {"m": 1}
    (go,) = kernel.handle(WorkerReported("w0", HEALTHY), 3.0)
    assert isinstance(go, Dispatch)
    assert kernel.held() == {"m": 0}


def test_a_removed_worker_gets_no_new_work_and_leaves_when_its_streams_have_ended() -> None:
    kernel = fleet()
    worker = dispatched(kernel, "r1").worker_id
    kernel.handle(WorkerRemoved(worker), 1.5)
    assert worker in kernel.workers
    assert worker not in {answered(kernel, f"s{i}", 2.0 + i) for i in range(8)}
    kernel.handle(StreamEnded("r1", 10), 11.0)
    assert worker not in kernel.workers
    kernel.handle(WorkerAdded(Worker("new", "m", "http://new")), 12.0)
    kernel.handle(WorkerReported("new", HEALTHY), 12.0)
    assert "new" in {answered(kernel, f"t{i}", 13.0 + i) for i in range(12)}


def test_a_worker_that_drains_stays_what_it_is_until_it_has_left() -> None:
    kernel = fleet(1)
    dispatched(kernel, "r1")
    kernel.handle(WorkerRemoved("w0"), 1.5)
    kernel.handle(WorkerAdded(Worker("w0", "other", "http://w0")), 1.6)
    assert kernel.workers["w0"].worker.model == "m"
    kernel.handle(StreamEnded("r1", 10), 2.0)
    kernel.handle(WorkerAdded(Worker("w0", "other", "http://w0")), 2.1)
    assert kernel.workers["w0"].worker.model == "other"


def test_predictions_are_compared_with_their_outcomes() -> None:
    kernel = fleet(1)
    command = dispatched(kernel, "r1", 1.0)
    assert command.predicted is not None
    late = 1.0 + 2 * command.predicted.ttft_s
    kernel.handle(FirstTokenSeen("r1", late), late)
    kernel.handle(StreamEnded("r1", 100, itl_s=0.5 * command.predicted.itl_s), late + 1)
    worker = kernel.workers["w0"]
    assert worker.ttft.bias == pytest.approx(0.693, abs=0.01)
    assert worker.itl.bias == pytest.approx(-0.693, abs=0.01)
    assert worker.itl.count == 1


def test_a_pause_in_the_middle_is_not_taken_for_a_wrong_prediction() -> None:
    kernel = fleet(1)
    dispatched(kernel, "r1", 1.0)
    kernel.handle(FirstTokenSeen("r1", 1.05), 1.05)
    kernel.handle(StreamStopped("r1", "w0", 20), 2.0)
    kernel.handle(FirstTokenSeen("r1", 60.0), 60.0)
    kernel.handle(StreamEnded("r1", 40, itl_s=1.5, stall_s=58.0), 61.0)
    assert kernel.workers["w0"].itl.count == 0


def test_an_order_to_leave_is_over_when_the_worker_has_failed_the_request() -> None:
    kernel = fleet()
    first = dispatched(kernel, "r1")
    kernel.requests["r1"].leaving = Move
    kernel.handle(DispatchFailed("r1", first.worker_id, "HTTP 500"), 1.1)
    assert not kernel.requests["r1"].leaving


def test_an_id_that_is_known_does_not_arrive_again() -> None:
    kernel = fleet()
    dispatched(kernel, "r1")
    assert kernel.handle(RequestArrived(request()), 1.1) == []
    assert sum(len(worker.ledger.entries) for worker in kernel.workers.values()) == 1


def test_tokens_per_byte_of_a_model_are_learned_from_its_usage() -> None:
    kernel = fleet(1)
    for i in range(40):
        dispatched(kernel, f"r{i}")
        kernel.handle(StreamEnded(f"r{i}", 10, prompt_tokens=1000), 2.0)
    assert kernel.pools["m"].prompt_tokens(request()) == pytest.approx(1000, rel=0.1)


def test_a_prefix_that_was_sent_before_is_believed_to_be_cached() -> None:
    kernel = fleet(2)
    blocks = tuple(range(100, 110))
    long = {"prompt_bytes": 2560, "blocks": blocks}
    (first,) = kernel.handle(RequestArrived(request("r1", **long)), 1.0)
    kernel.handle(FirstTokenSeen("r1", 1.05), 1.05)
    kernel.handle(StreamEnded("r1", 5, prompt_tokens=600), 1.1)
    (second,) = kernel.handle(RequestArrived(request("r2", **long)), 1.2)
    assert isinstance(first, Dispatch)
    assert isinstance(second, Dispatch)
    assert second.worker_id == first.worker_id
    assert second.predicted is not None
    assert second.predicted.cached_tokens > 0


def test_trust_in_cached_prefixes_falls_when_the_engine_reports_less() -> None:
    kernel = fleet(1)
    blocks = tuple(range(10))
    for i in range(30):
        arrival = request(f"r{i}", prompt_bytes=2560, blocks=blocks)
        kernel.handle(RequestArrived(arrival), 1.0)
        kernel.handle(StreamEnded(f"r{i}", 5, cached_tokens=0), 2.0)
    assert kernel.workers["w0"].trust < 0.1


def test_every_state_is_reached_and_the_ends_are_ends() -> None:
    reached = {after for moves in LIFECYCLE.values() for after in moves.values()}
    assert reached == set(State)
    ends = {state for state, moves in LIFECYCLE.items() if not moves}
    assert ends == {State.DONE, State.FAILED, State.SHED, State.LEFT}
    assert {event for moves in LIFECYCLE.values() for event in moves} == set(Event)
