"""How has the fleet done of late, by whatever one may ask?

Each request that is over counts in one cell: its model, tier, tenant and worker. Time is cut into
slots of 2 s; older ones are put together into slots of 10 s, and these into slots of 2 minutes, so
that memory is bounded whatever the load. For each request one row is kept until the next look;
all else is done for many at a time.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from math import nan
from typing import NamedTuple, TypeVar

import numpy as np

from paceline.domain.outcome import Outcome
from paceline.domain.request import Request
from paceline.domain.worker import Worker
from paceline.kernel import Kernel
from paceline.observe.cost import Share, shares
from paceline.observe.sketch import BINS, Ints
from paceline.observe.table import (
    MEASURES,
    OTHER,
    Row,
    Table,
    merged,
    of_gaps,
    of_requests,
    of_sums,
)

T = TypeVar("T")

WINDOWS = (10, 60, 600, 3600)
"""Seconds that can be asked for."""
LEVELS = ((2.0, 30), (10.0, 60), (120.0, 30))
"""Seconds of a slot, and how many are kept: a minute, ten minutes, an hour."""
MAX_CELLS = 2048
"""Beyond so many, tenants are folded into one, then all else."""
TURNED_AWAY = (429, 503)
LEFT = 499


class Of(NamedTuple):
    """Whom a cell is about. Empty: nobody in particular."""

    model: str = ""
    tier: str = ""
    tenant: str = ""
    role: str = ""
    node: str = ""
    worker: str = ""


def of_worker(worker: Worker) -> Of:
    """Whom a worker by itself is about."""
    return Of(worker.model, "", "", worker.role, worker.node, worker.id)


class Snapshot(NamedTuple):
    """What was counted in some time."""

    of: Sequence[Of]
    """Of each cell, by its number."""
    table: Table
    covered_s: float


class Slot(NamedTuple):
    began_at: float
    """On the clock of those who tell."""
    seconds: float
    table: Table


class _Gathered(NamedTuple):
    """What is new since the last look."""

    rows: list[Row]
    cells: list[int]
    """Of which gaps are told."""
    gaps: list[list[int]]
    gaps_before: list[list[int]]
    sums: list[tuple[int, str, float]]


class Cells:
    """Numbers for combinations of model, tier, tenant and worker: never more than `MAX_CELLS`."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._numbers: dict[tuple[str, str, str, str], int] = {}
        self._free: list[int] = []
        self.of: list[Of] = []

    def number(self, model: str, tier: str, tenant: str, worker: str) -> int:
        """The cell of these."""
        for key in (
            (model, tier, tenant, worker),
            (model, tier, OTHER, worker),
            (OTHER, OTHER, OTHER, OTHER),
        ):
            known = self._numbers.get(key)
            if known is not None:
                return known
            if len(self._numbers) < MAX_CELLS - 1 or key[0] == OTHER:
                return self._new(key)
        raise AssertionError("the last of them always has room")

    def _new(self, key: tuple[str, str, str, str]) -> int:
        model, tier, tenant, worker_id = key
        state = self._kernel.workers.get(worker_id)
        role, node = (state.worker.role, state.worker.node) if state is not None else ("", "")
        of = Of(model, tier, tenant, role, node, worker_id)
        if self._free:
            number = self._free.pop()
            self.of[number] = of
        else:
            number = len(self.of)
            self.of.append(of)
        self._numbers[key] = number
        return number

    def keep(self, used: set[int]) -> None:
        """Only these are still spoken of: the numbers of the others may be given anew."""
        for key in [key for key, number in self._numbers.items() if number not in used]:
            self._free.append(self._numbers.pop(key))


class _Level:
    """Slots of one length: the newest ones, and what the next will be made of."""

    def __init__(self, seconds: float, count: int, now: float) -> None:
        self.seconds = seconds
        self.slots: deque[Slot] = deque(maxlen=count)
        self.parts: list[Table] = []
        self._began_at = now

    def roll(self, now: float) -> Slot | None:
        """Close the slot, if its time is over."""
        if now // self.seconds == self._began_at // self.seconds:
            return None
        slot = self.open(now)
        self._began_at = now
        self.parts.clear()
        self.slots.append(slot)
        return slot

    def open(self, now: float) -> Slot:
        """What there is of the slot that is not over."""
        return Slot(self._began_at, now - self._began_at, merged(self.parts))


class Cluster:
    """All that a gateway has seen of its fleet in the last hour."""

    def __init__(
        self,
        kernel: Kernel,
        gaps: Mapping[tuple[str, str, str], Sequence[int]],
        attain: Callable[[str], float],
        now: float,
        asked: Callable[[Request], Request] = lambda request: request,
    ) -> None:
        """`gaps`: counts of gaps by (model, tier, worker); `attain`: of a tier, by its name;
        `asked`: what a request under way was when it came."""
        self.cells = Cells(kernel)
        self._kernel = kernel
        self._gaps = gaps
        self._attain = attain
        self._asked = asked
        self._looked_at = self._folded_at = now
        self._lock = asyncio.Lock()
        self._levels = [_Level(seconds, count, now) for seconds, count in LEVELS]
        self._rows: list[Row] = []
        self._gaps_before: dict[tuple[str, str, str], list[int]] = {}
        self._preemptions: dict[str, int] = {}

    def closed(self, outcome: Outcome) -> None:
        """A request is over."""
        asked, status = outcome.request, outcome.status
        sound = status < 400 and not outcome.error
        kept, streams = outcome.kept, sound and asked.streaming
        left = status == LEFT or (not sound and outcome.error == "the client left")
        shed = status in TURNED_AWAY
        gaps = streams and outcome.itl_s > 0
        cell = self.cells.number(asked.model, asked.tier, asked.tenant, outcome.worker)
        self._rows.append(
            (
                cell,
                outcome.queued_s if sound else nan,
                outcome.ttft_s if streams else nan,
                outcome.itl_s if gaps else nan,
                outcome.stall_s if gaps else nan,
                1,
                kept,
                1.0 - self._attain(asked.tier),
                shed,
                not (sound or shed or left),
                left,
                outcome.prompt_tokens or 0,
                outcome.cached_tokens or 0,
                outcome.output_tokens,
                outcome.output_tokens if kept else 0,
            )
        )

    def look(self, now: float) -> None:
        """Take in what has happened since the last look. To be called about once a second."""
        self._forget(self._fold(self._gathered(now), now))

    async def look_aside(self, now: float) -> None:
        """The same, without keeping the event loop from its streams."""
        gathered = self._gathered(now)
        self._forget(await self.aside(lambda: self._fold(gathered, now)))

    async def aside(self, work: Callable[[], T]) -> T:
        """Have something done with what was counted, in a thread; one thing at a time."""
        async with self._lock:
            return await asyncio.to_thread(work)

    def _gathered(self, now: float) -> _Gathered:
        rows, self._rows = self._rows, []
        before, self._gaps_before = self._gaps_before, {k: [*v] for k, v in self._gaps.items()}
        nothing = [0] * max(map(len, self._gaps_before.values()), default=0)
        cells = [self.cells.number(model, tier, "", worker) for model, tier, worker in self._gaps]
        spent = shares(self._kernel.workers.values(), now - self._looked_at, self._asked)
        self._looked_at = now
        return _Gathered(
            rows,
            cells,
            list(self._gaps_before.values()),
            [before.get(key, nothing) for key in self._gaps_before],
            [*self._priced(spent), *self._new_preemptions()],
        )

    def _fold(self, new: _Gathered, now: float) -> Ints | None:
        """Put what is new into the slots; gives the cells in use, when old ones may have gone."""
        parts = self._levels[0].parts
        parts.append(of_requests(new.rows))
        if new.cells:
            gaps = np.array(new.gaps) - np.array(new.gaps_before)
            parts.append(of_gaps(np.array(new.cells), gaps))
        parts.append(of_sums(new.sums))
        slot = None
        for finer, coarser in pairwise([*self._levels, None]):
            assert finer is not None
            slot = finer.roll(now)
            if slot is not None and coarser is not None:
                coarser.parts.append(slot.table)
        self._folded_at = now
        if slot is None:
            return None
        kept = [table for level in self._levels for table in level.parts]
        kept += [slot.table for level in self._levels for slot in level.slots]
        series = len(MEASURES) * BINS
        return np.unique(np.concatenate([x for t in kept for x in (t.cells, t.codes // series)]))

    def _forget(self, used: Ints | None) -> None:
        if used is not None:
            self.cells.keep({*used.tolist(), *(int(row[0]) for row in self._rows)})

    def _new_preemptions(self) -> Iterator[tuple[int, str, float]]:
        before, self._preemptions = self._preemptions, {}
        for worker_id, state in self._kernel.workers.items():
            count = self._preemptions[worker_id] = state.preemptions
            if more := count - before.get(worker_id, count):
                cell = self.cells.number(state.worker.model, "", "", worker_id)
                yield cell, "preemptions", more

    def _priced(self, spent: Iterable[Share]) -> Iterator[tuple[int, str, float]]:
        for share in spent:
            cell = self.cells.number(share.model, share.tier, share.tenant, share.worker)
            yield cell, "worker_s", share.worker_s
            yield cell, "cost", share.cost

    # What can be asked.

    def slots(self, window_s: float) -> list[Slot]:
        """About the last `window_s` before the last look, oldest first, without a hole."""
        depth = [each for each, _ in LEVELS].index(slot_s(window_s))
        level, now = self._levels[depth], self._folded_at
        since = now - window_s - 0.5 * level.seconds
        finer = [table for below in self._levels[:depth] for table in below.parts]
        newest = level.open(now)
        newest = newest._replace(table=merged([newest.table, *finer]))
        return [slot for slot in (*level.slots, newest) if slot.began_at >= since]

    def snapshot(self, window_s: float) -> Snapshot:
        """All of them together."""
        slots = self.slots(window_s)
        covered_s = self._folded_at - slots[0].began_at if slots else 0.0
        return Snapshot(tuple(self.cells.of), merged([slot.table for slot in slots]), covered_s)

    def history(self, window_s: float) -> list[tuple[Slot, Snapshot]]:
        """Each of them by itself, oldest first."""
        of = tuple(self.cells.of)
        return [(slot, Snapshot(of, slot.table, slot.seconds)) for slot in self.slots(window_s)]


def slot_s(window_s: float) -> float:
    """How long the slots of a window are."""
    return next(each for each, count in LEVELS if each * count >= window_s)
