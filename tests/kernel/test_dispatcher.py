"""Who goes first, who waits for how long, and who is turned away?

The policy is the plainest one: a worker takes so many requests at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import ceil
from typing import Any

import pytest
from msgspec.structs import replace

from paceline.domain.commands import (
    Command,
    Degrade,
    Dispatch,
    Fail,
    Hold,
    Prediction,
    Shed,
)
from paceline.domain.facts import (
    ClientLeft,
    DispatchFailed,
    Fact,
    FirstTokenSeen,
    RequestArrived,
    StreamBroke,
    StreamEnded,
    StreamStopped,
    TimerFired,
    WorkerAdded,
    WorkerReported,
)
from paceline.domain.promise import Promise
from paceline.domain.request import Request
from paceline.domain.worker import Worker, WorkerReport
from paceline.kernel import Kernel, Settings
from paceline.kernel.legs import Legs
from paceline.kernel.retries import RATE, SAVINGS
from paceline.policy.fleet import Choice, Fleet, Policy
from paceline.policy.standing import Ask

WEIGHTS = {"premium": 8.0, "standard": 2.0, "free": 0.5}
TTFT_S = 0.1
"""What every request takes to its first token."""


def slots(count: int) -> Policy:
    """Each worker takes so many requests; the one with fewest is next."""

    def policy(fleet: Fleet, ask: Ask, places: Sequence[int]) -> Choice:
        place = min(places, key=lambda i: (fleet.load(i), fleet.ids[i]))
        predicted = Prediction(ttft_s=TTFT_S, itl_s=0.01, headroom=0.0)
        return Choice(place, "fewest", predicted, wait=fleet.load(place) >= count)

    return policy


def request(name: str, tier: str = "standard", tenant: str = "a", **fields: Any) -> Request:
    """Of 1,000 prompt tokens, and without a promise."""
    plain = Request(
        name, "m", tenant, tier, Promise(), WEIGHTS[tier], prompt_tokens=1000, resumable=True
    )
    return replace(plain, **fields)


class Play:
    """A kernel, its clock, and all that it has ordered."""

    def __init__(self, workers: int = 1, room: int = 1, **steering: Any) -> None:
        self.kernel = Kernel(Settings(**steering), slots(room))
        self.now = 0.0
        self.ordered: list[tuple[float, Command]] = []
        for i in range(workers):
            self.joins(f"w{i}")

    def tell(self, *facts: Fact) -> list[Command]:
        commands = [command for fact in facts for command in self.kernel.handle(fact, self.now)]
        self.ordered += [(self.now, command) for command in commands]
        return commands

    def joins(self, worker_id: str, model: str = "m") -> list[Command]:
        worker = Worker(worker_id, model, f"http://{worker_id}")
        return self.tell(WorkerAdded(worker), self.healthy(worker_id))

    @staticmethod
    def healthy(worker_id: str, yes: bool = True) -> WorkerReported:
        return WorkerReported(worker_id, WorkerReport(yes))

    def asks(self, name: str, tier: str = "standard", **fields: Any) -> list[Command]:
        return self.tell(RequestArrived(request(name, tier, **fields)))

    def begins(self, name: str) -> list[Command]:
        return self.tell(FirstTokenSeen(name, self.now))

    def ends(self, name: str) -> list[Command]:
        return self.tell(StreamEnded(name, 100, itl_s=0.01))

    def passes(self, seconds: float) -> list[Command]:
        """Time goes by, and timers fire as they are wanted."""
        before, until = len(self.ordered), self.now + seconds
        while (due := self.kernel.next_deadline()) <= until:
            self.now = max(self.now, due)
            self.tell(TimerFired())
        self.now = until
        return [command for _, command in self.ordered[before:]]

    def served(self, every_s: float = 0.0) -> list[str]:
        """Let each request on a worker end in turn until none is left; in which order they went."""
        before = len(self.ordered)
        while on := [w.ledger.entries for w in self.kernel.workers.values() if w.ledger.entries]:
            self.passes(every_s)
            self.ends(next(iter(on[0])))
        return sent(command for _, command in self.ordered[before:])


def sent(commands: Iterable[Command]) -> list[str]:
    """The requests that go to a worker, in order."""
    return [c.request_id for c in commands if isinstance(c, Dispatch)]


# Waiting for room.


def test_with_room_at_hand_a_request_waits_for_nothing() -> None:
    play = Play(workers=2)
    assert sent(play.asks("a") + play.asks("b")) == ["a", "b"]


def test_without_room_a_request_waits_is_told_so_once_and_goes_when_room_comes() -> None:
    play = Play()
    play.asks("a")
    assert [type(command) for command in play.asks("b")] == [Hold]
    assert play.passes(3.0) == []
    assert play.kernel.held() == {"m": 1}
    assert sent(play.ends("a")) == ["b"]
    assert play.kernel.held() == {"m": 0}


def test_room_that_comes_without_a_word_is_found_by_looking() -> None:
    play = Play()
    play.asks("a")
    play.asks("b")
    play.kernel._dispatcher._legs = Legs(slots(2))
    assert sent(play.passes(0.1)) == ["b"]


def test_a_client_that_leaves_while_waiting_is_not_served() -> None:
    play = Play()
    for name in "abc":
        play.asks(name)
    assert play.tell(ClientLeft("b")) == []
    assert sent(play.ends("a")) == ["c"]
    assert play.kernel.requests.keys() == {"c"}


def test_waiting_for_room_has_an_end() -> None:
    play = Play(max_wait_s=30.0)
    play.asks("a")
    play.asks("b")
    assert play.passes(29.9) == []
    (shed,) = play.passes(0.2)
    assert isinstance(shed, Shed)
    assert not shed.unavailable


# Who goes first.


def test_premium_overtakes_free_that_waits() -> None:
    play = Play()
    for name, tier in (("a", "free"), ("b", "free"), ("c", "standard"), ("d", "premium")):
        play.asks(name, tier)
    assert play.served() == ["d", "c", "b"]


def test_a_late_premium_request_does_not_wait_behind_all_free_ones() -> None:
    play = Play()
    play.asks("a")
    play.asks("late", "premium", promise=Promise(ttft_s=0.5))
    play.asks("free", "free", promise=Promise(ttft_s=60.0))
    play.passes(5.0)
    assert play.served() == ["late", "free"]


def test_in_a_tier_whoever_can_still_be_helped_goes_before_the_late() -> None:
    play = Play()
    play.asks("a")
    play.asks("late", promise=Promise(ttft_s=0.5))
    play.passes(5.0)
    play.asks("in time", promise=Promise(ttft_s=5.0))
    assert play.served() == ["in time", "late"]


def test_what_is_sent_too_late_does_not_tell_what_those_in_time_need() -> None:
    play = Play()
    play.asks("first", promise=Promise(ttft_s=1.0))
    play.asks("late", promise=Promise(ttft_s=0.15))
    usual_s = play.kernel._dispatcher.usual_s
    play.passes(0.5)
    play.ends("first")
    assert sent(command for _, command in play.ordered)[-1] == "late"
    assert play.kernel._dispatcher.usual_s == usual_s > 0.0


def test_the_tighter_promise_goes_first() -> None:
    play = Play()
    play.asks("a")
    play.asks("easy", promise=Promise(ttft_s=20.0))
    play.asks("urgent", promise=Promise(ttft_s=5.0))
    assert play.served() == ["urgent", "easy"]


def test_a_flood_of_one_tenant_leaves_the_others_their_share() -> None:
    play = Play()
    for i in range(20):
        play.asks(f"f{i:02}", tenant="flood", prompt_tokens=5000)
    for i in range(5):
        play.asks(f"m{i}", tenant="modest", prompt_tokens=5000)
    first = play.served()[:10]
    assert sum(name.startswith("m") for name in first) in (4, 5)


def test_who_has_waited_longest_goes_now_and_then_whatever_its_tier() -> None:
    play = Play()
    play.asks("a")
    play.asks("free", "free")
    for i in range(40):
        play.asks(f"p{i:02}", "premium")
    assert "free" in play.served()[:20]


# Turning away.


def test_only_so_many_of_a_tier_may_wait() -> None:
    play = Play(max_waiting=2)
    answers = [play.asks(name)[0] for name in "abcd"]
    assert [type(answer) for answer in answers] == [Dispatch, Hold, Hold, Shed]
    assert isinstance(play.asks("e", "premium")[0], Hold)


SOON: dict[str, Any] = {"overload": "shed", "promise": Promise(ttft_s=3.0)}
"""Of a tier that turns away whom it would serve too late."""


def a_queue_of(count: int, room: int = 1) -> Play:
    """So many wait, and one goes a second."""
    play = Play(room=room)
    for i in range(count + 6):
        play.asks(f"q{i:02}")
    for i in range(6):
        play.passes(1.0)
        play.ends(f"q{i:02}")
    assert play.kernel.held() == {"m": count - 1}
    return play


def test_whoever_would_be_served_too_late_is_refused_at_once() -> None:
    (shed,) = a_queue_of(10).asks("x", **SOON)
    assert isinstance(shed, Shed)
    assert not shed.unavailable


def test_whoever_would_be_served_in_time_may_wait() -> None:
    (hold,) = a_queue_of(2).asks("x", **SOON)
    assert isinstance(hold, Hold)


def test_who_comes_back_when_it_was_told_to_is_served_in_time() -> None:
    play = a_queue_of(10)
    (shed,) = play.asks("x", **SOON)
    assert isinstance(shed, Shed)
    assert shed.retry_after_s == pytest.approx(9 - 3, abs=1.5)
    come_back_at = play.now + ceil(shed.retry_after_s)
    for i in range(6, 16):
        play.passes(1.0)
        play.ends(f"q{i:02}")
        if play.now == come_back_at:
            assert isinstance(play.asks("again", **SOON)[0], Hold)
    (went_at,) = [at for at, command in play.ordered if sent([command]) == ["again"]]
    assert went_at + TTFT_S < come_back_at + 3.0


def test_whoever_is_too_late_after_all_is_turned_away_then() -> None:
    play = Play()
    play.asks("a")
    play.asks("x", **SOON)
    assert play.passes(2.7) == []
    (shed,) = play.passes(0.5)
    assert isinstance(shed, Shed)
    assert not shed.unavailable
    assert play.kernel.requests.keys() == {"a"}


def test_time_when_nobody_waited_says_nothing_about_the_pace() -> None:
    play = Play()
    play.passes(1000.0)
    for name in "abc":
        play.asks(name)
    play.passes(0.5)
    play.ends("a")
    assert isinstance(play.asks("x", **SOON)[0], Hold)


def test_where_nobody_was_ever_sent_nobody_is_refused_early() -> None:
    play = Play(workers=0)
    for i in range(4):
        assert isinstance(play.asks(f"x{i}", **SOON)[0], Hold)
        play.passes(0.5)


# Degrading.


def lower(name: str, **fields: Any) -> dict[str, Any]:
    """A promise of a second, or else this."""
    instead = request(name, "free", promise=Promise(ttft_s=60.0), overload="queue")
    return {
        "overload": "degrade",
        "promise": Promise(ttft_s=1.0),
        "instead": replace(instead, **fields),
    }


def test_whoever_is_too_late_for_its_tier_waits_in_a_lower_one() -> None:
    play = Play()
    play.asks("a")
    play.asks("b", "premium", **lower("b"))
    assert play.passes(0.5) == []
    degrade, *holds = play.passes(1.0)
    assert isinstance(degrade, Degrade)
    assert (degrade.tier, degrade.model) == ("free", "m")
    assert all(isinstance(command, Hold) for command in holds)
    play.asks("c", "standard")
    assert play.served() == ["c", "b"]


def test_whoever_is_too_late_for_its_model_goes_to_another_that_has_room() -> None:
    play = Play()
    play.joins("n0", "n")
    play.asks("a")
    play.asks("b", **lower("b", model="n"))
    degrade, dispatch = play.passes(1.5)
    assert isinstance(degrade, Degrade)
    assert degrade.model == "n"
    assert isinstance(dispatch, Dispatch)
    assert dispatch.worker_id == "n0"
    assert play.kernel.held() == {"m": 0}


def test_the_time_that_it_has_waited_counts_also_in_the_lower_tier() -> None:
    play = Play()
    play.asks("a")
    shedding = lower("b", promise=Promise(ttft_s=4.0), overload="shed")
    play.asks("b", **shedding)
    commands = play.passes(4.5)
    assert [type(command) for command in commands if not isinstance(command, Hold)] == [
        Degrade,
        Shed,
    ]


# No worker at all.


def test_without_any_worker_a_request_is_told_so_after_a_while() -> None:
    play = Play(workers=0, hold_s=5.0)
    play.asks("a")
    assert play.passes(4.9) == []
    (shed,) = play.passes(0.3)
    assert isinstance(shed, Shed)
    assert shed.unavailable
    assert shed.retry_after_s > 0


def test_a_worker_that_comes_in_time_serves_whoever_waits() -> None:
    play = Play(workers=0)
    play.asks("a")
    play.passes(4.0)
    assert sent(play.joins("w0")) == ["a"]


def test_who_came_when_all_had_been_down_for_long_waits_as_long_as_anybody() -> None:
    play = Play(workers=0)
    play.asks("first")
    play.passes(3.0)
    play.asks("second")
    (shed,) = play.passes(3.0)
    assert shed.request_id == "first"
    (shed,) = play.passes(3.0)
    assert shed.request_id == "second"


def test_each_outage_has_its_own_patience() -> None:
    """A stream that breaks in a second outage does not pay for the first one."""
    play = Play()
    play.tell(play.healthy("w0", False))
    play.asks("a")
    play.passes(1.0)
    assert sent(play.tell(play.healthy("w0"))) == ["a"]
    play.begins("a")
    play.passes(60.0)
    play.tell(play.healthy("w0", False), broken("a", "w0"))
    assert play.passes(4.0) == []
    assert sent(play.tell(play.healthy("w0"))) == ["a"]


# Again, and elsewhere.


def broken(name: str, worker_id: str, produced: int = 50, blame: bool = True) -> StreamBroke:
    return StreamBroke(name, worker_id, "connection lost", produced, resumable=True, blame=blame)


def test_a_stream_that_broke_goes_on_elsewhere_from_its_last_token() -> None:
    play = Play(workers=2)
    play.asks("a")
    play.begins("a")
    (dispatch,) = play.tell(broken("a", "w0", produced=7))
    assert isinstance(dispatch, Dispatch)
    assert (dispatch.worker_id, dispatch.produced, dispatch.attempt) == ("w1", 7, 2)


def test_a_stream_that_is_to_go_on_goes_before_new_requests_of_any_tier() -> None:
    play = Play(workers=2)
    for name in ("a", "b"):
        play.asks(name, "free")
        play.begins(name)
    play.asks("new", "premium")
    (hold,) = play.tell(broken("a", "w0"))
    assert isinstance(hold, Hold)
    assert sent(play.ends("b")) == ["a"]


def test_a_paused_stream_waits_in_its_tier_and_goes_on_from_its_last_token() -> None:
    play = Play()
    play.asks("a", "free", preemptible=True)
    play.begins("a")
    play.asks("new", "premium")
    assert sent(play.tell(StreamStopped("a", "w0", 30))) == ["new"]
    play.asks("more", "standard")
    assert sent(play.ends("new")) == ["more"]
    (dispatch,) = play.ends("more")
    assert isinstance(dispatch, Dispatch)
    assert (dispatch.request_id, dispatch.produced) == ("a", 30)


def test_a_paused_stream_is_never_turned_away_for_want_of_a_seat() -> None:
    play = Play(max_waiting=1)
    play.asks("a", "free", preemptible=True)
    play.begins("a")
    play.asks("b", "free")
    play.asks("new", "premium")
    play.passes(1.0)
    play.tell(StreamStopped("a", "w0", 30))
    assert play.served() == ["b", "a"]


def test_a_stream_that_finds_no_worker_in_the_end_fails() -> None:
    play = Play(hold_s=5.0)
    play.asks("a")
    play.begins("a")
    play.tell(play.healthy("w0", False), broken("a", "w0"))
    (fail,) = play.passes(6.0)
    assert isinstance(fail, Fail)
    assert "connection lost" in fail.because
    assert not play.kernel.requests


def test_after_a_crash_streams_beyond_the_budget_are_paced_and_none_is_lost() -> None:
    crowd, extra = int(SAVINGS) + 30, 30
    play = Play(room=1000, attempts=10)
    names = [f"r{i:03}" for i in range(crowd)]
    for name in names:
        play.asks(name)
        play.begins(name)
    play.joins("w1")
    paid = play.kernel._dispatcher._retries._saved
    commands = play.tell(*(broken(name, "w0") for name in names))
    at_once = sent(commands)
    assert len(at_once) == int(paid) == int(SAVINGS)
    assert play.kernel.held() == {"m": extra}
    assert sent(play.passes(1.1)) == names[len(at_once) :][: int(RATE)]
    play.passes(extra / RATE)
    assert play.kernel.held() == {"m": 0}
    again = [c.request_id for _, c in play.ordered if isinstance(c, Dispatch) and c.attempt == 2]
    assert again == names


def test_new_requests_go_on_being_served_while_retries_are_paced() -> None:
    play = Play(room=1000)
    for i in range(int(SAVINGS) + 5):
        play.asks(f"r{i:03}")
    play.joins("w1")
    play.tell(*(broken(f"r{i:03}", "w0") for i in range(int(SAVINGS) + 5)))
    assert sent(play.asks("new")) == ["new"]


def test_a_retry_that_found_no_room_costs_nothing() -> None:
    play = Play(workers=2)
    for name in ("a", "b"):
        play.asks(name)
    play.tell(DispatchFailed("a", "w0", "refused"), play.healthy("w0", False))
    play.passes(3.0)
    assert play.kernel._dispatcher._retries._saved == pytest.approx(SAVINGS)
