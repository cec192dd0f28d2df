"""How much slower may a worker's tokens become before a promise breaks?

What routing asks of a worker for a request, asked for nobody in particular. It reads and changes
nothing: a look at the fleet must not lead to other decisions than a replay of its facts.
"""

from __future__ import annotations

from math import inf

import msgspec

from paceline.kernel.worker import WorkerState
from paceline.policy.headroom import LEAST_SPARE
from paceline.policy.pressure import KV_FULL
from paceline.policy.standing import PROBE, RELAX_S


class Room(msgspec.Struct, frozen=True):
    """A worker as it stands."""

    headroom: float
    """Least of (promise - ITL)/promise over its streams and the KV cache that is left; 1: all."""
    itl_s: float
    """What its streams meet, prefill included: base / (1 - share of time that prefill takes)."""
    slowdown: float
    """Step times of late over learned ones; an open gap counts before it closes."""
    kv_used: float | None
    """Share of the KV cache that its streams hold by our books; None: its size is unknown."""


def room(state: WorkerState, now: float) -> Room:
    """Of one worker. Seconds and shares."""
    ledger, timing = state.ledger, state.timing
    model = timing.model()
    base_s = model.step_s(ledger.streams, kv=ledger.kv)
    probed_s = model.step_s(ledger.streams, prefill=PROBE, kv=ledger.kv)
    busy = state.prefill_rate(now) * (probed_s - base_s) / PROBE
    slower = 1.0
    if not ledger.entries:  # what was seen of it is forgotten, as routing does
        silent_s = max(now - state.last_step_at, 0.0)
        slower = model.slowdown ** (0.5 ** (silent_s / RELAX_S) - 1.0)
    else:
        usual_s = model.step_s(ledger.streams + ledger.ahead, kv=ledger.kv) * model.p99
        slower = max((now - state.last_step_at) / (usual_s + state.windows.overhead_s + 1e-4), 1.0)
    itl_s = slower * base_s / max(1.0 - busy, LEAST_SPARE) if ledger.streams else 0.0
    kv_used = (ledger.kv + ledger.arriving) / state.kv_capacity
    rooms = [1.0 - itl_s / promise_s for promise_s, _ in ledger.promised if promise_s < inf]
    return Room(
        headroom=min(*rooms, KV_FULL - kv_used, 1.0),
        itl_s=itl_s,
        slowdown=model.slowdown * slower,
        kv_used=kv_used if state.kv_capacity < inf else None,
    )
