"""Does each late token get its true cause? Against the engine model's own record of its steps."""

from __future__ import annotations

from collections import Counter
from functools import cache

import msgspec
import pytest
from troubled import CHAT, Watched, healthy

from paceline.domain.commands import Dispatch, Prefill
from paceline.domain.facts import (
    DispatchFailed,
    FirstTokenSeen,
    Prefilled,
    RequestArrived,
    Step,
    StepsSeen,
    StreamBroke,
    StreamEnded,
    StreamStopped,
    WorkerAdded,
)
from paceline.domain.promise import Promise
from paceline.domain.request import Request
from paceline.domain.worker import Worker
from paceline.enginemodel import Profile
from paceline.kernel import Kernel
from paceline.observe.stalls import Stalls
from paceline.observe.timeline import Timeline
from paceline.policy.causes import STEPS, Cause
from paceline.policy.windows import PastStep
from paceline.simulator.scenario import Fault, Network, Requests, Workers

RIGHT = 0.9
"""Share of late events that must get the right cause."""
ONE = (Workers(profile="h100-llama-70b-tp4"),)
LITTLE = (msgspec.structs.replace(CHAT, rate=3.0),)
DOCUMENTS = Requests(kind="documents", rate=1.0, tier="documents", tenant="law", from_s=10.0)


def large_steps(profile: Profile) -> Profile:
    return msgspec.structs.replace(profile, max_num_batched_tokens=16_384)


def few_places(profile: Profile) -> Profile:
    return msgspec.structs.replace(profile, max_num_seqs=6)


@cache
def played(trouble: str) -> Watched:
    """Runs are long: each is made once."""
    slow = Fault(kind="slow", worker="*", at_s=20, for_s=5, factor=8.0, every_s=15)
    hang = Fault(kind="hang", worker="*", at_s=20, for_s=3, every_s=10)
    small = (Workers(profile="h100-llama-70b-tp4", count=3, kv_tokens=8192),)
    long = (msgspec.structs.replace(CHAT, output=(400, 1200)),)
    flood = (CHAT, msgspec.structs.replace(CHAT, rate=90.0, from_s=20.0, tenant="crowd"))
    watched = {
        "none": lambda: Watched(healthy()),
        "slow": lambda: Watched(healthy(slow, workers=ONE, requests=LITTLE)),
        "hang": lambda: Watched(healthy(hang, workers=ONE, requests=LITTLE)),
        "documents": lambda: Watched(healthy(requests=(CHAT, DOCUMENTS)), profile=large_steps),
        "kv": lambda: Watched(healthy(workers=small, requests=long), "round-robin"),
        "places": lambda: Watched(healthy(), "round-robin", few_places),
        "flood": lambda: Watched(healthy(requests=flood)),
        "link": lambda: Watched(healthy(network=Network(bytes_per_s=6000.0))),
        "crash": lambda: Watched(
            healthy(Fault(kind="crash", worker="w0", at_s=20, for_s=5, every_s=15))
        ),
        "moves": lambda: Watched(
            healthy(
                Fault(kind="hang", worker="w0", at_s=10, for_s=4, every_s=12),
                Fault(kind="crash", worker="w1", at_s=12, for_s=4, every_s=9),
                Fault(kind="slow", worker="w2", at_s=20, for_s=6, every_s=14, factor=10.0),
            )
        ),
    }[trouble]()
    return watched.run()


def judge(watched: Watched) -> Counter[bool]:
    """How many late steps have the right cause, and how many have not?"""
    steps = [watched.is_right(late) for late in watched.late if late.what == "step"]
    return Counter(right for right in steps if right is not None)


@pytest.mark.parametrize("trouble", ["slow", "hang", "documents", "flood", "kv"])
def test_late_steps_get_the_cause_that_the_engine_knows(trouble: str) -> None:
    watched = played(trouble)
    judged = judge(watched)
    assert judged.total() >= 5
    assert judged[True] / judged.total() >= RIGHT


def test_over_all_troubles_nine_of_ten_late_gaps_get_the_right_cause() -> None:
    judged: Counter[bool] = Counter()
    for trouble in ("slow", "hang", "documents", "flood", "kv"):
        judged += judge(played(trouble))
    assert judged[True] / judged.total() >= RIGHT


@pytest.mark.parametrize(
    ("trouble", "what", "cause"),
    [
        ("kv", "stream", Cause.PREEMPTION),
        ("places", "first_token", Cause.ENGINE_QUEUE),
        ("flood", "first_token", Cause.GATEWAY_QUEUE),
        ("link", "first_token", Cause.LINK),
        ("crash", "stream", Cause.LOST_WORKER),
    ],
)
def test_what_no_step_shows_gets_the_cause_that_was_injected(
    trouble: str, what: str, cause: Cause
) -> None:
    """Without the trouble there is nothing of the kind in the same fleet."""
    assert not played("none").causes(what)
    causes = played(trouble).causes(what)
    assert causes.total() >= 5
    assert causes[cause] / causes.total() >= RIGHT


def test_a_fleet_that_is_well_breaks_no_promise_without_a_cause() -> None:
    watched = played("none")
    lost = sum(total.promises for total in watched.stalls.losses.totals.values())
    assert lost == 0


@pytest.mark.parametrize("trouble", ["slow", "hang", "flood", "places", "kv", "crash"])
def test_every_broken_promise_is_explained_once(trouble: str) -> None:
    watched = played(trouble)
    totals = watched.stalls.losses.totals.values()
    explained = sum(total.promises for total in totals)
    result = watched.simulation.recorder.result("", "", 1).total
    broken = result.requests - result.kept
    assert explained == pytest.approx(broken, abs=max(0.05 * broken, 2))


@pytest.mark.parametrize(
    "trouble", ["slow", "hang", "documents", "flood", "kv", "places", "link", "crash", "moves"]
)
def test_the_causes_of_each_late_event_add_up_to_its_lateness(trouble: str) -> None:
    for late in played(trouble).late:
        assert sum(late.split.values()) == pytest.approx(late.late_s)
        assert 0.0 < late.late_s <= late.seconds * (1 + 1e-9)
        assert late.cause in late.split


def test_each_move_is_a_gap_of_its_own_and_the_worker_that_was_left_is_to_blame() -> None:
    """Two workers crashed; after the second one it took an attempt more."""
    stalls, kernel = written_by("p")
    broke = [StreamBroke("r", worker, "it crashed", 9, resumable=True) for worker in ("p", "d")]
    stalls.saw(1.0, broke[0], [Dispatch("r", "d", "it has room")])
    stalls.saw(1.6, FirstTokenSeen("r", 1.6), [])
    stalls.saw(2.0, broke[1], [Dispatch("r", "p", "it has room")])
    stalls.saw(3.5, DispatchFailed("r", "p", "refused"), [Dispatch("r", "e", "it has room")])
    stalls.saw(4.0, FirstTokenSeen("r", 4.0), [])
    ended = StreamEnded("r", 41, itl_s=0.09, stall_s=2.0)
    stalls.saw(4.3, ended, kernel.handle(ended, 4.3))
    stalls.look(7.0)
    (first,), (mean, second) = (stalls.losses.late[name] for name in ("p", "d"))
    assert [first.what, second.what, mean.what] == ["stream", "stream", "mean"]
    assert [first.seconds, second.seconds, mean.seconds] == pytest.approx([1.5, 2.0, 3.6])
    assert mean.late_s == pytest.approx(40 * (0.09 - 0.02))
    assert {first.cause, second.cause, mean.cause} == {Cause.LOST_WORKER}
    assert sum(total.promises for total in stalls.losses.totals.values()) == 1


def test_nothing_is_remembered_of_requests_that_are_over() -> None:
    watched = played("crash")
    assert not watched.simulation.gateways[0].kernel.requests
    assert not watched.stalls._courses


def test_a_step_hits_all_its_streams_and_is_told_once() -> None:
    steps = [late for late in played("documents").late if late.what == "step"]
    assert max(late.streams for late in steps) > 3
    assert len({(late.worker, late.at) for late in steps}) == len(steps)


def test_a_prompt_from_another_worker_is_split_into_prefill_and_transfer() -> None:
    stalls = handed_over()
    stalls.saw(0.3, Prefilled("r", "p", 0.3), [Dispatch("r", "d", "it has room", prefilled_at="p")])
    stalls.saw(2.0, FirstTokenSeen("r", 2.0), [])
    stalls.look(5.0)
    (late,) = stalls.losses.late["d"]
    assert (late.cause, late.what) == (Cause.TRANSFER, "first_token")
    assert late.late_s == pytest.approx(1.5)


def test_a_first_token_that_waited_for_prefill_elsewhere_was_late_there() -> None:
    stalls = handed_over()
    stalls.saw(2.0, Prefilled("r", "p", 2.0), [Dispatch("r", "d", "it has room", prefilled_at="p")])
    stalls.saw(2.1, FirstTokenSeen("r", 2.1), [])
    stalls.look(5.0)
    (late,) = stalls.losses.late["p"]
    assert late.cause is Cause.OWN_PREFILL


@pytest.mark.parametrize("again", [False, True])
def test_a_request_that_lost_the_prompt_it_was_handed_waits_for_no_transfer(again: bool) -> None:
    """`again`: handed over anew, with both workers at it at once. Else: prefilled in place."""
    stalls = handed_over()
    stalls.saw(0.1, Prefilled("r", "p", 0.1), [Dispatch("r", "d", "it has room", prefilled_at="p")])
    prefill = [Prefill("r", "p", "long prompt")] if again else []
    dispatch = Dispatch("r", "e", "it has room", prefilled_at="p" if again else "")
    stalls.saw(3.0, StreamStopped("r", "d", 0), [*prefill, dispatch])
    stalls.saw(4.0, FirstTokenSeen("r", 4.0), [])
    stalls.look(6.0)
    (late,) = stalls.losses.late["e"]
    assert late.split.get(Cause.TRANSFER, 0.0) == pytest.approx(1.0 * again * 3.5 / 3.9)


def test_steps_that_were_seen_are_taken_in_before_somebody_reads_of_them() -> None:
    kernel, stalls = watched_worker()
    for i in range(1, 4):
        step(kernel, stalls, 0.02 * i)
    assert stalls.tracks["w"].timeline.sums[STEPS] == 0
    stalls.catch_up(0.1)
    assert stalls.tracks["w"].timeline.sums[STEPS] == 2  # the last one is not settled


def test_the_sums_at_a_mark_are_those_of_its_moment_however_late_they_are_asked_for() -> None:
    timeline = Timeline()
    marks = [timeline.mark(at) for at in (0.5, 1.0, 1.5)]
    for ended_at in (1.0, 2.0, 3.0):
        timeline.stepped(PastStep(ended_at, 1.0, 1, 0.0), 0.0, 10.0)
    steps = [mark.sums[STEPS] for mark in marks if mark.sums is not None]
    assert steps == pytest.approx([0.5, 1.0, 1.5])
    assert timeline.mark(2.5).sums == timeline.sums  # that moment is over: what is known now


def handed_over() -> Stalls:
    """It has seen a request whose prompt the worker p is to prefill, for d or e to answer."""
    kernel, request = Kernel(), Request("r", "m", "acme", "chat", Promise(ttft_s=0.5))
    for name in ("p", "d", "e"):
        kernel.handle(WorkerAdded(Worker(name, "m", f"http://{name}")), 0.0)
    stalls = Stalls(kernel)
    stalls.saw(0.0, RequestArrived(request), [Prefill("r", "p", "long prompt")])
    return stalls


def watched_worker() -> tuple[Kernel, Stalls]:
    """A worker with a stream, and the one that looks on."""
    kernel = Kernel()
    stalls = Stalls(kernel)
    stalls.saw(0.0, WorkerAdded(Worker("w", "m", "http://w")), [])
    kernel.handle(WorkerAdded(Worker("w", "m", "http://w")), 0.0)
    return kernel, stalls


def step(kernel: Kernel, stalls: Stalls, at: float) -> None:
    fact = StepsSeen("w", (Step(at, 0.02, 1, 1),))
    stalls.saw(at, fact, kernel.handle(fact, at))


def written_by(worker: str) -> tuple[Stalls, Kernel]:
    """It sees an answer that a worker has begun, at 0.1; d and e can take over."""
    kernel = Kernel()
    for name in (worker, "d", "e"):
        kernel.handle(WorkerAdded(Worker(name, "m", f"http://{name}")), 0.0)
    stalls, request = Stalls(kernel), Request("r", "m", "acme", "chat", Promise(itl_s=0.02))
    stalls.saw(0.0, RequestArrived(request), [Dispatch("r", worker, "it has room")])
    stalls.saw(0.1, FirstTokenSeen("r", 0.1), [])
    return stalls, kernel
