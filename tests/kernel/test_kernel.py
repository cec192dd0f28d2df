"""Assertions on commands: what the kernel answers to facts."""

from __future__ import annotations

from math import inf

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.domain.commands import Dispatch, Fail, Hold, Shed
from paceline.domain.facts import (
    ClientLeft,
    DispatchFailed,
    Fact,
    FirstTokenSeen,
    RequestArrived,
    Step,
    StepsSeen,
    StreamBroke,
    StreamEnded,
    TimerFired,
    WorkerAdded,
    WorkerRemoved,
    WorkerReported,
)
from paceline.domain.promise import Promise
from paceline.domain.request import LIFECYCLE, Event, Request, State
from paceline.domain.worker import Worker, WorkerReport
from paceline.kernel import Kernel, Settings
from paceline.policy.route import POLICIES

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


def test_the_timer_is_wanted_in_the_future_or_never() -> None:
    kernel = fleet(1)
    first = dispatched(kernel, "r1")
    kernel.handle(DispatchFailed("r1", first.worker_id, "connection refused"), 1.0)
    assert kernel.next_deadline() > 1.0
    kernel.handle(WorkerReported("w0", WorkerReport(healthy=False)), 1.1)
    kernel.handle(TimerFired(), 3.0)
    assert kernel.next_deadline() == 1.0 + kernel.settings.hold_s


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
    assert kernel.next_deadline() == 2.0 + kernel.settings.hold_s
    (go,) = kernel.handle(WorkerReported("w0", HEALTHY), 3.0)
    assert isinstance(go, Dispatch)
    assert kernel.next_deadline() == inf


def test_who_waits_too_long_for_a_worker_is_told_that_there_is_none() -> None:
    kernel = fleet(1)
    kernel.handle(WorkerReported("w0", WorkerReport(healthy=False)), 1.0)
    kernel.handle(RequestArrived(request()), 2.0)
    assert kernel.handle(TimerFired(), 3.0) == []
    (end,) = kernel.handle(TimerFired(), kernel.next_deadline())
    assert isinstance(end, Shed)
    assert end.unavailable
    assert not kernel.requests


def test_waiting_requests_are_bounded() -> None:
    kernel = fleet(0, max_held=2)
    answers = [kernel.handle(RequestArrived(request(f"r{i}")), 0.0)[0] for i in range(3)]
    assert [type(a) for a in answers] == [Hold, Hold, Shed]


def test_a_removed_worker_gets_no_new_work_and_leaves_when_its_streams_have_ended() -> None:
    kernel = fleet()
    worker = dispatched(kernel, "r1").worker_id
    kernel.handle(WorkerRemoved(worker), 1.5)
    assert worker in kernel.workers
    assert {dispatched(kernel, f"s{i}", 2.0).worker_id for i in range(8)} != {worker}
    kernel.handle(StreamEnded("r1", 10), 3.0)
    assert worker not in kernel.workers
    kernel.handle(WorkerAdded(Worker("new", "m", "http://new")), 4.0)
    kernel.handle(WorkerReported("new", HEALTHY), 4.0)
    assert "new" in {dispatched(kernel, f"t{i}", 5.0).worker_id for i in range(12)}


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


# Whatever comes in whatever order, nothing is lost, doubled or left in the books.

names = st.sampled_from([f"r{i}" for i in range(4)])
workers = st.sampled_from(["w0", "w1", "nobody"])
facts: st.SearchStrategy[Fact] = st.one_of(
    st.builds(FirstTokenSeen, names, st.just(0.0)),
    st.builds(StreamEnded, names, st.integers(0, 500), st.floats(0, 1)),
    st.builds(DispatchFailed, names, workers, st.just("x")),
    st.builds(StreamBroke, names, workers, st.just("x")),
    st.builds(ClientLeft, names),
    st.builds(
        StepsSeen,
        workers,
        st.lists(
            st.builds(Step, st.just(0.0), st.floats(0, 2), st.integers(0, 9), st.integers(0, 20)),
            max_size=2,
        ),
    ),
    st.builds(WorkerReported, workers, st.builds(WorkerReport, st.booleans())),
    st.builds(TimerFired),
    names.map(lambda name: RequestArrived(request(name))),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(facts, st.floats(0, 3)), max_size=60), st.sampled_from(list(POLICIES)))
def test_no_order_of_facts_loses_or_doubles_a_request(
    story: list[tuple[Fact, float]], policy: str
) -> None:
    kernel = fleet(2, policy)
    now = 0.0
    for fact, later in story:
        now += later
        if isinstance(fact, RequestArrived) and fact.request.id in kernel.requests:
            continue  # the host never reuses the id of a request under way
        commands = kernel.handle(_dated(fact, now), now)
        for command in commands:
            live = kernel.requests.get(command.request_id)
            if isinstance(command, Dispatch | Hold):
                assert live is not None
            else:
                assert live is None
        booked = [name for w in kernel.workers.values() for name in w.ledger.entries]
        held = [name for held in kernel._held.values() for name in held]
        assert sorted(booked + held) == sorted(kernel.requests)
    for name in list(kernel.requests):
        kernel.handle(ClientLeft(name), now)
    for worker in kernel.workers.values():
        ledger = worker.ledger
        assert (ledger.streams, ledger.ahead, ledger.kv, ledger.arriving) == (0, 0.0, 0.0, 0.0)
        assert not ledger.promised
    assert kernel.next_deadline() == inf


def _dated(fact: Fact, now: float) -> Fact:
    if isinstance(fact, FirstTokenSeen):
        return FirstTokenSeen(fact.request_id, now)
    if isinstance(fact, StepsSeen):
        steps = [msgspec.structs.replace(step, ended_at=now) for step in fact.steps]
        return StepsSeen(fact.worker_id, steps)
    return fact
