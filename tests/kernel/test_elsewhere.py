"""Does a gateway reckon with what others have in flight, as far and as long as it may?"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.domain.commands import Dispatch
from paceline.domain.facts import (
    FirstTokenSeen,
    PeerLoad,
    PeerReported,
    RequestArrived,
    Step,
    StepsSeen,
    WorkerAdded,
    WorkerReported,
)
from paceline.domain.promise import Promise
from paceline.domain.request import Request
from paceline.domain.worker import Worker, WorkerReport
from paceline.kernel import Kernel, Settings
from paceline.kernel.elsewhere import FORGET_S, Elsewhere
from paceline.policy.standing import Standing

HEALTHY = WorkerReport(healthy=True)
BUSY = PeerLoad("w0", 40, 3, 60_000.0, 3_000.0, 2_500.0, 800.0)


def load(worker_id: str = "w0", streams: int = 0, **fields: Any) -> PeerLoad:
    plain = {"arriving": 0, "context": 0.0, "context_arriving": 0.0, "ahead": 0.0}
    return PeerLoad(worker_id, streams, **(plain | {"prefill_rate": 0.0} | fields))


def fleet(policy: str = "headroom") -> Kernel:
    kernel = Kernel(Settings(policy=policy))
    for name in ("w0", "w1"):
        kernel.handle(WorkerAdded(Worker(name, "m", f"http://{name}")), 0.0)
        kernel.handle(WorkerReported(name, HEALTHY), 0.0)
    return kernel


def sent(kernel: Kernel, name: str, now: float = 1.0) -> str:
    """Where a request goes."""
    request = Request(name, "m", "a", "t", Promise(1.0, 0.05), prompt_bytes=2000)
    (command,) = kernel.handle(RequestArrived(request), now)
    assert isinstance(command, Dispatch)
    return command.worker_id


def standing(kernel: Kernel, now: float) -> Standing:
    """How w0 looks to a policy."""
    return kernel.pools["m"].standing(0, now)


@pytest.mark.parametrize("policy", ["headroom", "least-requests"])
def test_work_goes_where_others_have_less(policy: str) -> None:
    kernel = fleet(policy)
    kernel.handle(PeerReported("g1", [BUSY]), 0.9)
    assert {sent(kernel, f"r{i}") for i in range(3)} == {"w1"}


def test_what_a_worker_has_is_what_this_gateway_and_others_have_there() -> None:
    kernel = fleet()
    kernel.handle(PeerReported("g1", [BUSY]), 1.0)
    kernel.handle(PeerReported("g2", [load("w1", 1), load(streams=2, ahead=500.0)]), 1.0)
    seen = standing(kernel, 1.0)
    assert (seen.streams, seen.everyone, seen.ahead) == (42, 45, 3_000.0)
    assert (seen.kv, seen.kv_all, seen.prefill_rate) == (60_000.0, 63_000.0, 800.0)
    assert kernel.pools["m"].load(0) == 45
    assert kernel.pools["m"].load(1) == 1


def test_the_newest_word_of_a_gateway_replaces_the_one_before() -> None:
    kernel = fleet()
    kernel.handle(PeerReported("g1", [BUSY]), 1.0)
    kernel.handle(PeerReported("g1", [load(streams=2)]), 1.1)
    assert standing(kernel, 1.1).streams == 2
    kernel.handle(PeerReported("g1", []), 1.2)
    assert standing(kernel, 1.2).streams == 0


def test_who_is_silent_is_forgotten_with_the_next_look_at_the_worker() -> None:
    kernel = fleet()
    kernel.handle(PeerReported("g1", [BUSY]), 1.0)
    kernel.handle(PeerReported("g2", [load(streams=2)]), 4.0)
    for at, streams in ((0.9, 42), (1.1, 2), (3.9, 2), (4.1, 0)):
        now = FORGET_S + at
        kernel.handle(WorkerReported("w0", HEALTHY), now)
        assert standing(kernel, now).streams == streams


def test_news_that_was_long_on_its_way_is_forgotten_so_much_sooner() -> None:
    kernel = fleet()
    kernel.handle(PeerReported("g1", [BUSY], age_s=4.0), 5.0)
    kernel.handle(WorkerReported("w0", HEALTHY), FORGET_S + 0.9)
    assert standing(kernel, FORGET_S + 0.9).streams == 40
    kernel.handle(WorkerReported("w0", HEALTHY), FORGET_S + 1.1)
    assert standing(kernel, FORGET_S + 1.1).streams == 0


def test_news_of_unknown_workers_does_no_harm() -> None:
    kernel = fleet()
    assert kernel.handle(PeerReported("g1", [load("w9", 3)]), 1.0) == []
    assert standing(kernel, 1.0).streams == 0


def test_steps_are_learned_with_the_streams_that_others_have_in_them() -> None:
    """What a step of 128 streams takes is not what one stream takes, even if one alone is ours."""
    alone, among = fleet(), fleet()
    for kernel, others in ((alone, 0), (among, 127)):
        sent(kernel, "r")
        kernel.handle(FirstTokenSeen("r", 1.1), 1.1)
        kernel.handle(PeerReported("g1", [load(streams=others)]), 1.1)
        steps = [Step(1.1 + 0.05 * i, 0.05, 1, 1) for i in range(1, 60)]
        kernel.handle(StepsSeen("w0", steps), 4.1)
    of_one, of_128 = (k.workers["w0"].timing.model() for k in (alone, among))
    assert of_one.step_s(1) == pytest.approx(0.05, rel=0.02)
    assert of_128.step_s(128) == pytest.approx(0.05, rel=0.02)
    assert of_128.step_s(1) < 0.9 * of_one.step_s(1)


def test_a_gateway_tells_what_it_has_in_flight_itself_and_only_that() -> None:
    kernel = fleet()
    kernel.handle(PeerReported("g1", [load("w0", 1), load("w1", 100)]), 0.9)
    assert kernel.loads(1.0) == []
    assert sent(kernel, "r1") == "w0"
    (told,) = kernel.loads(1.0)
    assert (told.worker_id, told.streams, told.arriving) == ("w0", 0, 1)
    assert told.ahead == told.context_arriving == pytest.approx(500.0)
    kernel.handle(FirstTokenSeen("r1", 1.1), 1.1)
    (told,) = kernel.loads(1.1)
    assert (told.streams, told.arriving, told.ahead) == (1, 0, 0.0)
    assert told.context == pytest.approx(500.0)
    assert told.prefill_rate > 0


gateways = st.sampled_from(["g1", "g2", "g3"])
words = st.tuples(gateways, st.none() | st.integers(1, 50), st.floats(0.0, 4.0))


@given(st.lists(words, max_size=30))
def test_the_sum_is_always_that_of_the_last_words_of_who_was_heard_lately(
    said: list[tuple[str, int | None, float]],
) -> None:
    elsewhere, last, now = Elsewhere(), dict[str, tuple[int, float]](), 0.0
    for gateway, streams, wait_s in said:
        now += wait_s
        elsewhere.forget(now)
        last = {g: told for g, told in last.items() if told[1] > now - FORGET_S}
        before = elsewhere.streams
        told = None if streams is None else load(streams=streams, arriving=1)
        if not elsewhere.heard(gateway, told, now):
            assert elsewhere.streams == before
        last.pop(gateway, None)
        if streams is not None:
            last[gateway] = streams, now
        assert elsewhere.streams == sum(streams for streams, _ in last.values())
        assert elsewhere.requests == elsewhere.streams + len(last)
