"""What happens between the kernel and the world? Sockets become facts, commands become calls."""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from math import inf
from time import monotonic
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import aiohttp
import msgspec
import structlog

from paceline.domain.commands import (
    Command,
    Degrade,
    Dispatch,
    Fail,
    Move,
    Pause,
    Prefill,
    Shed,
)
from paceline.domain.errors import PacelineError
from paceline.domain.facts import (
    Fact,
    RequestArrived,
    Step,
    StepsSeen,
    TimerFired,
    WorkerAdded,
    WorkerRemoved,
    WorkerReported,
)
from paceline.domain.kvevents import BlockForm
from paceline.domain.request import Request
from paceline.domain.worker import Worker, WorkerReport
from paceline.engines.detect import detect
from paceline.engines.engine import Engine, refused
from paceline.gateway.exchange import Exchange
from paceline.gateway.link import EngineLink, Timeouts
from paceline.gateway.ports import Turn
from paceline.gateway.relay import GAP_BOUNDS
from paceline.kernel import Kernel

if TYPE_CHECKING:
    from paceline.engines.kvevents import Ears

PROBE_S = 2.0
"""Between two looks at an engine; a quarter of it while it is not ready."""
SWEEP_S = 0.25
TELL_KV_EVENTS = ("vllm", "sglang")
"""Kinds of engines that may tell what their KV cache holds."""
DECISIONS = 1000
"""Newest decisions kept for `/paceline/v1/decisions`."""

log = structlog.get_logger("paceline")


Observer = Callable[[float, Fact, Sequence[Command]], None]
"""Told of each fact, when it came and what followed, once the kernel has handled it."""


class Decision(msgspec.Struct, frozen=True):
    """A command and when it was given, for people."""

    at: float
    """Unix time."""
    command: Command


class LiveHost:
    """Drives one kernel. Owns the engines' links, the open exchanges and every background task."""

    def __init__(
        self,
        kernel: Kernel,
        timeouts: Timeouts,
        on_closed: Callable[[Exchange], None],
        wall: Callable[[], float],
        on_turn: Callable[[Exchange, Turn, str], None] = lambda *_: None,
        random_bytes: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self.kernel = kernel
        self.exchanges: dict[str, Exchange] = {}
        self.engines: dict[str, Engine] = {}
        """The fleet as ordered, by worker id. What drains is no part of it any more."""
        self.links: dict[str, EngineLink] = {}
        """Of the fleet, and of what drains."""
        self.decisions: deque[Decision] = deque(maxlen=DECISIONS)
        self.gap_counts: dict[tuple[str, str, str], list[int]] = {}
        """ITL histograms over `GAP_BOUNDS`, by (model, tier, worker)."""
        self._timeouts = timeouts
        self._on_closed = on_closed
        self._on_turn = on_turn
        self.observers: Sequence[Observer] = ()
        self._wall = wall
        self._random = random_bytes
        self._tasks: asyncio.TaskGroup | None = None
        self._session: aiohttp.ClientSession | None = None
        self._probes: dict[str, asyncio.Task[None]] = {}
        self._retired: WeakSet[EngineLink] = WeakSet()
        """Links that were replaced: requests under way may still use them."""
        self._orders: deque[tuple[Command, float]] = deque()
        """Commands to be run, each with the time of its fact."""
        self._acting = False
        self._timer: asyncio.TimerHandle | None = None
        self._deadline = inf

    # The gateway's port.

    def track(self, exchange: Exchange) -> None:
        self.exchanges[exchange.request.id] = exchange

    def open(self, exchange: Exchange, waited_s: float = 0.0) -> None:
        self.track(exchange)
        self.tell(RequestArrived(exchange.request, waited_s))

    def knows(self, request_id: str) -> bool:
        return request_id in self.exchanges

    def link(self, worker_id: str) -> EngineLink:
        return self.links[worker_id]

    def asked(self, request: Request) -> Request:
        """What a request was when it came."""
        exchange = self.exchanges.get(request.id)
        return exchange.asked if exchange is not None else request

    def number(self) -> int:
        return int.from_bytes(self._random(8), "big") >> 1

    def give_up(self, holder: EngineLink, fields: Mapping[str, Any]) -> None:
        body = holder.transfer.release(fields) if holder.transfer is not None else None
        takers = self._takers(holder.worker)
        if body is not None and takers and self._session is not None and self._tasks is not None:
            work = refused(self._session, takers, body)
            self._tasks.create_task(work, name=f"free what {holder.worker.id} holds")

    def _takers(self, holder: Worker) -> list[Engine]:
        """A few engines that could have gone on with what this one holds, the soundest first."""
        now, known = monotonic(), self.kernel.workers
        takers = [
            (known[worker_id].failures, worker_id)
            for worker_id, engine in self.engines.items()
            if engine.worker.takes_from(holder) and known[worker_id].usable(now)
        ]
        return [self.engines[worker_id] for _, worker_id in sorted(takers)[:3]]

    def block_forms(self, model: str) -> Sequence[BlockForm]:
        pool = self.kernel.pools.get(model)
        return pool.block_forms(monotonic()) if pool is not None else ()

    def gaps(self, exchange: Exchange) -> list[int]:
        asked = exchange.asked
        key = (asked.model, asked.tier, exchange.worker_id)
        counts = self.gap_counts.get(key)
        if counts is None:
            counts = self.gap_counts[key] = [0] * (len(GAP_BOUNDS) + 1)
        return counts

    def note(self, exchange: Exchange, turn: Turn, because: str) -> None:
        self._on_turn(exchange, turn, because)

    def closed(self, exchange: Exchange) -> None:
        self.exchanges.pop(exchange.request.id, None)
        self._on_closed(exchange)

    def tell(self, fact: Fact) -> None:
        """Decide, act, report.

        Acting may bring about further facts. Each is decided upon at once, and acted on in its
        turn: commands run in the order in which the kernel gave them and the log has them.
        """
        now = monotonic()
        commands = self.kernel.handle(fact, now)
        for saw in self.observers:
            saw(now, fact, commands)
        for command in commands:
            self.decisions.append(Decision(self._wall(), command))
            self._orders.append((command, now))
        if not self._acting:
            self._act()
        self._wake()

    def _act(self) -> None:
        self._acting = True
        try:
            while self._orders:
                self._run(*self._orders.popleft())
        finally:
            self._acting = False

    def _run(self, command: Command, now: float) -> None:
        exchange = self.exchanges.get(command.request_id)
        if exchange is None:
            return  # it is over meanwhile
        try:
            match command:
                case Dispatch():
                    exchange.dispatch(command, now)
                case Prefill():
                    exchange.prefill(command, now)
                case Pause() | Move():
                    exchange.stop(command, now)
                case Degrade():
                    exchange.degrade(command)
                case Shed():
                    exchange.shed(command)
                case Fail():
                    exchange.fail(command)
        except Exception:  # it costs this request, not the one whose fact led here
            exchange.on_bug()

    def _wake(self) -> None:
        """Have the timer fire when the kernel wants it."""
        deadline = self.kernel.next_deadline()
        if deadline == self._deadline:
            return
        self._deadline = deadline
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if deadline < inf:
            loop = asyncio.get_running_loop()
            delay_s = max(deadline - monotonic(), 0.0) + 1e-4
            self._timer = loop.call_later(delay_s, self._fire)

    def _fire(self) -> None:
        self._timer, self._deadline = None, inf
        self.tell(TimerFired())

    # Workers.

    async def run(self, engines: Iterable[Engine]) -> None:
        """Run until cancelled: probe the engines and watch over the exchanges."""
        try:
            async with aiohttp.ClientSession() as session, asyncio.TaskGroup() as tasks:
                self._session, self._tasks = session, tasks
                for engine in engines:
                    self.add(engine)
                await self._sweep()
        finally:
            for link in (*self.links.values(), *self._retired):
                link.close()
            if self._timer is not None:
                self._timer.cancel()

    def add(self, engine: Engine) -> None:
        """A worker joins the fleet, comes back to it, or is from now on as `engine` says.

        What it has under way goes on. A worker that shall serve another model drains first.
        """
        worker = engine.worker
        ordered, serving = self.engines.get(worker.id), self.links.get(worker.id)
        self.engines[worker.id] = engine
        if serving is None:
            self._join(engine)
        elif serving.worker.model != worker.model:
            self.tell(WorkerRemoved(worker.id))
            self._settle()
        else:
            told = ordered.worker if ordered is not None else worker
            alike = (told.kind, told.serves_as) == (worker.kind, worker.serves_as)
            shown = serving.worker if alike and serving.worker.url == worker.url else worker
            self._join(engine.identified(shown.kind, shown.serves_as))

    def remove(self, worker_id: str, at_once: bool = False) -> None:
        """A worker takes no new work. What it has may finish, or moves `at_once` if it can."""
        self.engines.pop(worker_id, None)
        self.tell(WorkerRemoved(worker_id))
        if at_once:
            there = [
                e for e in self.exchanges.values() if worker_id in (e.worker_id, e.prefills_at)
            ]
            for exchange in there:
                self._run(Move(exchange.request.id, "its worker is removed"), monotonic())
        self._settle()

    def _join(self, engine: Engine) -> None:
        """Talk to a worker in this way from now on."""
        worker = engine.worker

        def on_step(step: Step) -> None:
            try:
                self.tell(StepsSeen(worker.id, (step,)))
            except Exception:  # what is learned from a step is not worth the stream that showed it
                log.exception("a step was not understood", worker=worker.id)

        key, transfer = engine.api_key, engine.transfer
        link = EngineLink(worker, engine.adapter, key, self._spawn, on_step, transfer)
        before = self.links.get(worker.id)
        if before is not None:
            link.watch = before.watch  # its steps are seen by all its streams, old and new
            self._retire(before)
        self.links[worker.id] = link
        self.tell(WorkerAdded(worker))
        if worker.id in self._probes:
            self._probes.pop(worker.id).cancel()
        assert self._tasks is not None
        probe = self._tasks.create_task(self._attend(engine), name=f"probe {worker.id}")
        self._probes[worker.id] = probe

    def _retire(self, link: EngineLink) -> None:
        """Close its connections as they become idle."""
        self._retired.add(link)
        link.close()

    def _settle(self) -> None:
        """Forget the workers that have drained; they may join again for another model."""
        for worker_id in [w for w in self.links if w not in self.kernel.workers]:
            self._retire(self.links.pop(worker_id))
            self._probes.pop(worker_id).cancel()
            for key in [key for key in self.gap_counts if key[2] == worker_id]:
                del self.gap_counts[key]
            log.info("worker has left", worker=worker_id)
            if worker_id in self.engines:
                self._join(self.engines[worker_id])
        for link in self._retired:
            link.close()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        assert self._tasks is not None
        return self._tasks.create_task(work, name="connect")

    async def _attend(self, engine: Engine) -> None:
        """Probe an engine, and own whatever listens to it."""
        async with asyncio.TaskGroup() as listeners:
            await self._probe(engine, listeners)

    async def _probe(self, engine: Engine, listeners: asyncio.TaskGroup) -> None:
        """Ask an engine how it is, for ever; tell the kernel, and people when that changes."""
        assert self._session is not None
        session = self._session
        ears: Ears | None = None
        told: bool | None = None
        known = bool(engine.worker.kind and engine.worker.serves_as)
        lacks: str | None = None  # for hand-overs; None: not asked yet
        while True:
            found = None if known else await detect(session, engine.worker.url, engine.api_key)
            if found is not None:
                engine, known = engine.identified(found.kind, found.serves_as), True
                self._show(engine)
            worker = engine.worker
            asked_at = monotonic()
            report = await engine.adapter.report(session)
            report = msgspec.structs.replace(report, took_s=monotonic() - asked_at)
            known = known or (report.healthy and bool(worker.kind))  # it lists no model: no matter
            if not known:
                reason = report.because or "it is still starting"
                report = WorkerReport(False, f"nobody answers at {worker.url}: {reason}")
            if not report.healthy:
                lacks = None
            elif engine.transfer is not None and worker.prefills and lacks != "":
                before, lacks = lacks, await engine.transfer.learn(session)
                if lacks and lacks != before:
                    log.warning("worker cannot hand over", worker=worker.id, because=lacks)
            self.tell(WorkerReported(worker.id, report))
            if report.healthy and not told and worker.kind in TELL_KV_EVENTS:
                ears = ears or self._ears(worker.id, listeners)
                await ears.turn(session, worker.url, engine.api_key)
            if report.healthy is not told:
                told = report.healthy
                if told:
                    log.info("worker is ready", worker=worker.id, url=worker.url, kind=worker.kind)
                else:
                    log.warning("worker is not ready", worker=worker.id, because=report.because)
            await asyncio.sleep(PROBE_S if told else PROBE_S / 4)

    def _ears(self, worker_id: str, owner: asyncio.TaskGroup) -> Ears:
        from paceline.engines.kvevents import Ears  # with ZeroMQ, which others need not load

        return Ears(worker_id, self.tell, owner)

    def _show(self, engine: Engine) -> None:
        """An engine has shown what it is."""
        worker = engine.worker
        link = self.links[worker.id]
        link.worker, link.dialect, link.transfer = worker, engine.adapter, engine.transfer
        ordered = self.engines.get(worker.id)
        if ordered is not None and ordered.worker.model == worker.model:  # else it drains
            self.tell(WorkerAdded(worker))

    async def _sweep(self) -> None:
        """End requests whose engine has been silent for too long."""
        while True:
            await asyncio.sleep(SWEEP_S)
            self._expire(monotonic())
            self._settle()

    def _expire(self, now: float) -> None:
        for exchange in list(self.exchanges.values()):
            try:
                exchange.expire(self._timeouts, now)
            except Exception:
                exchange.on_bug()

    def end(self, error: PacelineError) -> int:
        """Nobody's request goes on: each is told why. Gives how many there were."""
        left = list(self.exchanges.values())
        for exchange in left:
            try:
                if not exchange.done_at:
                    exchange.end(error)
            except Exception:
                exchange.on_bug()
        return len(left)

    def serves(self, models: Iterable[str]) -> bool:
        """Has each of these models a usable worker?"""
        now = monotonic()
        pools = self.kernel.pools
        return all(model in pools and pools[model].usable(now) for model in models)

    @property
    def ready(self) -> bool:
        """Can every model that has workers be served?"""
        models = {engine.worker.model for engine in self.engines.values()}
        return bool(models) and self.serves(models)
