"""How much slower may a worker's tokens become before a promise breaks?

What routing asks of a worker for a request, asked for whoever may come next. It reads and changes
nothing: a look at the fleet must not lead to other decisions than a replay of its facts.
"""

from __future__ import annotations

from math import inf
from typing import Literal

import msgspec

from paceline.kernel import Kernel
from paceline.kernel.worker import WorkerState
from paceline.policy.headroom import LEAST_SPARE
from paceline.policy.pressure import KV_FULL
from paceline.policy.standing import LEAST_ROOM, PROBE, RELAX_S
from paceline.policy.steptime import StepModel

Bound = Literal["ttft", "itl", "kv"]


class Room(msgspec.Struct, frozen=True):
    """A worker as it stands."""

    headroom: float
    """Least of (promise - TTFT)/promise for whoever comes next, of the share of their promise that
    those have left who wait there for a first token, of (promise - ITL)/promise over its streams,
    and of the KV cache that is left; 1: all."""
    least: Bound
    """Which of them that is."""
    ttft_s: float
    """What the next prompt would meet: prompts ahead of it, itself, and the steps under way."""
    itl_s: float
    """What its streams meet, prefill included: base / (1 - share of time that prefill takes)."""
    slowdown: float
    """Step times of late over learned ones; an open gap counts before it closes."""
    kv_used: float | None
    """Share of the KV cache that its streams hold by our books; None: its size is unknown."""


class Next(msgspec.Struct, frozen=True):
    """Whoever comes next to a model: like those that are there."""

    prompt_tokens: float = 0.0
    """To be prefilled, as on average lately."""
    ttft_s: float = inf
    """Promised: the tightest of those that are there."""


def next_ones(kernel: Kernel) -> dict[str, Next]:
    """Whoever comes next, by model."""
    tightest_s = dict.fromkeys(kernel.pools, inf)
    for live in kernel.requests.values():
        model, promise_s = live.request.model, live.request.promise.ttft_s
        tightest_s[model] = min(promise_s, tightest_s.get(model, inf))
    return {
        model: Next(pool.usual_tokens, tightest_s[model]) for model, pool in kernel.pools.items()
    }


def room(state: WorkerState, now: float, following: Next = Next()) -> Room:  # noqa: B008 (frozen)
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
    prompt = following.prompt_tokens if state.worker.role != "decode" else 0.0
    ttft_s = state.windows.overhead_s + slower * _prefill_s(state, model, base_s, prompt)
    kv_used = (ledger.kv + ledger.arriving) / state.kv_capacity
    itl_rooms = [1.0 - itl_s / promise_s for promise_s, _ in ledger.promised if promise_s < inf]
    rooms: dict[Bound, float] = {
        "kv": min(KV_FULL - kv_used, 1.0),
        "itl": min(itl_rooms, default=1.0),
        "ttft": min(1.0 - ttft_s / following.ttft_s, *_left(state, now)),
    }
    least = min(rooms, key=lambda bound: rooms[bound])
    return Room(
        headroom=rooms[least],
        least=least,
        ttft_s=ttft_s,
        itl_s=itl_s,
        slowdown=model.slowdown * slower,
        kv_used=kv_used if state.kv_capacity < inf else None,
    )


def _prefill_s(state: WorkerState, model: StepModel, base_s: float, prompt: float) -> float:
    """Until a prompt would be prefilled, in full steps and a last one: as in `policy.headroom`.
    `base_s`: of a step without one."""
    ledger = state.ledger
    most = max(state.windows.budget - ledger.streams, LEAST_ROOM)
    full, last = divmod(ledger.ahead + prompt, most)
    under_way_s = 0.5 * base_s if ledger.entries else 0.0
    full_s = full * model.step_s(ledger.streams, most, ledger.kv) if full else 0.0
    return under_way_s + full_s + model.step_s(ledger.streams, last, ledger.kv)


def _left(state: WorkerState, now: float) -> list[float]:
    """Of those that wait there for a first token: shares of the promised time that are left.

    However short its queue may seem, who comes next is no better off.
    """
    return [
        min((entry.deadline - now) / entry.request.promise.ttft_s, 1.0)
        for entry in state.ledger.entries.values()
        if not entry.decoding and not entry.fetches and entry.deadline < inf
    ] or [1.0]
