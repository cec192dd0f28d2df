"""What happens between the kernel and the world? Sockets become facts, commands become calls."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Iterable
from math import inf
from time import monotonic
from typing import Any, BinaryIO

import aiohttp
import msgspec
import structlog

from paceline.domain.commands import Command, Dispatch, Fail, Shed
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
from paceline.domain.worker import Worker, WorkerReport
from paceline.engines.adapter import Adapter, make_adapter
from paceline.engines.detect import Detected, detect
from paceline.gateway.exchange import Exchange, Timeouts
from paceline.gateway.link import EngineLink
from paceline.gateway.relay import GAP_BOUNDS
from paceline.kernel import Kernel
from paceline.kernel.log import line, opening

PROBE_S = 2.0
"""Between two looks at an engine; a quarter of it while it is not ready."""
SWEEP_S = 0.25
DECISIONS = 1000
"""Newest decisions kept for `/paceline/v1/decisions`."""

log = structlog.get_logger("paceline")


class Engine(msgspec.Struct, frozen=True):
    """A worker with what it takes to talk to it."""

    worker: Worker
    adapter: Adapter
    api_key: str
    """What it wants to see as a bearer token; empty: nothing."""

    def __repr__(self) -> str:
        return f"Engine({self.worker.id})"


def adapter_of(worker: Worker, api_key: str) -> Adapter:
    """The adapter of a worker's kind; a plain one until the kind is detected."""
    name = worker.serves_as or worker.model
    return make_adapter(worker.kind or "openai", worker.url, name, api_key)


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
        fact_log: BinaryIO | None = None,
    ) -> None:
        self.kernel = kernel
        self.exchanges: dict[str, Exchange] = {}
        self.links: dict[str, EngineLink] = {}
        self.decisions: deque[Decision] = deque(maxlen=DECISIONS)
        self.gap_counts: dict[tuple[str, str, str], list[int]] = {}
        """ITL histograms over `GAP_BOUNDS`, by (model, tier, worker)."""
        self._timeouts = timeouts
        self._on_closed = on_closed
        self._wall = wall
        self._fact_log = fact_log
        if fact_log is not None:
            fact_log.write(opening(kernel.settings))
        self._tasks: asyncio.TaskGroup | None = None
        self._probes: dict[str, asyncio.Task[None]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._deadline = inf

    # The gateway's port.

    def open(self, exchange: Exchange) -> None:
        self.exchanges[exchange.request.id] = exchange
        self.tell(RequestArrived(exchange.request))

    def knows(self, request_id: str) -> bool:
        return request_id in self.exchanges

    def link(self, worker_id: str) -> EngineLink:
        return self.links[worker_id]

    def gaps(self, exchange: Exchange) -> list[int]:
        request = exchange.request
        key = (request.model, request.tier, exchange.worker_id)
        counts = self.gap_counts.get(key)
        if counts is None:
            counts = self.gap_counts[key] = [0] * (len(GAP_BOUNDS) + 1)
        return counts

    def closed(self, exchange: Exchange) -> None:
        self.exchanges.pop(exchange.request.id, None)
        self._on_closed(exchange)

    def tell(self, fact: Fact) -> None:
        """Decide, act, report."""
        now = monotonic()
        commands = self.kernel.handle(fact, now)
        if self._fact_log is not None:
            self._fact_log.write(line(now, fact, commands))
        for command in commands:
            self.decisions.append(Decision(self._wall(), command))
            self._run(command, now)
        self._wake()

    def _run(self, command: Command, now: float) -> None:
        exchange = self.exchanges.get(command.request_id)
        if exchange is None:
            return
        try:
            if isinstance(command, Dispatch):
                exchange.dispatch(command, now)
            elif isinstance(command, Shed):
                exchange.shed(command)
            elif isinstance(command, Fail):
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
                self._tasks = tasks
                for engine in engines:
                    self.add(engine, session)
                await self._sweep()
        finally:
            for link in self.links.values():
                link.close()
            if self._timer is not None:
                self._timer.cancel()

    def add(self, engine: Engine, session: aiohttp.ClientSession) -> None:
        """A worker joins the fleet."""
        worker = engine.worker

        def on_step(step: Step) -> None:
            try:
                self.tell(StepsSeen(worker.id, (step,)))
            except Exception:  # what is learned from a step is not worth the stream that showed it
                log.exception("a step was not understood", worker=worker.id)

        self.links[worker.id] = EngineLink(
            worker, engine.adapter, engine.api_key, self._spawn, on_step
        )
        self.tell(WorkerAdded(worker))
        assert self._tasks is not None
        probe = self._tasks.create_task(self._probe(engine, session), name=f"probe {worker.id}")
        self._probes[worker.id] = probe

    def remove(self, worker_id: str) -> None:
        """A worker takes no new work; what it has may finish."""
        self.tell(WorkerRemoved(worker_id))
        probe = self._probes.pop(worker_id, None)
        if probe is not None:
            probe.cancel()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        assert self._tasks is not None
        return self._tasks.create_task(work, name="connect")

    async def _probe(self, engine: Engine, session: aiohttp.ClientSession) -> None:
        """Ask an engine how it is, for ever; tell the kernel, and people when that changes."""
        told: bool | None = None
        known = bool(engine.worker.kind and engine.worker.serves_as)
        while True:
            found = None if known else await detect(session, engine.worker.url, engine.api_key)
            if found is not None:
                engine, known = self._identified(engine, found), True
            worker = engine.worker
            report = await engine.adapter.report(session)
            known = known or (report.healthy and bool(worker.kind))  # it lists no model: no matter
            if not known:
                reason = report.because or "it is still starting"
                report = WorkerReport(False, f"nobody answers at {worker.url}: {reason}")
            self.tell(WorkerReported(worker.id, report))
            if report.healthy is not told:
                told = report.healthy
                if told:
                    log.info("worker is ready", worker=worker.id, url=worker.url, kind=worker.kind)
                else:
                    log.warning("worker is not ready", worker=worker.id, because=report.because)
            await asyncio.sleep(PROBE_S if told else PROBE_S / 4)

    def _identified(self, engine: Engine, found: Detected) -> Engine:
        """The engine with the kind and model name that it shows, where the config names none."""
        worker = engine.worker
        worker = msgspec.structs.replace(
            worker,
            kind=worker.kind or found.kind,
            serves_as=worker.serves_as or found.serves_as,
        )
        engine = Engine(worker, adapter_of(worker, engine.api_key), engine.api_key)
        link = self.links[worker.id]
        link.worker, link.dialect = worker, engine.adapter
        self.tell(WorkerAdded(worker))
        return engine

    async def _sweep(self) -> None:
        """End requests whose engine has been silent for too long."""
        while True:
            await asyncio.sleep(SWEEP_S)
            self._expire(monotonic())
            if self._fact_log is not None:
                self._fact_log.flush()

    def _expire(self, now: float) -> None:
        for exchange in list(self.exchanges.values()):
            try:
                exchange.expire(self._timeouts, now)
            except Exception:
                exchange.on_bug()

    @property
    def ready(self) -> bool:
        """Can every model be served?"""
        now = monotonic()
        pools = self.kernel.pools.values()
        return bool(pools) and all(pool.usable(now) for pool in pools)
