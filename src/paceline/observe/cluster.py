"""How has the fleet done of late, by whatever one may ask?

Each request that is over counts in one cell: its model, tier, tenant and worker. Time is cut into
slots of 2 s; older ones are put together into slots of 10 s, and these into slots of 2 minutes, so
that memory is bounded whatever the load. All is done for many requests at a time.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from math import nan
from typing import NamedTuple, TypeVar

import numpy as np

from paceline.domain.request import Request
from paceline.domain.worker import Worker
from paceline.kernel import Kernel
from paceline.observe.batches import Batches
from paceline.observe.cost import shares
from paceline.observe.sheet import Places, Sheet, Who
from paceline.observe.sketch import BINS, Floats, Ints
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
"""Beyond so many, tenants count as one, or all else does too."""
TURNED_AWAY = (429, 503)


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


class _Gaps(NamedTuple):
    """Gaps as the relay has counted them up to now."""

    keys: list[tuple[str, str, str]]
    counts: Ints


class _Gathered(NamedTuple):
    """What is new since the last look."""

    rows: list[Floats]
    """Of requests that are over: as `of_requests` takes them."""
    cells: Ints
    """Of which gaps are told."""
    gaps: Ints
    spent: Sequence[Row]
    preempted: Sequence[Row]


class Cells:
    """Numbers for combinations of model, tier, tenant and worker: never more than `MAX_CELLS`."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._numbers: dict[tuple[str, str, str, str], int] = {}
        self._free: list[int] = []
        self.of: list[Of] = []

    def number(self, model: str, tier: str, tenant: str, worker: str) -> int:
        """The cell of these."""
        key = (model, tier, tenant, worker)
        known = self._numbers.get(key)
        if known is None and len(self._numbers) >= MAX_CELLS:
            key = (model, tier, tenant and OTHER, worker)
            known = self._numbers.get(key)
            if known is None:  # whoever has no tier or tenant is nobody, and stays so
                key = (OTHER, tier and OTHER, tenant and OTHER, OTHER)
                known = self._numbers.get(key)
        return known if known is not None else self._new(key)

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

    def keep(self, used: set[int]) -> bool:
        """Only these are still spoken of: the numbers of the others, if any, may be given anew."""
        gone = [key for key, number in self._numbers.items() if number not in used]
        for key in gone:
            self._free.append(self._numbers.pop(key))
        return bool(gone)


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
        self.batches = Batches(kernel)
        self._kernel = kernel
        self._gaps = gaps
        self._attain = attain
        self._asked = asked
        self._cell_of = Places(self._cell)
        self._tiers: dict[str, int] = {}
        self._tier_of = Places(lambda who: self._tiers.setdefault(who.tier, len(self._tiers)))
        self._looked_at = self._folded_at = now
        self._lock = asyncio.Lock()
        self._levels = [_Level(seconds, count, now) for seconds, count in LEVELS]
        self._rows: list[Floats] = []
        self._gaps_before = _Gaps([], np.empty((0, 0), np.int64))
        self._preemptions: dict[str, int] = {}

    def count(self, sheet: Sheet) -> None:
        """These requests are over."""
        tiers = self._tier_of.of(sheet)
        allowed = np.array([1.0 - self._attain(tier) for tier in self._tiers])
        shed = np.isin(sheet.status, TURNED_AWAY)
        self._rows.append(
            np.column_stack(
                (
                    self._cell_of.of(sheet),
                    np.where(sheet.sound, sheet.queued_s, nan),
                    np.where(sheet.streams, sheet.ttft_s, nan),
                    np.where(sheet.gaps, sheet.itl_s, nan),
                    np.where(sheet.gaps, sheet.stall_s, nan),
                    np.ones(len(sheet.who)),
                    sheet.kept,
                    allowed[tiers],
                    shed,
                    ~(sheet.sound | shed | sheet.left),
                    sheet.left,
                    sheet.prompt_tokens,
                    sheet.cached_tokens,
                    sheet.output_tokens,
                    sheet.output_tokens * sheet.kept,
                )
            )
        )

    def _cell(self, who: Who) -> int:
        return self.cells.number(who.model, who.tier, who.tenant, who.worker)

    def look(self, now: float) -> None:
        """Take in what has happened since the last look. To be called every two seconds, about."""
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
        seconds, self._looked_at = now - self._looked_at, now
        number = self.cells.number
        divided = list(shares(self._kernel.workers.values(), seconds, self._asked))
        self.batches.look(now)
        self.batches.took(divided)
        spent = [(number(s.model, s.tier, s.tenant, s.worker), s.worker_s, s.cost) for s in divided]
        return _Gathered(rows, *self._new_gaps(), spent, list(self._new_preemptions()))

    def _new_gaps(self) -> tuple[Ints, Ints]:
        """Cells, and how many gaps each has had since the last look."""
        keys = list(self._gaps)
        counts = np.array(list(self._gaps.values()), np.int64)
        cells = [self.cells.number(model, tier, "", worker) for model, tier, worker in keys]
        before = self._gaps_before
        if keys == before.keys:
            more = counts - before.counts
        else:
            known = dict(zip(before.keys, before.counts, strict=True))
            more = counts - np.array(
                [known.get(key, 0 * row) for key, row in zip(keys, counts, strict=True)]
            )
        self._gaps_before = _Gaps(keys, counts)
        anew = (more < 0).any(axis=-1, keepdims=True)  # its worker has left and joined again
        return np.array(cells, np.int64), np.where(anew, counts, more)

    def _fold(self, new: _Gathered, now: float) -> Ints | None:
        """Put what is new into the slots; gives the cells in use, when old ones may have gone."""
        parts = self._levels[0].parts
        parts += [of_requests(rows) for rows in new.rows]
        if len(new.cells):
            parts.append(of_gaps(new.cells, new.gaps))
        parts.append(of_sums(new.spent, "worker_s", "cost"))
        parts.append(of_sums(new.preempted, "preemptions"))
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
            new = [int(cell) for rows in self._rows for cell in rows[:, 0]]
            if self.cells.keep({*used.tolist(), *new}):
                self._cell_of.forget()

    def _new_preemptions(self) -> Iterator[Row]:
        before, self._preemptions = self._preemptions, {}
        for worker_id, state in self._kernel.workers.items():
            count = self._preemptions[worker_id] = state.preemptions
            if more := count - before.get(worker_id, count):
                yield self.cells.number(state.worker.model, "", "", worker_id), more

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
