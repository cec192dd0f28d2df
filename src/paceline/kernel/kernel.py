"""Which commands follow from a fact?

The kernel holds all state that decisions need and nothing else. It is driven by the live host with
sockets and by a simulator with a virtual clock, and does the same for both.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Any

import msgspec

from paceline.domain.commands import Command, Dispatch, Fail, Hold, Prediction, Shed
from paceline.domain.facts import (
    ClientLeft,
    DispatchFailed,
    Fact,
    FirstTokenSeen,
    PeerLoad,
    PeerReported,
    RequestArrived,
    StepsSeen,
    StreamBroke,
    StreamEnded,
    TimerFired,
    WorkerAdded,
    WorkerRemoved,
    WorkerReported,
)
from paceline.domain.request import LIFECYCLE, Event, Request, State
from paceline.kernel.ledger import Entry
from paceline.kernel.pool import Pool
from paceline.kernel.worker import WorkerState
from paceline.policy.route import POLICIES, Policy

OVERLOADED_S = 1.0
"""When to come back after every engine has said that it is overloaded."""


class Settings(msgspec.Struct, frozen=True):
    """What steers the kernel."""

    policy: str = "headroom"
    """One of `paceline.policy.route.POLICIES`."""
    margin: float = 0.1
    """Share of a promise kept free for what cannot be foreseen; 0 to below 1."""
    attempts: int = 3
    """Workers that a request may be tried on before its first token; 1 to 10."""
    hold_s: float = 5.0
    """How long a request waits for a worker to become usable; seconds, 0 to 600."""
    max_held: int = 1000
    """Requests of one model that may wait so."""


class Live:
    """A request that is not over."""

    __slots__ = (
        "arrived_at",
        "attempt",
        "because",
        "predicted",
        "request",
        "state",
        "timed_out",
        "tried",
        "worker",
    )

    def __init__(self, request: Request, now: float) -> None:
        self.request = request
        self.state = State.QUEUED
        self.arrived_at = now
        self.attempt = 0
        self.tried: list[str] = []
        self.worker: WorkerState | None = None
        self.predicted: Prediction | None = None
        self.because = ""
        """Why the last attempt failed."""
        self.timed_out = False


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
        self._now = 0.0
        self._held: dict[str, dict[str, Live]] = {}
        """Requests that wait for a usable worker, by model, in order of arrival."""
        self._handlers: dict[type, Callable[[Any, float], list[Command]]] = {
            RequestArrived: self._arrived,
            FirstTokenSeen: self._first_token,
            StepsSeen: self._steps,
            StreamEnded: self._ended,
            DispatchFailed: self._dispatch_failed,
            StreamBroke: self._broke,
            ClientLeft: self._left,
            WorkerAdded: self._worker_added,
            WorkerRemoved: self._worker_removed,
            WorkerReported: self._worker_reported,
            PeerReported: self._peer_reported,
            TimerFired: self._timer,
        }

    def handle(self, fact: Fact, now: float) -> list[Command]:
        """Take in one fact; gives what shall be done, in order."""
        self._now = now
        if self._learn is not None:
            self._learn(fact, now)
        return self._handlers[type(fact)](fact, now)

    def next_deadline(self) -> float:
        """When a `TimerFired` is wanted at the latest; infinite if never."""
        times = [inf]
        for model, held in self._held.items():
            if held:
                oldest = next(iter(held.values()))
                times.append(oldest.arrived_at + self.settings.hold_s)
                times += [w.ejected_until for w in self._workers(model)]
        return min(at for at in times if at > self._now)

    def held(self) -> dict[str, int]:
        """How many requests wait, by model."""
        return {model: len(held) for model, held in self._held.items()}

    def loads(self, now: float) -> list[PeerLoad]:
        """What is in flight from here, for other gateways to be told."""
        return [w.load(now) for w in self.workers.values() if w.ledger.entries]

    # Requests.

    def _arrived(self, fact: RequestArrived, now: float) -> list[Command]:
        live = Live(fact.request, now)
        self.requests[fact.request.id] = live
        return self._place(live, now)

    def _place(self, live: Live, now: float) -> list[Command]:
        """Send a queued request to a worker, or let it wait for one."""
        request = live.request
        pool = self.pools.get(request.model)
        places = pool.usable(now, live.tried) if pool is not None else []
        if pool is None or not places:
            return self._hold(live, now)
        ask = pool.ask(request, now - live.arrived_at, now)
        choice = self._policy(pool, ask, places)
        worker = pool.workers[pool.ids[choice.place]]
        live.attempt += 1
        command = Dispatch(
            request.id, worker.worker.id, choice.because, choice.predicted, live.attempt
        )
        live.worker, live.predicted = worker, choice.predicted
        self._move(live, Event.DISPATCHED)
        deadline = live.arrived_at + request.promise.ttft_s
        entry = Entry(request, ask.prompt_tokens, ask.cached.get(choice.place, 0.0), now, deadline)
        worker.sent(entry, choice.predicted, now)
        pool.dispatched(entry.uncached)
        pool.prefixes.insert(choice.place, request.blocks)
        pool.touch(worker)
        return [command]

    def _hold(self, live: Live, now: float) -> list[Command]:
        held = self._held.setdefault(live.request.model, {})
        over = now >= live.arrived_at + self.settings.hold_s
        if over or len(held) >= self.settings.max_held:
            held.pop(live.request.id, None)
            if live.because:
                self._finish(live, Event.GAVE_UP)
                return [Fail(live.request.id, live.because, live.timed_out)]
            self._finish(live, Event.SHED)
            because = f"no worker of {live.request.model} is available"
            return [Shed(live.request.id, because, retry_after_s=5.0, unavailable=True)]
        if live.request.id in held:
            return []
        held[live.request.id] = live
        return [Hold(live.request.id, "no worker is usable")]

    def _first_token(self, fact: FirstTokenSeen, now: float) -> list[Command]:
        live = self.requests.get(fact.request_id)
        if live is None or not self._move(live, Event.FIRST_TOKEN):
            return []
        assert live.worker is not None
        worker = live.worker
        entry = worker.ledger.entries[fact.request_id]
        worker.first_token(entry, fact.at)
        if live.predicted is not None:
            worker.ttft.add(live.predicted.ttft_s, fact.at - entry.sent_at)
        self._touch(worker)
        return []

    def _steps(self, fact: StepsSeen, now: float) -> list[Command]:
        worker = self.workers.get(fact.worker_id)
        if worker is not None:
            for step in fact.steps:
                worker.stepped(step)
            self.pools[worker.worker.model].stepped(worker)
        return []

    def _ended(self, fact: StreamEnded, now: float) -> list[Command]:
        live = self.requests.get(fact.request_id)
        if live is None or live.worker is None or not self._move(live, Event.ENDED):
            return []
        worker, request = live.worker, live.request
        pool = self.pools[request.model]
        entry = worker.ledger.entries.get(request.id)
        if live.predicted is not None and fact.itl_s:
            worker.itl.add(live.predicted.itl_s, fact.itl_s)
        if fact.output_tokens:
            pool.lengths.learn(request.model, request.tenant, fact.output_tokens)
        if fact.prompt_tokens and request.prompt_tokens is None and request.prompt_bytes:
            pool.tokens_per_byte.learn(request.model, request.prompt_bytes, fact.prompt_tokens)
        if fact.cached_tokens is not None and entry is not None:
            worker.believed(entry.cached, fact.cached_tokens)
        worker.failures = 0
        return self._gone(live)

    def _dispatch_failed(self, fact: DispatchFailed, now: float) -> list[Command]:
        live = self.requests.get(fact.request_id)
        if live is None or live.worker is None or live.worker.worker.id != fact.worker_id:
            return []
        if not self._move(live, Event.DISPATCH_FAILED):
            return []
        if fact.blame:
            self._blame(live.worker, now)
        self._leave_worker(live)
        live.tried.append(fact.worker_id)
        live.because = f"{fact.worker_id}: {fact.because}"
        live.timed_out = fact.timed_out
        last = live.attempt >= self.settings.attempts
        if not fact.blame and (last or not self._untried(live, now)):
            self._finish(live, Event.SHED)
            return [Shed(fact.request_id, live.because, retry_after_s=OVERLOADED_S)]
        if last:
            self._finish(live, Event.GAVE_UP)
            return [Fail(fact.request_id, live.because, live.timed_out)]
        return self._place(live, now)

    def _untried(self, live: Live, now: float) -> bool:
        """Is there a usable worker that it has not been tried on?"""
        pool = self.pools[live.request.model]
        return any(pool.ids[i] not in live.tried for i in pool.usable(now))

    def _broke(self, fact: StreamBroke, now: float) -> list[Command]:
        live = self.requests.get(fact.request_id)
        if live is None or live.worker is None:
            return []
        self._blame(live.worker, now)
        self._move(live, Event.BROKE)
        return self._gone(live)

    def _left(self, fact: ClientLeft, now: float) -> list[Command]:
        live = self.requests.get(fact.request_id)
        if live is None:
            return []
        self._held.get(live.request.model, {}).pop(fact.request_id, None)
        self._move(live, Event.CLIENT_LEFT)
        return self._gone(live)

    def _move(self, live: Live, event: Event) -> bool:
        """Follow the lifecycle; False for a late echo, which changes nothing."""
        after = LIFECYCLE[live.state].get(event)
        if after is None:
            return False
        live.state = after
        return True

    def _finish(self, live: Live, event: Event) -> None:
        self._move(live, event)
        del self.requests[live.request.id]

    def _gone(self, live: Live) -> list[Command]:
        self._leave_worker(live)
        self.requests.pop(live.request.id, None)
        return []

    def _leave_worker(self, live: Live) -> None:
        worker, live.worker = live.worker, None
        if worker is not None:
            worker.left(live.request.id)
            self._touch(worker)
            self._forget_if_drained(worker)

    # Workers.

    def _worker_added(self, fact: WorkerAdded, now: float) -> list[Command]:
        known = self.workers.get(fact.worker.id)
        if known is not None:
            known.worker = fact.worker
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
        before, worker.report = worker.report, fact.report
        pool = self.pools[worker.worker.model]
        if fact.report.healthy and (before is None or not before.healthy):
            pool.prefixes.remove(worker.place)  # an engine that comes back has lost its cache
            worker.ejected_until, worker.failures = -inf, 0
        pool.sized(worker)
        if fact.report.prefill_budget:
            worker.windows.told(fact.report.prefill_budget)
        worker.elsewhere.forget(now)
        pool.touch(worker)
        pool.regroup()
        return self._retry_held(worker.worker.model, now)

    def _peer_reported(self, fact: PeerReported, now: float) -> list[Command]:
        told = {load.worker_id: load for load in fact.loads}
        for worker in self.workers.values():
            load = told.get(worker.worker.id)
            if worker.elsewhere.heard(fact.gateway, load, now - fact.age_s):
                self._touch(worker)
        return []

    def _timer(self, fact: TimerFired, now: float) -> list[Command]:
        return [command for model in list(self._held) for command in self._retry_held(model, now)]

    def _retry_held(self, model: str, now: float) -> list[Command]:
        """Look again at requests that wait for a worker."""
        commands: list[Command] = []
        held = self._held.get(model, {})
        for live in list(held.values()):
            commands += self._place(live, now)
            if live.state is not State.QUEUED:
                held.pop(live.request.id, None)
        return commands

    def _workers(self, model: str) -> list[WorkerState]:
        pool = self.pools.get(model)
        return list(pool.workers.values()) if pool is not None else []

    def _blame(self, worker: WorkerState, now: float) -> None:
        worker.failed(now)
        self.pools[worker.worker.model].regroup()

    def _touch(self, worker: WorkerState) -> None:
        self.pools[worker.worker.model].touch(worker)
