"""Which commands follow from a fact?

The kernel holds all state that decisions need and nothing else. It is driven by the live host with
sockets and by a simulator with a virtual clock, and does the same for both.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Any

import msgspec

from paceline.domain.commands import Command, Fail, Move, Pause, Shed
from paceline.domain.facts import (
    ClientLeft,
    DispatchFailed,
    Fact,
    FirstTokenSeen,
    PeerLoad,
    PeerReported,
    Prefilled,
    RequestArrived,
    StepsSeen,
    StreamBroke,
    StreamEnded,
    StreamStopped,
    TimerFired,
    WorkerAdded,
    WorkerRemoved,
    WorkerReported,
)
from paceline.domain.kvevents import BlocksChanged, BlocksCleared, BlocksUnknown
from paceline.domain.request import Event, State
from paceline.kernel.dispatcher import Bounds, Dispatcher
from paceline.kernel.ledger import Entry
from paceline.kernel.live import Live
from paceline.kernel.pool import Pool
from paceline.kernel.watch import Watch
from paceline.kernel.worker import WorkerState
from paceline.policy.route import PAUSING, POLICIES, Policy

OVERLOADED_S = 1.0
"""When to come back after every engine has said that it is overloaded."""


class Settings(msgspec.Struct, frozen=True):
    """What steers the kernel."""

    policy: str = "headroom"
    """One of `paceline.policy.route.POLICIES`."""
    margin: float = 0.0
    """Share of a promise kept free for what cannot be foreseen; 0 to below 1."""
    attempts: int = 3
    """Workers that may fail a request before it is given up; 1 to 10."""
    hold_s: float = 5.0
    """How long a request waits for a worker to become usable; seconds, 0 to 600."""
    max_wait_s: float = 600.0
    """How long a request waits for room on a worker; seconds, above 0."""
    max_waiting: int = 10_000
    """Requests of one model and tier that may wait; 0 or more."""


class Kernel:
    """Facts in, commands out. `now` never runs backwards."""

    def __init__(
        self,
        settings: Settings = Settings(),  # noqa: B008 (frozen)
        policy: Policy | None = None,
    ) -> None:
        """`policy` stands in for the one that the settings name."""
        self.settings = settings
        self.requests: dict[str, Live] = {}
        self.pools: dict[str, Pool] = {}
        self.workers: dict[str, WorkerState] = {}
        named = policy or POLICIES[settings.policy]
        self._policy: Policy = named() if isinstance(named, type) else named
        self._learn: Callable[[Fact, float], None] | None = getattr(self._policy, "learn", None)
        bounds = Bounds(settings.hold_s, settings.max_wait_s, settings.max_waiting)
        self._dispatcher = Dispatcher(bounds, self._policy, self.pools, self.requests)
        pauses = policy is None and settings.policy in PAUSING
        self._watch = Watch(self.pools, self.requests, self._dispatcher, self._blame, pauses)
        self._handlers: dict[type, Callable[[Any, float], list[Command]]] = {
            RequestArrived: self._arrived,
            FirstTokenSeen: self._first_token,
            StepsSeen: self._steps,
            StreamEnded: self._ended,
            Prefilled: self._prefilled,
            DispatchFailed: self._dispatch_failed,
            StreamBroke: self._broke,
            StreamStopped: self._stopped,
            ClientLeft: self._left,
            WorkerAdded: self._worker_added,
            WorkerRemoved: self._worker_removed,
            WorkerReported: self._worker_reported,
            PeerReported: self._peer_reported,
            BlocksChanged: self._blocks_changed,
            BlocksUnknown: self._blocks_unknown,
            TimerFired: self._timer,
        }

    def handle(self, fact: Fact, now: float) -> list[Command]:
        """Take in one fact; gives what shall be done, in order."""
        if self._learn is not None:
            self._learn(fact, now)
        return self._handlers[type(fact)](fact, now)

    def next_deadline(self) -> float:
        """When a `TimerFired` is wanted at the latest; infinite if never."""
        return min(self._dispatcher.look_at, self._watch.look_at)

    def held(self) -> dict[str, int]:
        """How many requests wait, by model."""
        return self._dispatcher.counts()

    def loads(self, now: float) -> list[PeerLoad]:
        """What is in flight from here, for other gateways to be told."""
        return [w.load(now) for w in self.workers.values() if w.ledger.entries]

    # Requests.

    def _arrived(self, fact: RequestArrived, now: float) -> list[Command]:
        if fact.request.id in self.requests:
            return []
        live = Live(fact.request, now - fact.waited_s)
        self.requests[fact.request.id] = live
        self._watch.begin(now)
        return self._dispatcher.arrived(live, now)

    def _first_token(self, fact: FirstTokenSeen, now: float) -> list[Command]:
        live = self.requests.get(fact.request_id)
        if live is None or not live.move(Event.FIRST_TOKEN):
            return []
        assert live.worker is not None
        worker = live.worker
        entry = worker.ledger.entries[fact.request_id]
        if worker.failures:
            self.pools[worker.worker.model].regroup()
        worker.first_token(entry, fact.at)
        live.begun_at = min(live.begun_at, fact.at)
        if live.handover is not None:
            self._fetched(live, entry, fact.at)
        elif live.predicted is not None:
            worker.ttft.add(live.predicted.ttft_s, fact.at - entry.sent_at)
            raw_s = live.predicted.ttft_s / live.predicted.ttft_factor
            self.pools[worker.worker.model].ttft.add(raw_s, fact.at - entry.sent_at)
        return self._room_on(worker, now)

    def _steps(self, fact: StepsSeen, now: float) -> list[Command]:
        worker = self.workers.get(fact.worker_id)
        if worker is not None:
            for step in fact.steps:
                worker.stepped(step)
            self.pools[worker.worker.model].stepped(worker)
        return []

    def _ended(self, fact: StreamEnded, now: float) -> list[Command]:
        live = self.requests.get(fact.request_id)
        if live is None or live.worker is None or not live.move(Event.ENDED):
            return []
        worker, request = live.worker, live.request
        pool = self.pools[request.model]
        entry = worker.ledger.entries.get(request.id)
        if live.predicted is not None and fact.itl_s and not live.produced:  # of one worker
            pool.outcome(worker, live.predicted, fact.itl_s, now)
        if fact.output_tokens:
            pool.lengths.learn(request.model, request.tenant, fact.output_tokens)
        if fact.prompt_tokens and request.prompt_tokens is None and request.prompt_bytes:
            pool.tokens_per_byte.learn(request.model, request.prompt_bytes, fact.prompt_tokens)
        guessed = not (request.token_blocks and pool.blocks.follows(worker.place))
        if fact.cached_tokens is not None and entry and guessed and not entry.fetches:
            worker.believed(entry.cached, fact.cached_tokens)
        if worker.failures:
            worker.recovered()
            pool.regroup()
        if live.handover is not None:
            live.handover.worker.ledger.fetched(request.id)
        return self._gone(live, now)

    def _prefilled(self, fact: Prefilled, now: float) -> list[Command]:
        live = self.requests.get(fact.request_id)
        handover = live.handover if live is not None else None
        if live is None or handover is None or handover.worker.worker.id != fact.worker_id:
            return []
        worker = handover.worker
        entry = worker.ledger.entries.get(fact.request_id)
        if handover.ready or entry is None:
            return []
        handover.ready = True
        if fact.cached_tokens is not None:
            worker.believed(entry.cached, fact.cached_tokens)
        if worker.failures:
            self.pools[worker.worker.model].regroup()
        handover.since = fact.since
        worker.prefilled(entry, fact.at, handover.until)
        self._touch(worker)
        self._forget_if_drained(worker)
        if handover.paired:  # the other worker is at it already
            worker.ledger.fetched(fact.request_id)
            return self._room_on(worker, now)
        live.move(Event.PREFILLED)
        live.worker = None
        return self._dispatcher.handed(live, now) + self._room_on(worker, now)

    def _fetched(self, live: Live, entry: Entry, at: float) -> None:
        """The first token of an answer whose prompt another worker has prefilled."""
        handover, pool = live.handover, self.pools[live.request.model]
        assert handover is not None
        pool.handover.add(handover.predicted_s, at - handover.sent_at)
        handover.fetched(entry, at)
        if handover.paired and not handover.ready:
            return
        handover.worker.ledger.fetched(live.request.id)
        self._leave_source(live)

    def _dispatch_failed(self, fact: DispatchFailed, now: float) -> list[Command]:
        live = self._there(fact)
        if live is None:
            return []
        handover = live.handover
        by_source = handover is not None and handover.worker.worker.id == fact.worker_id
        if by_source and live.state is State.DECODING:  # what it was to do is done
            self._leave_source(live)
            return []
        if not live.move(Event.DISPATCH_FAILED):
            return []
        if fact.blame:
            self._blame(self.workers[fact.worker_id], now)
        self._leave_worker(live)
        live.failed(fact.worker_id, fact.because, fact.timed_out)
        if by_source:
            live.whole = True
        elif handover is not None and not fact.blame:  # not the worker failed, but the hand-over
            live.whole = True
            live.tried.remove(fact.worker_id)
        last = live.failures >= self.settings.attempts
        if not fact.blame and (last or not self._untried(live, now)):
            if live.produced and not last:  # whoever reads it can wait a little
                return self._dispatcher.paused(live, now)
            self._finish(live, Event.SHED)
            return [Shed(fact.request_id, live.because, retry_after_s=OVERLOADED_S)]
        if last:
            self._finish(live, Event.GAVE_UP)
            return [Fail(fact.request_id, live.because, live.timed_out)]
        return self._dispatcher.returned(live, now)

    def _untried(self, live: Live, now: float) -> bool:
        """Is there a usable worker that it has not been tried on?"""
        pool = self.pools[live.request.model]
        return any(pool.ids[i] not in live.tried for i in pool.usable(now))

    def _broke(self, fact: StreamBroke, now: float) -> list[Command]:
        live = self._there(fact)
        if live is None:
            return []
        if fact.blame:
            self._blame(self.workers[fact.worker_id], now)
        if not fact.resumable:
            live.move(Event.BROKE)
            return self._gone(live, now)
        live.failed(fact.worker_id, fact.because)
        if live.failures >= self.settings.attempts:
            live.move(Event.BROKE)
            return [Fail(fact.request_id, live.because), *self._gone(live, now)]
        return self._returns(live, fact.produced, now)

    def _stopped(self, fact: StreamStopped, now: float) -> list[Command]:
        live = self._there(fact)
        return self._returns(live, fact.produced, now) if live is not None else []

    def _there(self, fact: DispatchFailed | StreamBroke | StreamStopped) -> Live | None:
        """The request that a fact tells of, if it still is on that worker."""
        live = self.requests.get(fact.request_id)
        if live is None or live.worker is None:
            return None
        if live.worker.worker.id == fact.worker_id:
            return live
        handover = live.handover
        if handover is None or not handover.paired or handover.ready:
            return None
        return live if handover.worker.worker.id == fact.worker_id else None

    def _returns(self, live: Live, produced: int, now: float) -> list[Command]:
        """A request is no longer on its worker, and is to go on elsewhere."""
        live.move(Event.STOPPED)
        worker = live.worker
        assert worker is not None
        paused = live.leaving is Pause or (live.leaving is None and live.request.preemptible)
        if live.leaving is Move:
            live.left = worker.worker.id
        self._leave_worker(live)
        live.stopped(produced, now)
        dispatcher = self._dispatcher
        commands = dispatcher.paused(live, now) if paused else dispatcher.returned(live, now)
        return commands + self._room_on(worker, now)

    def _left(self, fact: ClientLeft, now: float) -> list[Command]:
        live = self.requests.get(fact.request_id)
        if live is None:
            return []
        self._dispatcher.discard(live)
        live.move(Event.CLIENT_LEFT)
        return self._gone(live, now)

    def _finish(self, live: Live, event: Event) -> None:
        live.move(event)
        del self.requests[live.request.id]

    def _gone(self, live: Live, now: float) -> list[Command]:
        """A request is over: whoever waits may have the room."""
        worker = live.worker
        self._leave_worker(live)
        self.requests.pop(live.request.id, None)
        return self._room_on(worker, now) if worker is not None else []

    def _leave_worker(self, live: Live) -> None:
        self._leave_source(live)
        worker, live.worker, live.leaving = live.worker, None, None
        if worker is not None:
            if worker.on_trial == live.request.id:
                self.pools[worker.worker.model].regroup()
            worker.left(live.request.id)
            self._touch(worker)
            self._forget_if_drained(worker)

    def _leave_source(self, live: Live) -> None:
        """What another worker may have prefilled for it will not be fetched."""
        handover, live.handover = live.handover, None
        if handover is None:
            return
        handover.over()
        if handover.paired and not handover.ready:
            handover.worker.left(live.request.id)
        self._touch(handover.worker)
        self._forget_if_drained(handover.worker)

    def _room_on(self, worker: WorkerState, now: float) -> list[Command]:
        """Something has happened on a worker that may have made room there."""
        self._touch(worker)
        return self._dispatcher.serve(worker.worker.model, now)

    # Workers.

    def _worker_added(self, fact: WorkerAdded, now: float) -> list[Command]:
        known = self.workers.get(fact.worker.id)
        if known is not None and known.worker.model != fact.worker.model:
            return []  # it has to drain first
        if known is not None:
            known.worker, known.draining = fact.worker, False
            if fact.worker.prefill_budget:
                known.windows.told(fact.worker.prefill_budget)
            self.pools[fact.worker.model].regroup()
        else:
            pool = self.pools.setdefault(fact.worker.model, Pool(self.settings.margin))
            self.workers[fact.worker.id] = pool.add(fact.worker)
        return []

    def _worker_removed(self, fact: WorkerRemoved, now: float) -> list[Command]:
        worker = self.workers.get(fact.worker_id)
        if worker is not None:
            worker.draining = True
            self.pools[worker.worker.model].regroup()
            self._forget_if_drained(worker)
        return []

    def _forget_if_drained(self, worker: WorkerState) -> None:
        if worker.draining and not worker.ledger.entries:
            self.workers.pop(worker.worker.id, None)
            self.pools[worker.worker.model].remove(worker)

    def _worker_reported(self, fact: WorkerReported, now: float) -> list[Command]:
        worker = self.workers.get(fact.worker_id)
        if worker is None:
            return []
        before = worker.report
        worker.reported(fact.report)
        pool = self.pools[worker.worker.model]
        if fact.report.healthy and (before is None or not before.healthy):
            pool.prefixes.remove(worker.place)  # an engine that comes back has lost its cache
            worker.ejected_until = -inf
            worker.recovered()
        pool.sized(worker)
        if fact.report.prefill_budget:
            worker.windows.told(fact.report.prefill_budget)
        worker.elsewhere.forget(now)
        pool.touch(worker)
        pool.regroup()
        return self._dispatcher.serve(worker.worker.model, now)

    def _peer_reported(self, fact: PeerReported, now: float) -> list[Command]:
        told = {load.worker_id: load for load in fact.loads}
        for worker in self.workers.values():
            load = told.get(worker.worker.id)
            if worker.elsewhere.heard(fact.gateway, load, now - fact.age_s):
                self._touch(worker)
        return []

    def _blocks_changed(self, fact: BlocksChanged, now: float) -> list[Command]:
        worker = self.workers.get(fact.worker_id)
        if worker is not None:
            pool = self.pools[worker.worker.model]
            pool.blocks.change(worker.place, fact.events, fact.rank, fact.unreadable)
            if BlocksCleared in map(type, fact.events):
                pool.soon.forget()
        return []

    def _blocks_unknown(self, fact: BlocksUnknown, now: float) -> list[Command]:
        worker = self.workers.get(fact.worker_id)
        if worker is not None:
            pool = self.pools[worker.worker.model]
            pool.blocks.begin(worker.place, fact.rank, fact.whole)
            pool.soon.forget()
        return []

    def _timer(self, fact: TimerFired, now: float) -> list[Command]:
        commands = self._watch.look(now) if now >= self._watch.look_at else []
        if now >= self._dispatcher.look_at:
            commands += self._dispatcher.look(now)
        return commands

    def _blame(self, worker: WorkerState, now: float) -> None:
        worker.failed(now)
        self.pools[worker.worker.model].regroup()

    def _touch(self, worker: WorkerState) -> None:
        self.pools[worker.worker.model].touch(worker)
