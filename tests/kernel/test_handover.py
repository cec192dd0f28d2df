"""Two workers share a request: is the answer always right, and does it always come?"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pytest
from msgspec.structs import replace

from paceline.domain.commands import Command, Dispatch, Fail, Prefill, Shed
from paceline.domain.facts import (
    ClientLeft,
    DispatchFailed,
    Fact,
    FirstTokenSeen,
    Prefilled,
    RequestArrived,
    Step,
    StepsSeen,
    StreamBroke,
    StreamEnded,
    StreamStopped,
    TimerFired,
    WorkerAdded,
    WorkerRemoved,
    WorkerReported,
)
from paceline.domain.promise import Promise
from paceline.domain.request import Request
from paceline.domain.worker import Worker, WorkerReport
from paceline.kernel import Kernel, Settings
from paceline.kernel.legs import Legs
from paceline.kernel.live import Live
from paceline.policy.disagg import LOCAL_TOKENS, QUEUED, apart, fetching
from paceline.policy.fleet import Choice, Fleet
from paceline.policy.route import headroom
from paceline.policy.standing import Ask

P0 = Worker("p0", "m", "http://p0", role="prefill", transfer="nixl")
P1 = replace(P0, id="p1")
D0 = Worker("d0", "m", "http://d0", role="decode", transfer="nixl")
D1 = replace(D0, id="d1")
S0 = replace(P0, id="s0", transfer="sglang")
S1 = replace(D0, id="s1", transfer="sglang")


class Apart:
    """As headroom, but whatever can be prefilled by another worker is."""

    ways = staticmethod(apart)
    fetching = staticmethod(partial(fetching, headroom))

    def __call__(self, fleet: Fleet, ask: Ask, places: Sequence[int]) -> Choice:
        return headroom(fleet, ask, places)

    def learn(self, fact: Fact, now: float) -> None:
        """Nothing."""


class Play:
    """A kernel that hands over whatever it can, its clock, and what it has ordered."""

    def __init__(self, *workers: Worker, **steering: int) -> None:
        self.kernel = Kernel(Settings(**steering), Apart())  # type: ignore[arg-type]
        self.now = 0.0
        for worker in workers:
            self.tell(WorkerAdded(worker), self.well(worker.id))

    def tell(self, *facts: Fact) -> list[Command]:
        return [command for fact in facts for command in self.kernel.handle(fact, self.now)]

    @staticmethod
    def well(worker_id: str, yes: bool = True, kv: int | None = None) -> WorkerReported:
        return WorkerReported(worker_id, WorkerReport(yes, kv_capacity_tokens=kv))

    def asks(self, name: str, prompt: int = 1000) -> list[Command]:
        return self.tell(RequestArrived(request(name, prompt)))

    def prefilled(self, name: str, worker: Worker = P0) -> list[Command]:
        return self.tell(Prefilled(name, worker.id, self.now, 1000, 0))

    def begins(self, name: str) -> list[Command]:
        return self.tell(FirstTokenSeen(name, self.now))

    def ends(self, name: str) -> list[Command]:
        return self.tell(StreamEnded(name, 100, itl_s=0.01))

    def fails(self, name: str, worker: Worker, blame: bool = True) -> list[Command]:
        return self.tell(DispatchFailed(name, worker.id, "x", blame=blame))

    def passes(self, seconds: float) -> list[Command]:
        """Time goes by, and timers fire as they are wanted."""
        commands, until = list[Command](), self.now + seconds
        while (due := self.kernel.next_deadline()) <= until:
            self.now = max(self.now, due)
            commands += self.tell(TimerFired())
        self.now = until
        return commands

    def held(self, worker: Worker) -> float:
        ledger = self.kernel.workers[worker.id].ledger
        ledger.settle_held(self.now)
        return ledger.held

    def books(self) -> dict[str, list[str]]:
        """Who stands in whose books."""
        return {
            name: list(worker.ledger.entries)
            for name, worker in self.kernel.workers.items()
            if worker.ledger.entries
        }


def request(name: str, prompt: int = 1000) -> Request:
    return Request(
        name, "m", "a", "t", Promise(), prompt_tokens=prompt, max_tokens=100, resumable=True
    )


def told(commands: list[Command]) -> list[tuple[str, ...]]:
    """Prefills by their worker, dispatches by theirs and the one that they fetch from."""
    found: list[tuple[str, ...]] = []
    for command in commands:
        match command:
            case Prefill():
                found.append(("prefill", command.worker_id))
            case Dispatch():
                found.append((command.worker_id, command.prefilled_at))
            case Shed() | Fail():
                found.append((type(command).__name__,))
    return found


def test_a_prompt_is_prefilled_on_one_worker_and_answered_by_another() -> None:
    play = Play(P0, D0)
    assert told(play.asks("a")) == [("prefill", "p0")]
    assert play.books() == {"p0": ["a"]}
    play.now = 0.1
    assert told(play.prefilled("a")) == [("d0", "p0")]
    assert play.books() == {"d0": ["a"]}
    assert play.held(P0) == 1000
    play.begins("a")
    assert play.held(P0) == 0
    play.ends("a")
    assert play.books() == {}


def test_a_worker_that_only_prefills_answers_nobody() -> None:
    play = Play(P0)
    assert told(play.asks("a")) == []
    assert told(play.passes(20.0)) == [("Shed",)]


def test_a_failed_prefill_falls_back_at_once_to_the_worker_that_answers() -> None:
    play = Play(P0, P1, D0)
    (_, first), *_ = told(play.asks("a"))
    failed = P0 if first == "p0" else P1
    assert told(play.fails("a", failed)) == [("d0", "")]
    assert play.books() == {"d0": ["a"]}
    assert play.kernel.workers[first].failures == 1
    assert not play.kernel.workers[first].usable(play.now)


def test_a_prefill_that_fails_without_blame_falls_back_too() -> None:
    play = Play(P0, D0)
    play.asks("a")
    assert told(play.fails("a", P0, blame=False)) == [("d0", "")]
    assert play.kernel.workers["p0"].failures == 0


def test_a_late_word_from_a_prefill_worker_changes_nothing() -> None:
    play = Play(P0, D0)
    play.asks("a")
    play.fails("a", P0)
    assert play.prefilled("a") == []
    assert play.prefilled("stranger") == []
    assert play.books() == {"d0": ["a"]}
    assert play.held(P0) == 0


def waiting(play: Play) -> None:
    """A request is prefilled that no worker has room to answer."""
    play.asks("a")
    play.tell(play.well("d0", False))
    assert told(play.prefilled("a")) == []
    assert play.kernel.held() == {"m": 1}


def test_what_is_prefilled_waits_for_a_worker_and_then_goes() -> None:
    play = Play(P0, D0)
    waiting(play)
    assert told(play.passes(2.0)) == []
    assert told(play.tell(play.well("d0"))) == [("d0", "p0")]


def test_what_is_prefilled_goes_before_newcomers() -> None:
    play = Play(P0, D0)
    waiting(play)
    play.asks("b")
    assert told(play.tell(play.well("d0")))[0] == ("d0", "p0")


def test_a_prompt_is_never_fetched_after_its_lease_but_prefilled_again() -> None:
    play = Play(replace(P0, lease_s=3.0), D0, hold_s=60)
    waiting(play)
    assert told(play.passes(3.1)) == []
    assert play.held(P0) == 0
    assert told(play.tell(play.well("d0"))) == [("prefill", "p0")]


def test_word_that_comes_late_does_not_make_the_lease_longer() -> None:
    play = Play(replace(P0, lease_s=3.0), D0)
    play.asks("a")
    play.passes(3.1)
    assert told(play.prefilled("a")) == [("prefill", "p0")]


def test_there_must_be_time_for_the_transfer_within_the_lease() -> None:
    play = Play(replace(P0, lease_s=3.0), D0)
    play.asks("a")
    play.passes(2.98)
    assert told(play.prefilled("a")) == []
    assert told(play.passes(0.2)) == [("prefill", "p0")]


@pytest.mark.parametrize(
    "trouble",
    [WorkerRemoved("p0"), Play.well("p0", False), DispatchFailed("b", "p0", "it crashed")],
)
def test_what_a_worker_held_is_void_after_any_trouble_of_it(trouble: Fact) -> None:
    play = Play(P0, D0)
    play.asks("b")
    waiting(play)
    play.tell(trouble)
    dispatched = [way for way in told(play.tell(play.well("d0"))) if way[0] == "d0"]
    assert ("d0", "p0") not in dispatched
    assert ("d0", "") in dispatched


def test_a_worker_that_drains_leaves_when_nobody_is_there_any_more() -> None:
    play = Play(P0, D0)
    play.asks("a")
    play.tell(WorkerRemoved("p0"))
    assert "p0" in play.kernel.workers
    play.prefilled("a")
    assert "p0" not in play.kernel.workers
    play.passes(0.2)
    assert play.books() == {"d0": ["a"]}


def test_a_client_that_leaves_while_prefilled_leaves_the_books() -> None:
    play = Play(P0, D0)
    play.asks("a")
    play.tell(ClientLeft("a"))
    assert play.books() == {}
    assert not play.kernel.requests


def test_a_prefill_that_is_stopped_is_begun_anew() -> None:
    play = Play(P0, P1, D0)
    ((_, first),) = told(play.asks("a"))
    assert told(play.tell(StreamStopped("a", first, 0))) in (
        [("prefill", "p0")],
        [("prefill", "p1")],
    )


def test_a_client_that_leaves_between_the_legs_leaves_the_blocks_until_the_lease_ends() -> None:
    play = Play(P0, D0)
    waiting(play)
    play.tell(ClientLeft("a"))
    assert play.kernel.held() == {"m": 0}
    assert play.held(P0) == 1000
    play.passes(P0.lease_s)
    assert play.held(P0) == 0


def test_when_the_answering_worker_fails_the_prompt_is_prefilled_again() -> None:
    play = Play(P0, D0, D1)
    play.asks("a")
    ((first, _),) = told(play.prefilled("a"))
    assert told(play.fails("a", D0 if first == "d0" else D1)) == [("prefill", "p0")]


def test_when_only_the_hand_over_failed_the_same_worker_prefills_by_itself() -> None:
    play = Play(P0, D0)
    play.asks("a")
    play.prefilled("a")
    assert told(play.fails("a", D0, blame=False)) == [("d0", "")]


def test_an_answer_that_goes_on_elsewhere_is_not_handed_over() -> None:
    play = Play(P0, D0, D1)
    play.asks("a")
    ((first, _),) = told(play.prefilled("a"))
    play.begins("a")
    broke = StreamBroke("a", first, "x", produced=10, resumable=True)
    ((second, source),) = told(play.tell(broke))
    assert {first, second} == {"d0", "d1"}
    assert source == ""


def test_a_worker_that_is_kept_for_what_is_prefilled_keeps_no_prefill_worker_idle() -> None:
    play = Play(P0, P1, D0)
    flow(play, 5)
    waits = play.kernel.pools["m"].workers["d0"]
    chosen = Legs(headroom).choose(
        play.kernel.pools["m"],
        live := Live(request("a"), play.now),
        play.kernel.pools["m"].ask(live.request, 0.0, play.now),
        [waits.place],
        play.kernel.pools["m"].sources(play.now),
        [waits.place],
    )
    assert chosen is not None
    assert chosen.source is not None


def test_a_prefill_worker_gets_only_what_keeps_it_busy() -> None:
    play = Play(P0, D0)
    sent = [told(play.asks(f"r{i}")) for i in range(8)]
    budget = play.kernel.workers["p0"].windows.budget
    assert sent.count([("prefill", "p0")]) <= 1 + budget // 1000
    assert play.kernel.held()["m"] == sent.count([])
    assert play.held(D0) == 0


def test_a_full_prefill_worker_gets_nothing_more() -> None:
    play = Play(P0, D0)
    play.tell(play.well("p0", kv=1800))
    assert told(play.asks("a")) == [("prefill", "p0")]
    assert told(play.asks("b")) == []


def test_other_policies_hand_over_long_prompts_until_the_prefill_workers_have_enough() -> None:
    kernel = Kernel(Settings(policy="kv-cost"))
    for worker in (P0, P1, D0, D1):
        kernel.handle(WorkerAdded(worker), 0.0)
        kernel.handle(Play.well(worker.id), 0.0)

    def ways(count: int, tokens: int) -> list[tuple[str, ...]]:
        found: list[tuple[str, ...]] = []
        for i in range(count):
            request = Request(f"{tokens} {i}", "m", "a", "t", Promise(), prompt_tokens=tokens)
            found += told(kernel.handle(RequestArrived(request), 0.0))
        return sorted(found)

    short, long = int(LOCAL_TOKENS), int(LOCAL_TOKENS) + 1
    assert ways(2, short) == [("d0", ""), ("d1", "")]
    assert ways(QUEUED, long) == [
        *[("prefill", "p0")] * (QUEUED // 2),
        *[("prefill", "p1")] * (QUEUED // 2),
    ]
    assert ways(2, long + 1) == [("d0", ""), ("d1", "")]


# Both at once.


def test_where_both_workers_begin_at_once_both_are_told_at_once() -> None:
    play = Play(S0, S1)
    assert told(play.asks("a")) == [("prefill", "s0"), ("s1", "s0")]
    assert play.books() == {"s0": ["a"], "s1": ["a"]}
    assert play.prefilled("a", S0) == []
    assert play.books() == {"s1": ["a"]}
    assert play.held(S0) == 0
    play.begins("a")
    play.ends("a")
    assert play.books() == {}


def test_an_answer_may_begin_before_word_of_the_prefill_comes() -> None:
    play = Play(S0, S1)
    play.asks("a")
    play.begins("a")
    assert play.books() == {"s0": ["a"], "s1": ["a"]}
    play.prefilled("a", S0)
    assert play.books() == {"s1": ["a"]}


@pytest.mark.parametrize("failed", [S0, S1])
def test_when_one_of_two_at_once_fails_both_are_given_up(failed: Worker) -> None:
    play = Play(S0, S1, replace(S1, id="s2"))
    play.asks("a")
    play.fails("a", failed)
    on = play.books()
    assert [name for names in on.values() for name in names].count("a") == len(on)
    if failed is S0:
        assert set(on) in ({"s1"}, {"s2"})


def test_a_prefill_that_fails_when_the_answer_has_begun_does_no_harm() -> None:
    play = Play(S0, S1)
    play.asks("a")
    play.begins("a")
    assert play.fails("a", S0) == []
    assert play.books() == {"s1": ["a"]}


# What is learned.


def flow(play: Play, count: int, prefill_s: float = 0.2, away_s: float = 0.08) -> None:
    """So many requests, one after the other."""
    for i in range(count):
        name = f"f{i}"
        play.asks(name)
        play.now += prefill_s
        play.prefilled(name)
        play.now += away_s
        play.begins(name)
        play.tell(StepsSeen("d0", [Step(play.now, 0.0, 0, 0)]))
        for _ in range(20):
            play.now += 0.01
            play.tell(StepsSeen("d0", [Step(play.now, 0.01, 1, 1)]))
        play.ends(name)


def test_the_timing_of_a_prefill_worker_is_learned_from_its_prompts() -> None:
    play = Play(P0, D0)
    flow(play, 40)
    model = play.kernel.workers["p0"].timing.model()
    assert model.samples > 10
    assert model.step_s(0, 1000.0, 0.0, 0.5e6) == pytest.approx(0.2, rel=0.25)


def test_the_link_is_learned_and_prefill_is_not_blamed_on_the_worker_that_answers() -> None:
    play = Play(P0, D0)
    flow(play, 40)
    pool = play.kernel.pools["m"]
    link = pool.link(pool.workers["p0"].place, pool.workers["d0"].place)
    assert link is not None
    assert link.expected_s(1000) == pytest.approx(0.07, rel=0.4)
    assert play.kernel.workers["d0"].timing.model().step_s(1, 0.0, 1000.0) < 0.015
    assert play.kernel.workers["d0"].windows.overhead_s == 0.0


def test_how_requests_that_are_shared_turn_out_is_kept_apart() -> None:
    play = Play(P0, D0)
    flow(play, 40)
    pool = play.kernel.pools["m"]
    assert pool.handover.count == 40
    assert pool.ttft.count == 0
    assert play.kernel.workers["d0"].ttft.count == 0
    assert play.kernel.workers["d0"].itl.count == 40
    assert play.kernel.workers["d0"].trust == 1.0


def test_a_worker_that_waits_for_a_transfer_does_not_count_as_slow() -> None:
    play = Play(P0, D0)
    flow(play, 20, away_s=0.5)
    play.asks("a")
    play.now += 0.2
    play.prefilled("a")
    play.now += 0.3
    d0 = play.kernel.workers["d0"]
    standing = play.kernel.pools["m"].standing(d0.place, play.now)
    assert standing.slowdown(play.now) < 1.5


def test_a_worker_that_only_waits_for_a_slow_link_is_neither_slow_nor_hung() -> None:
    play = Play(replace(P0, lease_s=300.0), D0)
    flow(play, 40)
    play.asks("a")
    play.now += 0.2
    assert told(play.prefilled("a")) == [("d0", "p0")]
    play.tell(WorkerAdded(D1), play.well("d1"))
    assert play.passes(60.0) == []
    worker = play.kernel.workers["d0"]
    assert worker.troubles == 0
    assert play.kernel.pools["m"].standing(worker.place, play.now).slowdown(play.now) < 1.5
