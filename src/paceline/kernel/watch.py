"""Which requests would be better off elsewhere than on their worker?

Three kinds of trouble, looked for several times a second:

- A worker hangs: nothing has come from it for far longer than a step may take. How much longer it
  will hang is not known; that it has hung for so long makes as much again likely (Lindy's law), so
  its requests go elsewhere as soon as that costs less than the time that is lost already.
- A worker is slow: a stream will break its promise there and would keep it elsewhere, the wait for
  its prefill included.
- A worker's KV cache will run out: preemptible streams go before the engine throws out others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import inf

from paceline.domain.commands import Command, Move, Pause
from paceline.kernel.dispatcher import Dispatcher
from paceline.kernel.ledger import Entry
from paceline.kernel.live import Live
from paceline.kernel.pool import Pool
from paceline.kernel.worker import WorkerState
from paceline.policy.pressure import Stream, relief

LOOK_S = 0.25
"""How often workers are looked at while they have work."""
LEAST_HANG_S = 1.0
HANG_STEPS = 20.0
"""Times that a step may take until its worker counts as hung; and no less than `LEAST_HANG_S`."""
LEAST_SAMPLES = 50
"""Steps that must have been seen for a worker's silence to mean anything."""
SLOW = 1.5
"""Times its usual speed from which on a worker's streams are looked at."""
WORTH = 4.0
"""Promises, of its own weight, that a stream may cost where it goes. Its own is lost here; and what
it costs there passes with its prefill, while whoever stays gains for good."""
MOST_MOVES = 4
"""Streams that leave a slow worker at one look: the next look sees what that has changed."""


class Watch:
    """Looks after the requests that are on workers."""

    def __init__(
        self,
        pools: dict[str, Pool],
        requests: dict[str, Live],
        dispatcher: Dispatcher,
        blame: Callable[[WorkerState, float], None],
        pauses: bool,
    ) -> None:
        self._pools = pools
        self._requests = requests
        self._dispatcher = dispatcher
        self._blame = blame
        self._pauses = pauses
        """For want of KV cache: no use under a policy that would send them again at once."""
        self.look_at = inf
        """When `look` is wanted; infinite while there is no request."""

    def begin(self, now: float) -> None:
        """There is a request."""
        if self.look_at == inf:
            self.look_at = now + LOOK_S

    def look(self, now: float) -> list[Command]:
        """Look at all workers that have work."""
        commands: list[Command] = []
        for pool in self._pools.values():
            for worker in pool.workers.values():
                if worker.ledger.entries:
                    commands += self._look_at(pool, worker, now)
        self.look_at = now + LOOK_S if self._requests else inf
        return commands

    def _look_at(self, pool: Pool, worker: WorkerState, now: float) -> list[Command]:
        commands = self._relieved(pool, worker, now)
        if pool.usable_beside(worker, now):
            if self._hangs(pool, worker, now):
                self._blame(worker, now)
                commands += self._moved(worker, f"{worker.worker.id} hangs")
            elif worker.timing.slowdown > SLOW:
                commands += self._rescued(pool, worker, now)
        return commands

    def _hangs(self, pool: Pool, worker: WorkerState, now: float) -> bool:
        ledger = worker.ledger
        if ledger.streams == ledger.blind and not ledger.ahead:
            return False  # nothing can be seen of it
        if worker.timing.samples < LEAST_SAMPLES:
            return False
        standing = pool.standing(worker.place, now)
        step_s = standing.gain * standing.usual_s + standing.overhead_s
        away_s = 2.0 * self._dispatcher.usual_s
        return now - worker.quiet_since > max(LEAST_HANG_S, HANG_STEPS * step_s, away_s)

    def _moved(self, worker: WorkerState, because: str) -> list[Command]:
        """All that can go on elsewhere."""
        return [live.leave(Move, because) for live, _ in self._movable(worker)]

    def _rescued(self, pool: Pool, worker: WorkerState, now: float) -> list[Command]:
        """Streams that will break their promise here and would keep it elsewhere."""
        here = pool.standing(worker.place, now)
        slow_s = here.itl.factor * here.slowdown(now) * here.before_s
        found = []
        for live, entry in self._movable(worker):
            promise_s = live.request.promise.itl_s
            if entry.decoding and promise_s < inf:
                given = entry.had + worker.ledger.given(entry)
                left = max(entry.left - worker.ledger.given(entry), 0.25 * entry.left)
                spent_s = now - live.begun_at
                allowed_s = promise_s * (given + left)
                if spent_s + left * slow_s > allowed_s:
                    found.append((left, allowed_s - spent_s, int(given), live))
        found.sort(key=lambda item: (-item[0], item[3].request.id))
        commands: list[Command] = []
        for left, remains_s, given, live in found[:MOST_MOVES]:
            there = self._dispatcher.elsewhere(live, worker, given, now)
            if there is None or there.cost > WORTH * live.request.weight:
                continue
            seen = there.predicted
            if seen is not None and seen.ttft_s + left * seen.itl_s < remains_s:
                commands.append(live.leave(Move, f"{worker.worker.id} is too slow for it"))
        return commands

    def _relieved(self, pool: Pool, worker: WorkerState, now: float) -> list[Command]:
        """Preemptible streams whose room in the KV cache will be needed by others."""
        outlook = pool.outlook(worker, now) if self._pauses else None
        if outlook is None:
            return []
        limit = worker.kv_limit
        if outlook.bound <= limit or outlook.peak() <= limit:
            return []
        may = {
            live.request.id: Stream(live.request.id, entry.prompt + given, entry.left)
            for live, entry in self._movable(worker)
            if live.request.preemptible
            for given in [worker.ledger.given(entry)]
        }
        if not may:
            return []
        because = f"the KV cache of {worker.worker.id} would run out"
        paused = relief(outlook, limit, may.values())
        if paused:
            worker.outlook = None  # without them it is another
        return [self._requests[name].leave(Pause, because) for name in paused]

    def _movable(self, worker: WorkerState) -> Iterator[tuple[Live, Entry]]:
        """Requests that may leave a worker, and have not been asked to."""
        for name, entry in worker.ledger.entries.items():
            live = self._requests[name]
            if live.may_leave:
                yield live, entry
