"""Does a first token that is overdue count before it comes, and only once?"""

from __future__ import annotations

from paceline.domain.commands import Dispatch, Prefill
from paceline.domain.facts import FirstTokenSeen, RequestArrived, WorkerAdded
from paceline.domain.promise import Promise
from paceline.domain.request import Request
from paceline.domain.worker import Worker
from paceline.kernel import Kernel
from paceline.observe.course import Course
from paceline.observe.overdue import MOST, overdue
from paceline.observe.stalls import Stalls
from paceline.policy.causes import Cause

REQUEST = Request("r", "m", "acme", "chat", Promise(ttft_s=1.0))


def stalls() -> Stalls:
    """Of a kernel that holds a request, which has arrived at 0."""
    kernel = Kernel()
    for name in ("p", "d"):
        kernel.handle(WorkerAdded(Worker(name, "m", f"http://{name}")), 0.0)
    kernel.handle(RequestArrived(REQUEST), 0.0)
    return Stalls(kernel)


def test_a_request_that_waits_at_the_gateway_beyond_its_promise_is_lost_already() -> None:
    watch = stalls()
    watch.saw(0.0, RequestArrived(REQUEST), [])
    assert overdue(watch.awaiting(), 0.9) == []
    (loss,) = overdue(watch.awaiting(), 3.0)
    assert (loss.model, loss.worker, loss.cause) == ("m", "", Cause.GATEWAY_QUEUE)
    assert (loss.promises, loss.gaps, loss.seconds, loss.since) == (1, 1, 2.0, 1.0)
    assert (loss.tiers, loss.tenants) == ({"chat": 1}, {"acme": 1})


def test_a_prompt_that_waits_for_a_prefill_worker_is_lost_there() -> None:
    watch = stalls()
    watch.saw(0.0, RequestArrived(REQUEST), [])
    watch.saw(0.2, FirstTokenSeen("?", 0.2), [Prefill("r", "p", "long prompt")])
    (loss,) = overdue(watch.awaiting(), 3.0)
    assert (loss.worker, loss.cause) == ("p", Cause.OWN_PREFILL)


def test_what_an_engine_does_with_it_is_not_guessed() -> None:
    watch = stalls()
    watch.saw(0.0, RequestArrived(REQUEST), [Dispatch("r", "d", "it has room")])
    assert overdue(watch.awaiting(), 3.0) == []


def test_a_first_token_that_has_come_late_counts_once() -> None:
    watch = stalls()
    watch.saw(0.0, RequestArrived(REQUEST), [])
    watch.saw(2.0, RequestArrived(REQUEST), [Dispatch("r", "d", "it has room")])
    watch.saw(2.1, FirstTokenSeen("r", 2.1), [])
    watch.look(5.0)
    assert overdue(watch.awaiting(), 5.0) == []
    assert sum(loss.promises for loss in watch.losses.recent(5.0)) == 1


def test_a_flood_of_waiting_requests_is_counted_up_to_a_bound() -> None:
    flood = [
        Course(Request(f"r{i}", "m", "acme", "chat", Promise()), 0.0, 0.0) for i in range(3000)
    ]
    assert overdue(flood, 9.0) == []  # nothing is promised
    late = [Course(REQUEST, float(i), float(i)) for i in range(3000)]
    (loss,) = overdue(late, 9000.0)
    assert (loss.promises, loss.since) == (MOST, 1.0)
