"""A kernel with engine models on a virtual clock: what would have become of these requests?"""

from __future__ import annotations

import random
from collections.abc import Sequence
from heapq import heappop, heappush
from itertools import count
from math import inf
from typing import Any

import msgspec

from paceline.domain.commands import Command, Dispatch, Fail, Shed
from paceline.domain.facts import (
    Fact,
    FirstTokenSeen,
    RequestArrived,
    Step,
    StepsSeen,
    StreamEnded,
    TimerFired,
    WorkerAdded,
    WorkerReported,
)
from paceline.domain.promise import Promise
from paceline.domain.request import BLOCK_BYTES, Request
from paceline.domain.worker import Worker, WorkerReport
from paceline.enginemodel.profile import PROFILES
from paceline.enginemodel.scheduler import Generation, Scheduler, StepPlan
from paceline.kernel import Kernel, Settings

LINK_S = 0.002
BYTES_PER_TOKEN = 4


class Job(msgspec.Struct, frozen=True):
    """A request that will come."""

    at: float
    prompt: int
    output: int
    promise: Promise = Promise()
    blocks: tuple[int, ...] = ()


class Told(msgspec.Struct):
    """What its client saw."""

    job: Job
    worker: str = ""
    first_at: float = inf
    done_at: float = inf
    stall_s: float = 0.0
    last_at: float = inf

    @property
    def ttft_s(self) -> float:
        return self.first_at - self.job.at

    @property
    def itl_s(self) -> float:
        return (self.done_at - self.first_at) / max(self.job.output - 1, 1)

    @property
    def kept(self) -> bool:
        return self.job.promise.kept(self.ttft_s, self.itl_s, 0.0)


class VirtualFleet:
    """Some engines, one kernel, a heap of what happens when."""

    def __init__(self, profiles: Sequence[str], policy: str, seed: int = 0) -> None:
        self.now = 0.0
        self.kernel = Kernel(Settings(policy=policy))
        self.rng = random.Random(seed)
        self.engines = {
            f"w{i}": Scheduler(PROFILES[name], rng=self.rng) for i, name in enumerate(profiles)
        }
        self.told: dict[str, Told] = {}
        self.log: list[tuple[float, Fact, list[Command]]] = []
        self._heap: list[tuple[float, int, Any]] = []
        self._order = count()
        self._busy: set[str] = set()
        self._ended_at: dict[str, float] = dict.fromkeys(self.engines, 0.0)
        for name in self.engines:
            self.tell(WorkerAdded(Worker(id=name, model="m", url=f"http://{name}")))
            self.tell(WorkerReported(name, WorkerReport(healthy=True)))

    def at(self, when: float, action: Any) -> None:
        """Have something happen later."""
        heappush(self._heap, (when, next(self._order), action))

    def slow(self, worker: str, factor: float, since: float, until: float) -> None:
        """A worker's steps take `factor` times as long for a while."""
        engine = self.engines[worker]
        self.at(since, lambda: setattr(engine, "slowdown", factor))
        self.at(until, lambda: setattr(engine, "slowdown", 1.0))

    def run(self, jobs: Sequence[Job]) -> list[Told]:
        """Play all jobs to their ends."""
        for i, job in enumerate(jobs):
            self.at(job.at, lambda i=i, job=job: self._arrive(f"r{i}", job))
        while self._heap:
            self.now, _, action = heappop(self._heap)
            action()
        return list(self.told.values())

    def tell(self, fact: Fact) -> None:
        commands = self.kernel.handle(fact, self.now)
        self.log.append((self.now, fact, commands))
        for command in commands:
            if isinstance(command, Dispatch):
                self.told[command.request_id].worker = command.worker_id
                self.at(self.now + LINK_S, lambda c=command: self._add(c))
            assert not isinstance(command, Shed | Fail)
        deadline = self.kernel.next_deadline()
        if deadline < inf:
            self.at(max(deadline, self.now), lambda: self.tell(TimerFired()))

    def _arrive(self, request_id: str, job: Job) -> None:
        self.told[request_id] = Told(job)
        self.tell(
            RequestArrived(
                Request(
                    id=request_id,
                    model="m",
                    tenant="t",
                    tier="standard",
                    promise=job.promise,
                    prompt_bytes=job.prompt * BYTES_PER_TOKEN,
                    max_tokens=4096,
                    blocks=job.blocks,
                    seed=self.rng.getrandbits(32),
                )
            )
        )

    def _add(self, command: Dispatch) -> None:
        job, engine = self.told[command.request_id].job, self.engines[command.worker_id]
        per_block = BLOCK_BYTES // BYTES_PER_TOKEN // engine.profile.block_size
        blocks = [hash((b, i)) for b in job.blocks for i in range(per_block)]
        engine.add(Generation(command.request_id, job.prompt, job.output, blocks))
        self._step(command.worker_id)

    def _step(self, worker: str) -> None:
        if worker in self._busy:
            return
        plan = self.engines[worker].plan()
        if plan is not None:
            self._busy.add(worker)
            self.at(self.now + plan.seconds, lambda: self._stepped(worker, plan))

    def _stepped(self, worker: str, plan: StepPlan) -> None:
        self._busy.discard(worker)
        engine = self.engines[worker]
        had = set(engine.decoding)
        outcome = engine.complete(plan)
        for request_id in outcome.first:
            self.told[request_id].first_at = self.now
            self.tell(FirstTokenSeen(request_id, self.now))
        seconds = self.now - self._ended_at[worker] if had else 0.0
        self._ended_at[worker] = self.now
        self.tell(StepsSeen(worker, (Step(self.now, seconds, len(had), len(had)),)))
        for request_id in outcome.finished:
            told = self.told[request_id]
            told.done_at = self.now
            itl_s = told.itl_s if told.job.output > 1 else 0.0
            self.tell(
                StreamEnded(request_id, told.job.output, itl_s, prompt_tokens=told.job.prompt)
            )
        self._step(worker)


def poisson(
    rate: float, seconds: float, seed: int, promise: Promise, prompt: int = 800
) -> list[Job]:
    """Requests with exponential lengths around `prompt` and 150 tokens."""
    rng, at, jobs = random.Random(seed), 0.0, []
    while (at := at + rng.expovariate(rate)) < seconds:
        p = min(max(int(rng.lognormvariate(0.0, 0.8) * prompt), 16), 8000)
        o = min(max(int(rng.lognormvariate(0.0, 0.6) * 150), 4), 1000)
        jobs.append(Job(at, p, o, promise))
    return jobs


def attainment(told: Sequence[Told]) -> float:
    return sum(t.kept for t in told) / len(told)
