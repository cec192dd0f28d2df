"""Whatever comes, in whatever order: is a request ever lost, doubled, or left in the books?

Facts are drawn blindly, late echoes and strangers among them. Beside the kernel stands a model of
what a host would know: who is on which worker, who waits, and how far each answer is.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import partial
from math import inf, isfinite

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    rule,
    run_state_machine_as_test,
)
from msgspec.structs import replace

from paceline.domain.commands import (
    Command,
    Degrade,
    Dispatch,
    Fail,
    Hold,
    Move,
    Pause,
    Prefill,
    Shed,
)
from paceline.domain.facts import (
    ClientLeft,
    DispatchFailed,
    Fact,
    FirstTokenSeen,
    PeerLoad,
    PeerReported,
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
from paceline.kernel.elsewhere import FORGET_S
from paceline.kernel.ledger import Ledger
from paceline.kernel.log import line, opening, replay
from paceline.policy.disagg import apart, fetching
from paceline.policy.fleet import Choice, Fleet
from paceline.policy.route import POLICIES, headroom
from paceline.policy.standing import Ask

ITS = "its"
"""Stands for the worker that the request is on."""
HEALTHY = WorkerReport(healthy=True)
WORKERS = (Worker("w0", "m", "http://w0"), Worker("w1", "m", "http://w1"))
OTHER = Worker("n0", "n", "http://n0")
SHARING = (
    Worker("p0", "m", "http://p0", role="prefill", transfer="nixl", lease_s=3.0),
    Worker("p1", "m", "http://p1", transfer="nixl"),
    Worker("d0", "m", "http://d0", role="decode", transfer="nixl"),
    Worker("s0", "m", "http://s0", role="prefill", transfer="sglang"),
    Worker("s1", "m", "http://s1", transfer="sglang"),
)
"""Those that can share a request, of which two do so at the same time."""
ONCE_MORE = 2.0
"""Seconds within which whoever waits goes again after the fleet has recovered."""


# What a host would know.


class Model:
    """Tells a kernel facts, and follows every request by what is told and commanded."""

    def __init__(self, steering: Settings) -> None:
        self.kernel = Kernel(steering)
        self.now = 0.0
        self.log = [opening(steering)]
        self.known: dict[str, Request] = {}
        """All that arrived and are not over."""
        self.on: dict[str, str] = {}
        """The worker that each request is on; the others wait."""
        self.handing: set[str] = set()
        """Those on a worker that prefills their prompt for another one."""
        self.beside: dict[str, str] = {}
        """The worker that prefills while another is at it too."""
        self.ready: dict[str, str] = {}
        """The worker that has prefilled a request which is not begun."""
        self.sent_at: dict[str, float] = {}
        """When its prompt was last sent to be prefilled."""
        self.begun: set[str] = set()
        """Those whose first token on this worker has come."""
        self.produced: dict[str, int] = {}
        self.attempts: dict[str, int] = defaultdict(int)
        for worker in (*WORKERS, OTHER):
            self.tell(WorkerAdded(worker))
            self.tell(WorkerReported(worker.id, HEALTHY))
        self._teach()
        for worker in SHARING:
            self.tell(WorkerAdded(worker))
            self.tell(WorkerReported(worker.id, HEALTHY))

    def _teach(self) -> None:
        """Let the kernel see how fast its workers are, so that it notices when one is not."""
        for name in ("first", "second"):
            plain = Request(name, "m", "a", "free", Promise(), prompt_bytes=400)
            self.tell(RequestArrived(plain))
        for name, worker_id in list(self.on.items()):
            self.tell(FirstTokenSeen(name, 0.02))
            self.tell(StepsSeen(worker_id, [Step(0.02 * i, 0.02, 1, 1) for i in range(2, 80)]))
        self.now = 1.6
        for name in list(self.on):
            self.tell(StreamEnded(name, 78, itl_s=0.02))

    def tell(self, fact: Fact) -> None:
        commands = self.kernel.handle(fact, self.now)
        self.log.append(line(self.now, fact, commands))
        self._learn(fact)
        for command in commands:
            self._obey(command)
        self._compare()
        if isinstance(fact, TimerFired):
            assert self.kernel.next_deadline() > self.now

    def _learn(self, fact: Fact) -> None:
        match fact:
            case RequestArrived(request):
                self.known.setdefault(request.id, request)
            case FirstTokenSeen(name) if name in self.on and name not in self.handing:
                self.begun.add(name)
                if name not in self.beside:
                    self.ready.pop(name, None)
            case StreamEnded(name) if name in self.on and name not in self.handing:
                self._over(name)
            case Prefilled(name, worker) if self.beside.get(name) == worker:
                del self.beside[name]
            case Prefilled(name, worker) if name in self.handing and self.on[name] == worker:
                del self.on[name]
                self.handing.remove(name)
                self.ready[name] = worker
            case DispatchFailed(name, worker) if name in self.begun:
                if self.beside.get(name) == worker:
                    del self.beside[name]
            case ClientLeft(name) if name in self.known:
                self._over(name)
            case DispatchFailed(name, worker) if self._is_on(name, worker):
                self._off(name)
            case StreamBroke(name, worker) if self._is_on(name, worker):
                if fact.resumable:
                    self._off(name, fact.produced)
                else:
                    self._over(name)
            case StreamStopped(name, worker, produced) if self._is_on(name, worker):
                self._off(name, produced)
            case _:
                pass

    def _is_on(self, name: str, worker: str) -> bool:
        return worker in (self.on.get(name), self.beside.get(name))

    def _off(self, name: str, produced: int = 0) -> None:
        del self.on[name]
        self._forget(name)
        if produced:
            self.produced[name] = produced

    def _over(self, name: str) -> None:
        del self.known[name]
        self.on.pop(name, None)
        self._forget(name)
        self.produced.pop(name, None)
        self.attempts.pop(name, None)

    def _forget(self, name: str) -> None:
        self.begun.discard(name)
        self.handing.discard(name)
        self.beside.pop(name, None)
        self.ready.pop(name, None)

    def _shares(self, command: Dispatch, taker: Worker) -> None:
        """A worker takes over from another: at once, or what that one is sure to have still."""
        name, source = command.request_id, command.prefilled_at
        giver = self.kernel.workers[source].worker
        assert taker.takes_from(giver)
        if giver.transfer == "sglang":
            assert name in self.handing
            assert self.on[name] == source
            self.handing.remove(name)
            self.beside[name] = source
        else:
            assert name not in self.on
            assert self.ready[name] == source
            assert self.now < self.sent_at[name] + giver.lease_s

    def _obey(self, command: Command) -> None:
        name = command.request_id
        assert name in self.known
        match command:
            case Prefill():
                worker = self.kernel.workers[command.worker_id].worker
                assert name not in self.on
                assert worker.prefills
                assert worker.model == self.known[name].model
                assert name not in self.produced
                self.attempts[name] += 1
                assert command.attempt == self.attempts[name]
                self.on[name], self.sent_at[name] = worker.id, self.now
                self.handing.add(name)
                self.ready.pop(name, None)
            case Dispatch():
                worker = self.kernel.workers[command.worker_id].worker
                if command.prefilled_at:
                    self._shares(command, worker)
                else:
                    assert name not in self.on
                    self.ready.pop(name, None)
                assert worker.answers
                assert worker.model == self.known[name].model
                assert command.produced == self.produced.get(name, 0)
                self.attempts[name] += not command.prefilled_at
                assert command.attempt == self.attempts[name]
                self.on[name] = command.worker_id
            case Hold():
                assert name not in self.on
            case Degrade(_, tier, model):
                assert name not in self.on
                instead = self.known[name].instead
                assert instead is not None
                assert (instead.tier, instead.model) == (tier, model)
                self.known[name] = instead
            case Shed() | Fail():
                assert name not in self.on
                assert not isinstance(command, Shed) or isfinite(command.retry_after_s)
                self._over(name)
            case Pause() | Move():
                assert name in self.on
                begun = name in self.begun or name in self.produced
                assert self.known[name].resumable or not begun

    def _compare(self) -> None:
        kernel = self.kernel
        assert {name: live.request for name, live in kernel.requests.items()} == self.known
        booked = {
            (name, worker.worker.id)
            for worker in kernel.workers.values()
            for name in worker.ledger.entries
        }
        assert booked == {*self.on.items(), *self.beside.items()}
        waiting = []
        for model, room in kernel._dispatcher._rooms.items():
            assert kernel.held()[model] == len(room)
            of_tier = {(r.weight, r.tier): room.waiting.of_tier(r) for r in self.known.values()}
            assert sum(of_tier.values()) == len(room.waiting)
            assert all(live.request.id in self.ready for live in room.handed)
            waiting += [*room.waiting._places]
            waiting += [live.request.id for live in (*room.returning, *room.handed)]
        assert sorted(waiting) == sorted(self.known.keys() - self.on.keys())
        for worker in kernel.workers.values():
            compare_sums(worker.ledger)
        assert kernel.next_deadline() < inf or not self.known

    # How it ends.

    def recover(self) -> None:
        """All workers are well, and other gateways have been forgotten."""
        self.now += FORGET_S
        for worker in (*WORKERS, OTHER, *SHARING):
            self.tell(WorkerAdded(worker))
            self.tell(WorkerReported(worker.id, replace(HEALTHY, healthy=False)))
            self.tell(WorkerReported(worker.id, HEALTHY))

    def finish(self) -> None:
        """Let the requests that are on workers be answered, one after the other."""
        until = self.now + ONCE_MORE + 0.5 * len(self.known)
        while self.known and self.now < until:
            for name in list(self.on):
                if name in self.beside:
                    self.tell(Prefilled(name, self.beside[name], self.now))
                if name in self.handing:
                    self.tell(Prefilled(name, self.on[name], self.now))
                elif name in self.on:
                    self.tell(FirstTokenSeen(name, self.now))
                    self.tell(StreamEnded(name, 20, itl_s=0.01, stall_s=0.02))
            self.now = max(self.now + 0.01, min(self.kernel.next_deadline(), until))
            self.tell(TimerFired())

    def rest(self) -> None:
        """When all is over, nothing is left."""
        for worker in self.kernel.workers.values():
            ledger = worker.ledger
            assert (ledger.streams, ledger.ahead, ledger.kv, ledger.arriving) == (0, 0.0, 0.0, 0.0)
            assert not ledger.promised
            assert ledger.passing == 0
            ledger.settle_held(self.now + worker.worker.lease_s)
            assert (ledger.held, ledger._held) == (0.0, {})
        assert not any(self.kernel.held().values())
        self.now += 1.0
        self.tell(TimerFired())
        assert self.kernel.next_deadline() == inf


def compare_sums(ledger: Ledger) -> None:
    """Are the sums those of the entries?"""
    entries = list(ledger.entries.values())
    decoding = [entry for entry in entries if entry.decoding]
    arriving = [entry for entry in entries if not entry.decoding]
    assert ledger.streams == len(decoding)
    assert ledger.blind == sum(not entry.request.streaming for entry in decoding)
    assert ledger.ahead == near(sum(entry.uncached for entry in arriving))
    assert ledger.arriving == near(sum(entry.prompt for entry in arriving))
    assert ledger.kv == near(sum(entry.prompt + ledger.given(entry) for entry in decoding))
    assert ledger.passing == sum(entry.passes_on for entry in entries)
    assert ledger.held == near(sum(tokens for tokens, _ in ledger._held.values()))
    assert ledger.promised == Counter(e.promised for e in entries if e.promised is not None)


def near(expected: float) -> object:
    return pytest.approx(expected, rel=1e-6, abs=1e-6)


# What may happen.

names = st.sampled_from([f"r{i}" for i in range(16)])
whose = st.one_of(st.integers(0, 15).map(str), st.integers(0, 15).map(str), names)
"""The so-manyth of the requests that are known, or one by name, whether or not it is known."""
workers = st.sampled_from([ITS] * 6 + ["w0", "w0", "w1", "n0", "p0", "p1", "d0", "s0", "nobody"])
tokens = st.integers(0, 400)
promises = st.builds(Promise, st.sampled_from([0.01, 0.5, 5.0, inf]), st.sampled_from([0.02, inf]))
plain = st.builds(
    Request,
    id=names,
    model=st.sampled_from(["m"] * 8 + ["n", "unknown"]),
    tenant=st.sampled_from(["a", "b"]),
    tier=st.sampled_from(["premium", "standard", "free"]),
    promise=promises,
    weight=st.sampled_from([8.0, 2.0, 0.5]),
    prompt_bytes=st.sampled_from([4_000, 40_000, 0]),
    max_tokens=st.sampled_from([None, 1, 300]),
    blocks=st.sampled_from([(), (1, 2), (1, 2, 3, 4)]),
    streaming=st.sampled_from([True, True, True, False]),
    seed=st.integers(0, 2**32 - 1),
    overload=st.sampled_from(["queue", "shed", "degrade"]),
    preemptible=st.booleans(),
    resumable=st.booleans(),
)


def with_way_down(request: Request, tier: str, model: str, rule: str) -> Request:
    lower = replace(
        request, tier=tier, model=model, promise=Promise(), weight=0.2, overload=rule, instead=None
    )
    return replace(request, instead=lower)


requests = st.one_of(
    plain,
    st.builds(
        with_way_down,
        plain.map(lambda request: replace(request, overload="degrade")),
        st.sampled_from(["free", "lowest"]),
        st.sampled_from(["m", "n"]),
        st.sampled_from(["queue", "shed"]),
    ),
)
steps = st.builds(
    Step,
    st.just(0.0),
    st.floats(0, 2),
    st.integers(0, 9),
    st.integers(0, 20),
    st.sampled_from([1, 1, 50]),
)
reports = st.builds(
    WorkerReport,
    st.sampled_from([True, True, True, False]),
    kv_capacity_tokens=st.sampled_from([None, 2_000, 100_000]),
    block_size=st.sampled_from([None, 16]),
    preemptions_total=st.sampled_from([None, 0.0, 3.0]),
    prefill_budget=st.sampled_from([None, 512]),
)
loads = st.builds(
    PeerLoad,
    workers,
    st.integers(0, 50),
    st.integers(0, 5),
    st.floats(0, 1e5),
    st.floats(0, 1e4),
    st.floats(0, 1e4),
    st.floats(0, 1e4),
)
often: dict[st.SearchStrategy[Fact], int] = {
    st.builds(RequestArrived, requests): 10,
    st.builds(FirstTokenSeen, whose, st.floats(0, 1)): 6,
    st.builds(
        Prefilled, whose, workers, st.floats(0, 1), st.none() | tokens, st.none() | tokens
    ): 5,
    st.builds(StepsSeen, workers, st.lists(steps, max_size=2)): 3,
    st.builds(StreamEnded, whose, tokens, st.floats(0, 1), st.floats(0, 1), st.none() | tokens): 2,
    st.builds(DispatchFailed, whose, workers, st.just("x"), st.booleans(), st.booleans()): 2,
    st.builds(StreamBroke, whose, workers, st.just("x"), tokens, st.booleans(), st.booleans()): 2,
    st.builds(StreamStopped, whose, workers, tokens): 3,
    st.builds(ClientLeft, whose): 1,
    st.builds(
        WorkerAdded,
        st.sampled_from([*WORKERS, OTHER, replace(OTHER, id="w0"), *SHARING, *SHARING]),
    ): 1,
    st.builds(WorkerRemoved, workers): 1,
    st.builds(WorkerReported, workers, reports): 4,
    st.builds(PeerReported, st.sampled_from(["g1", "g2"]), st.lists(loads, max_size=2)): 1,
    st.builds(TimerFired): 5,
}
facts = st.sampled_from([kind for kind, times in often.items() for _ in range(times)]).flatmap(
    lambda kind: kind
)
pauses = st.one_of(
    st.just(0.0),
    st.floats(0, 0.1),
    st.floats(0, 0.1),
    st.floats(0, 3),
    st.sampled_from([9.0, 700.0]),
)
steerings = st.builds(
    Settings,
    policy=st.sampled_from(["headroom"] * 8 + list(POLICIES) + ["apart"] * 6),
    attempts=st.integers(1, 3),
    hold_s=st.sampled_from([5.0, 0.0]),
    max_wait_s=st.sampled_from([600.0, 60.0, 1.0]),
    max_waiting=st.sampled_from([100, 100, 100, 1, 0]),
)


def fitted(fact: Fact, model: Model) -> Fact:
    """The fact with times of now, and with the request and the worker that are meant."""
    whose = getattr(fact, "request_id", "")
    if whose.isdigit() and model.known:
        fact = replace(fact, request_id=list(model.known)[int(whose) % len(model.known)])
    match fact:
        case FirstTokenSeen(name, lag_s):
            return FirstTokenSeen(name, model.now - lag_s)
        case Prefilled(name, worker, lag_s):
            theirs = model.beside.get(name) or model.on.get(name, "nobody")
            return replace(
                fact, worker_id=theirs if worker == ITS else worker, at=model.now - lag_s
            )
        case StepsSeen(worker, seen):
            at = [replace(step, ended_at=model.now) for step in seen]
            return StepsSeen("w0" if worker == ITS else worker, at)
        case DispatchFailed() | StreamBroke() | StreamStopped() if fact.worker_id == ITS:
            return replace(fact, worker_id=model.on.get(fact.request_id, "nobody"))
        case WorkerReported() | WorkerRemoved() if fact.worker_id == ITS:
            return replace(fact, worker_id="w1")
    return fact


class AnyOrder(RuleBasedStateMachine):
    """One story: facts as they come, and a good end."""

    sound = False
    """Nothing has gone wrong so far."""

    @initialize(steering=steerings)
    def begins(self, steering: Settings) -> None:
        self.model = Model(steering)
        self.sound = True

    @rule(fact=facts, pause_s=pauses)
    def happens(self, fact: Fact, pause_s: float) -> None:
        self.sound = False
        self.model.now += pause_s
        self.model.tell(fitted(fact, self.model))
        self.sound = True

    def teardown(self) -> None:
        if not self.sound:
            return
        model = self.model
        model.recover()
        model.finish()
        assert {request.model for request in model.known.values()} <= {"unknown"}
        for name in list(model.known):
            model.tell(ClientLeft(name))
        model.rest()
        for entry, again in replay(model.log):
            assert list(entry.commands) == again


class Apart:
    """As headroom, but whatever can be prefilled by another worker is."""

    ways = staticmethod(apart)
    fetching = staticmethod(partial(fetching, headroom))

    def __call__(self, fleet: Fleet, ask: Ask, places: Sequence[int]) -> Choice:
        return headroom(fleet, ask, places)

    def learn(self, fact: Fact, now: float) -> None:
        """Nothing."""


def test_no_order_of_facts_loses_or_doubles_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the fleet is well again everybody is served or told, the books are empty, and the log
    lives it through again."""
    monkeypatch.setitem(POLICIES, "apart", Apart)
    run_state_machine_as_test(
        AnyOrder, settings=settings(max_examples=80, stateful_step_count=50, deadline=None)
    )
