"""What is there to see in the gateway's answers? From what it says to what is shown, purely."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import msgspec

from paceline import words
from paceline.dashboard.said import Decision, Figures, Finding, Fleet, Stall, Summary, Tier, Worker

TIGHT = 0.15
"""Headroom below which a worker counts as tight."""
SLOW = 1.4
"""Times as long as they used to from which on a worker's steps are compared with those, not with
the steps of its like: as in findings."""
UNSEEN_S = 5.0
"""From when on it is said that no step was seen since."""
FAST_BURN = 6.0
"""Burn rate at which a month's budget is gone in five days."""

State = Literal["down", "avoided", "draining", "over", "full", "tight", "roomy", "idle"]

STATES: dict[State, str] = {
    "down": "down",
    "avoided": "avoided",
    "draining": "draining",
    "over": "over its promises",
    "full": "full (requests wait)",
    "tight": "tight",
    "roomy": "roomy",
    "idle": "idle",
}
"""Worst first, with the words for it."""


BOUNDS = {"ttft": "TTFT", "itl": "ITL", "kv": "KV"}
"""What headroom may be of."""


def state_of(worker: Worker, waiting: int = 0) -> State:
    """How a worker is, in one word; so many requests wait at the gateway for it or its like."""
    if worker.report is None or not worker.report.healthy:
        return "down"
    if worker.draining:
        return "draining"
    if worker.ejected_for_s > 0:
        return "avoided"
    if not worker.in_flight.streams and not worker.in_flight.arriving:
        return "idle"
    headroom = worker.room.headroom
    if headroom < 0:
        return "over"
    return "full" if waiting else "tight" if headroom < TIGHT else "roomy"


def kv_of(worker: Worker) -> float | None:
    """Share of its KV cache in use: as the engine says, else as the gateway reckons."""
    told = worker.report.kv_used if worker.report is not None else None
    return told if told is not None else worker.room.kv_used


NOBODY: Mapping[str, int] = {}


class Tile(msgspec.Struct, frozen=True):
    """One worker on the map."""

    id: str
    state: State
    where: str
    """Node and role, as far as they say something."""
    headroom: float
    least: str
    """What it is of."""
    streams: int
    arriving: int
    kv: float | None
    slow: float | None
    """Times as long as they should that its steps take, if it is slow..."""
    unseen_s: float | None
    """...and since when that was not seen any more, if not just now."""
    says: str
    """All of it in one sentence, for those who do not see it."""


def tiles(workers: Iterable[Worker], waiting: Mapping[str, int] = NOBODY) -> list[Tile]:
    """The map: always in the same order, so that a worker is found where it was. `waiting`: how
    many requests do so at the gateway, by model."""
    ordered = sorted(workers, key=lambda w: (w.model, w.node, w.role, _by_number(w.id)))
    return [tile(worker, waiting.get(worker.model, 0)) for worker in ordered]


def slow_of(worker: Worker) -> tuple[float, str] | None:
    """How many times as long do its steps take, and as what? None: no finding calls it slow."""
    seen = worker.slower
    if seen is None or not seen.found:
        return None
    own = seen.than_itself >= SLOW
    return (seen.than_itself, "they used to") if own else (seen.than_like, "at its like")


def unseen_of(worker: Worker) -> float | None:
    """For how long no step of it was seen, if not just now."""
    ago_s = worker.slower.seen_ago_s if worker.slower is not None else 0.0
    return ago_s if ago_s >= UNSEEN_S else None


def tile(worker: Worker, waiting: int = 0) -> Tile:
    state, kv = state_of(worker, waiting), kv_of(worker)
    slow = slow_of(worker) if state != "down" else None
    streams, least = worker.in_flight.streams, BOUNDS.get(worker.room.least, "")
    unseen_s = unseen_of(worker)
    parts = [
        f"{worker.id}: {STATES[state]}",
        f"headroom {words.percent(worker.room.headroom)}" + (f" of {least}" if least else ""),
        words.counted(streams, "stream"),
        f"KV cache {words.percent(kv)}" if kv is not None else "",
        f"steps take {slow[0]:.1f} times as long as {slow[1]}" if slow else "",
        f"no step seen for {words.span(unseen_s)}" if unseen_s is not None else "",
        f"node {worker.node}" if worker.node else "",
        f"role {worker.role}" if worker.role != "both" else "",
        worker.report.because if worker.report is not None and state == "down" else "",
    ]
    return Tile(
        id=worker.id,
        state=state,
        where=" · ".join(part for part in (worker.node, _role(worker.role)) if part),
        headroom=worker.room.headroom,
        least=least,
        streams=streams,
        arriving=worker.in_flight.arriving,
        kv=kv,
        slow=slow[0] if slow else None,
        unseen_s=unseen_s,
        says=", ".join(part for part in parts if part),
    )


def _role(role: str) -> str:
    return "" if role == "both" else role


def _by_number(name: str) -> tuple[str | int, ...]:
    """Names in the order of people: w2 before w10."""
    pieces: list[str | int] = [""]
    for letter in name:
        if letter.isdecimal() and isinstance(pieces[-1], int):
            pieces[-1] = pieces[-1] * 10 + int(letter)
        elif letter.isdecimal():
            pieces.append(int(letter))
        elif isinstance(pieces[-1], str):
            pieces[-1] += letter
        else:
            pieces.append(letter)
    return tuple(pieces)


def workers_of(fleet: Fleet, model: str = "") -> list[Worker]:
    """Of one model, or of all."""
    return [
        worker
        for name, pool in fleet.models.items()
        if model in ("", name)
        for worker in pool.workers
    ]


def tally(shown: Iterable[Tile]) -> list[tuple[State, int]]:
    """How many workers are in which state, worst first, without those in none."""
    counts = dict.fromkeys(STATES, 0)
    for each in shown:
        counts[each.state] += 1
    return [(state, number) for state, number in counts.items() if number]


# Promises.


class Window(msgspec.Struct, frozen=True):
    """A tier's promise over a window."""

    name: str
    attainment: float | None
    burn: float | None
    requests: int
    verdict: Literal["none", "kept", "burning", "broken"]


class Standing(msgspec.Struct, frozen=True):
    """How the promise of a tier fares."""

    tier: Tier
    promise: str
    windows: list[Window]
    now: Figures
    """Over a minute."""

    @property
    def worst(self) -> str:
        return max((w.verdict for w in self.windows), key=VERDICTS.index, default="none")


VERDICTS = ("none", "kept", "burning", "broken")


def verdict(burn: float | None) -> Literal["none", "kept", "burning", "broken"]:
    """Burn above 1 spends more of what may be broken than there is."""
    if burn is None:
        return "none"
    return "kept" if burn <= 1.0 else "burning" if burn < FAST_BURN else "broken"


def standings(tiers: Iterable[Tier], summaries: Mapping[str, Summary]) -> list[Standing]:
    """Every tier over every window, by name of the window; those that weigh most come first.

    A tier that requests came for, but that is no longer in the configuration, is left out.
    """
    by_window = {
        name: {group.of.get("tier", ""): group for group in summary.groups}
        for name, summary in summaries.items()
    }
    found = []
    for tier in sorted(tiers, key=lambda tier: (-tier.weight, tier.name)):
        windows = []
        for name, groups in by_window.items():
            seen = groups.get(tier.name, Figures())
            windows.append(
                Window(name, seen.attainment, seen.burn, seen.requests, verdict(seen.burn))
            )
        minute = by_window.get("1 min", {}).get(tier.name, Figures())
        found.append(Standing(tier, promise_of(tier), windows, minute))
    return found


def promise_of(tier: Tier) -> str:
    """What was promised, in words."""
    told = {"TTFT": tier.promise.ttft_s, "ITL": tier.promise.itl_s, "stall": tier.promise.stall_s}
    parts = [f"{name} ≤ {words.promised(bound)}" for name, bound in told.items() if bound]
    return " · ".join(parts) or "nothing promised"


# Stalls.


class Lane(msgspec.Struct, frozen=True):
    """What a worker's clients waited for too long, over time."""

    worker: str
    stalls: list[Stall]
    late_s: float
    cause: str
    """The one that took most."""


def lanes(workers: Mapping[str, Sequence[Stall]], since: float, most: int) -> list[Lane]:
    """The workers with most late seconds since then; those without any are left out."""
    found = []
    for name, stalls in workers.items():
        late = [stall for stall in stalls if stall.at >= since]
        if late:
            lost = by_cause(late)
            found.append(Lane(name, late, sum(lost.values()), next(iter(lost), "")))
    return sorted(found, key=lambda lane: (-lane.late_s, lane.worker))[:most]


def by_cause(stalls: Iterable[Stall]) -> dict[str, float]:
    """Late seconds of each cause, most first; a step that is late for ten streams counts once."""
    lost: dict[str, float] = {}
    for stall in stalls:
        for cause, late_s in (stall.split or {stall.cause: stall.late_s}).items():
            lost[cause] = lost.get(cause, 0.0) + late_s
    return dict(sorted(lost.items(), key=lambda item: (-item[1], item[0])))


# Decisions.


class Choice(msgspec.Struct, frozen=True):
    """A decision as a line of the log."""

    at: float
    request: str
    kind: str
    """Sent, again, waits, turned away, moved, ..."""
    worker: str
    because: str
    expected: tuple[str, str] = ("", "")
    """Of the worker chosen: times, and what else."""
    instead: tuple[str, str] = ("", "")
    """The road not taken: where to and at what cost, and its times."""


KINDS = {
    "Dispatch": "sent",
    "Prefill": "prefill",
    "Hold": "waits",
    "Shed": "turned away",
    "Fail": "failed",
    "Pause": "paused",
    "Move": "moved",
    "Degrade": "degraded",
}


def choices(decisions: Iterable[Decision], kind: str = "") -> list[Choice]:
    """Those of one kind (a word of `KINDS`), or all."""
    found = [choice(decision) for decision in decisions]
    return [each for each in found if kind in ("", each.kind)]


def choice(decision: Decision) -> Choice:
    command = decision.command
    expected, instead = ("", ""), ("", "")
    if (seen := command.predicted) is not None:
        room = f"headroom {words.percent(seen.headroom)}"
        if seen.cached_tokens:
            room += f", {words.count(seen.cached_tokens)} tokens cached"
        expected = (_times(seen.ttft_s, seen.itl_s), room)
    if (other := command.runner_up) is not None:
        cost = f"{other.worker_id} costs {_signed(other.costs_more)}"
        instead = (cost, _times(other.ttft_s, other.itl_s))
    elif command.type == "Dispatch":
        instead = ("no other was weighed", "")
    because = command.because
    if command.type == "Dispatch":
        because = because.partition(": TTFT")[0]  # said beside it, with more
        if command.attempt > 1:
            because += f" (attempt {command.attempt})"
    if command.retry_after_s:
        because += f"; retry after {words.seconds(command.retry_after_s)}"
    return Choice(
        decision.at,
        command.request_id,
        KINDS.get(command.type, command.type.lower()),
        command.worker_id or command.tier,
        because,
        expected,
        instead,
    )


def _times(ttft_s: float, itl_s: float) -> str:
    return f"TTFT {words.seconds(ttft_s)} · ITL {words.seconds(itl_s)}"


def _signed(cost: float) -> str:
    if abs(cost) < 5e-4:
        return "the same"
    return f"{cost:.3f} more" if cost > 0 else f"{-cost:.3f} less"


# Findings.


def evidence_of(finding: Finding) -> list[tuple[str, str]]:
    """Names and values, each in its unit if the name tells one."""
    return [words.evidence(name, value) for name, value in finding.evidence.items()]
