"""For whom does each worker work at this moment, and what does that cost?

Asked again and again, as a sampling profiler asks a program: what a moment is like stands for the
seconds since the last one. The engine's present step decodes a token of every stream, and prefills
the oldest prompts as far as the step has room. The learned step time says how much of the step is
due to either part: decoding is shared equally by the streams, prefill by tokens. All shares of a
worker are its whole time together; that of an idle one is nobody's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import NamedTuple

import msgspec

from paceline.domain.request import Request
from paceline.kernel.ledger import Entry
from paceline.kernel.worker import WorkerState
from paceline.policy.standing import LEAST_ROOM, Curve

HOUR_S = 3600.0

curve_of = lru_cache(maxsize=1024)(Curve)
"""Of a worker's coefficients: they change seldom."""


class Share(msgspec.Struct, frozen=True, gc=False):
    """What some requests took of a worker. Without a tier: what nobody took."""

    model: str
    tier: str
    tenant: str
    worker: str
    worker_s: float
    cost: float
    batch: str = ""


def shares(
    workers: Iterable[WorkerState],
    seconds: float,
    asked: Callable[[Request], Request] = lambda request: request,
) -> Iterator[Share]:
    """How so many seconds of these workers are to be divided.

    `asked`: what a request was when it came. Whatever it is served as, its own tier pays.
    """
    for state in workers:
        step = present_step(state)
        spent: dict[tuple[str, str, str, str], float] = {}
        for entry, part in step.parts():
            request = asked(entry.request)
            key = request.model, request.tier, request.tenant, request.batch
            spent[key] = spent.get(key, 0.0) + part * seconds
        if not spent:
            spent[state.worker.model, "", "", ""] = seconds
        per_s = state.worker.cost_per_hour / HOUR_S
        for (model, tier, tenant, batch), worker_s in spent.items():
            yield Share(model, tier, tenant, state.worker.id, worker_s, worker_s * per_s, batch)


class PresentStep(NamedTuple):
    """The step that a worker is in. What it decodes and what it prefills are 1 together."""

    decode: float
    prefill: float
    """Which part of its time is due to it."""
    decoding: list[Entry]
    prefilling: dict[Entry, float]
    """Whose prompt tokens, and how many."""

    def parts(self) -> Iterator[tuple[Entry, float]]:
        """Which part of its time is due to whom."""
        if self.decoding:
            each = self.decode / len(self.decoding)
            for entry in self.decoding:
                yield entry, each
        if self.prefilling:
            each = self.prefill / sum(self.prefilling.values())
            for entry, tokens in self.prefilling.items():
                yield entry, tokens * each


def present_step(state: WorkerState) -> PresentStep:
    """What is in the step, as far as can be told; no part of anything for an idle worker."""
    ledger = state.ledger
    decoding = [entry for entry in ledger.entries.values() if entry.decoding]
    prefilling: dict[Entry, float] = {}
    streams = len(decoding)
    if streams < len(ledger.entries):
        room = max(state.windows.budget - streams, LEAST_ROOM)
        for entry in ledger.entries.values():  # in the order in which they were sent
            if room > 0 and not entry.decoding:
                prefilling[entry] = min(entry.uncached, room)
                room -= entry.uncached
    if not (decoding and prefilling):
        return PresentStep(float(bool(decoding)), float(bool(prefilling)), decoding, prefilling)
    curve = curve_of(state.timing.model().theta)
    context_s = curve.kv_s * ledger.kv
    step_s = curve.at(streams + sum(prefilling.values())) + context_s
    decode = (curve.at(streams) + context_s) / step_s
    return PresentStep(decode, 1.0 - decode, decoding, prefilling)
