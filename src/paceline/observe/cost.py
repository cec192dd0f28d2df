"""For whom does each worker work at this moment, and what does that cost?

Asked again and again, as a sampling profiler asks a program: what a moment is like stands for the
seconds since the last one. The engine's present step decodes a token of every stream, and prefills
the oldest prompts as far as the step has room. The learned step time says how much of the step is
due to either part: decoding is shared equally by the streams, prefill by tokens. All shares of a
worker are its whole time together; that of an idle one is nobody's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import NamedTuple

from paceline.domain.request import Request
from paceline.kernel.ledger import Entry
from paceline.kernel.worker import WorkerState
from paceline.policy.standing import LEAST_ROOM, Curve

HOUR_S = 3600.0

curve_of = lru_cache(maxsize=1024)(Curve)
"""Of a worker's coefficients: they change seldom."""


class Share(NamedTuple):
    """What some requests took of a worker. Without a tier: what nobody took."""

    model: str
    tier: str
    tenant: str
    worker: str
    worker_s: float
    cost: float


def shares(
    workers: Iterable[WorkerState],
    seconds: float,
    asked: Callable[[Request], Request] = lambda request: request,
) -> Iterator[Share]:
    """How so many seconds of these workers are to be divided.

    `asked`: what a request was when it came. Whatever it is served as, its own tier pays.
    """
    for state in workers:
        spent: Counter[tuple[str, str, str]] = Counter()
        for entry, part in present_step(state):
            request = asked(entry.request)
            spent[request.model, request.tier, request.tenant] += part  # type: ignore[assignment]
        if not spent:
            spent[state.worker.model, "", ""] = 1
        per_s = state.worker.cost_per_hour / HOUR_S
        for key, part in spent.items():
            yield Share(*key, state.worker.id, part * seconds, part * seconds * per_s)


def present_step(state: WorkerState) -> Iterator[tuple[Entry, float]]:
    """Which part of the step that a worker is in is due to which request? They add up to 1."""
    ledger = state.ledger
    decoding = [entry for entry in ledger.entries.values() if entry.decoding]
    room = max(state.windows.budget - len(decoding), LEAST_ROOM)
    prefilling = []
    for entry in ledger.entries.values():  # in the order in which they were sent
        if room > 0 and not entry.decoding:
            prefilling.append((entry, min(entry.uncached, room)))
            room -= entry.uncached
    tokens = sum(part for _, part in prefilling)
    curve, streams = curve_of(state.timing.model().theta), len(decoding)
    context_s = curve.kv_s * ledger.kv
    step_s = curve.at(streams + tokens) + context_s
    decode_s = step_s if not tokens else curve.at(streams) + context_s if streams else 0.0
    for entry in decoding:
        yield entry, decode_s / step_s / streams
    for entry, part in prefilling:
        yield entry, (step_s - decode_s) / step_s * (part / tokens)
