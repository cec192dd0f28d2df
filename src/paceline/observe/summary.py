"""What does a person or a dashboard get to read of what was counted?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from paceline.kernel.worker import WorkerState
from paceline.observe.batches import Batch
from paceline.observe.cluster import Of, Snapshot, of_worker
from paceline.observe.sketch import BINS, Floats, Ints, middle, ranks
from paceline.observe.table import GAP, MEASURES, OTHER, SUMS, TIMED, renumbered, spread

DIMENSIONS = Of._fields
OF_WORKERS = frozenset(("model", "role", "node", "worker"))
"""Dimensions in which engines can be told apart too."""
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
SHARES = tuple(QUANTILES.values())
MOST_GROUPS = 256
"""Beyond so many, those with the fewest requests are one."""
COUNTS = ("requests", "kept", "shed", "failed", "left")
TOKENS = ("prompt_tokens", "cached_tokens", "output_tokens", "kept_tokens")
OF_A_BATCH = ("done", "failed", "under_way", "waiting")
PREEMPTIONS = SUMS.index("preemptions")
MILLION = 1e6

Figures = dict[str, Any]
Group = tuple[str, ...]
"""Values of the dimensions that one asks by."""


class Grouped(NamedTuple):
    """A snapshot by some dimensions."""

    groups: Sequence[Group]
    """Those with the most requests first."""
    counts: Ints
    """By group, measure and bin."""
    sums: Floats
    """By group, with a column for each of `SUMS`."""


def grouped(
    snapshot: Snapshot, by: Sequence[str], wanted: Callable[[Of], bool] = lambda of: True
) -> Grouped:
    """What cells that are `wanted` come to, put together by some dimensions."""
    places = [DIMENSIONS.index(name) for name in by]
    cells, sums = snapshot.table.cells.tolist(), snapshot.table.sums
    requests = dict(zip(cells, sums[:, SUMS.index("requests")].tolist(), strict=True))
    spoken_of = set(cells) | set((snapshot.table.codes // (len(MEASURES) * BINS)).tolist())
    members: dict[Group, list[int]] = {}
    for cell in sorted(spoken_of):
        of = snapshot.of[cell]
        if wanted(of):
            members.setdefault(tuple(of[place] for place in places), []).append(cell)
    weight = {group: sum(requests.get(c, 0) for c in found) for group, found in members.items()}
    ranked = sorted(members, key=lambda group: (-weight[group], group))
    groups = ranked[:MOST_GROUPS]
    if len(ranked) > MOST_GROUPS:
        groups.append((OTHER,) * len(places))
    numbers = np.full(len(snapshot.of), len(groups))  # of what is not wanted
    for number, group in enumerate(ranked):
        numbers[members[group]] = min(number, MOST_GROUPS)
    counts, sums = spread(renumbered(snapshot.table, numbers), len(groups) + 1)
    return Grouped(groups, counts[:-1], sums[:-1])


def report(
    snapshot: Snapshot,
    by: Sequence[str],
    wanted: Callable[[Of], bool],
    bounds: Floats,
    engines: Engines | None = None,
    gap_counts: bool = False,
) -> Figures:
    """What all groups have come to, and each of them. `bounds` are those of the relay's gaps."""
    found = grouped(snapshot, by, wanted)
    whole = Grouped([()], found.counts.sum(0, keepdims=True), found.sums.sum(0, keepdims=True))
    parts = [_figures(part, snapshot.covered_s, bounds, gap_counts) for part in (whole, found)]
    parts[0][0]["engine"] = engines and engines.all_of_them(whole.sums[0])
    for group, told, sums in zip(found.groups, parts[1], found.sums, strict=True):
        told["engine"] = engines and engines.of(group, sums)
    named = [
        {"of": dict(zip(by, group, strict=True)), **told}
        for group, told in zip(found.groups, parts[1], strict=True)
    ]
    nobody = ({"tier": ""}, {"tenant": ""})  # an idle worker's time, gaps
    groups = [g for g in named if not any(no.items() <= g["of"].items() for no in nobody)]
    return {"total": parts[0][0], "groups": groups}


def _figures(found: Grouped, covered_s: float, bounds: Floats, gap_counts: bool) -> list[Figures]:
    counts = found.counts.sum(-1).tolist()
    quantiles = middle(ranks(found.counts[:, :TIMED], SHARES)).tolist()
    all_gaps = found.counts[:, GAP, : len(bounds) + 1]
    told = []
    for place, sums in enumerate(found.sums.tolist()):
        of_one = _of_group(dict(zip(SUMS, sums, strict=True)), covered_s)
        for measure, name in enumerate(MEASURES[:TIMED]):
            of_one[name] = _quantiles(quantiles[place][measure], counts[place][measure])
        told.append(of_one)
    for of_one, seconds, gaps in zip(
        told, gap_quantiles(all_gaps, bounds).tolist(), all_gaps.tolist(), strict=True
    ):
        count = sum(gaps)
        of_one["gap_s"] = _quantiles(seconds, count)
        if gap_counts:
            of_one["gap_counts"] = gaps if count else None
    return told


def _of_group(sums: Mapping[str, float], covered_s: float) -> Figures:
    requests, kept, allowed = sums["requests"], sums["kept"], sums["allowed"]
    told: Figures = {name: int(sums[name]) for name in (*COUNTS, *TOKENS)}
    told["requests_per_s"] = _ratio(requests, covered_s)
    told["output_tokens_per_s"] = _ratio(sums["output_tokens"], covered_s)
    told["attainment"] = _ratio(kept, requests)
    told["burn"] = _ratio(requests - kept, allowed)
    return told


def _quantiles(seconds: Sequence[float], count: int) -> Figures | None:
    return {**dict(zip(QUANTILES, seconds, strict=True)), "count": count} if count else None


def gap_quantiles(counts: Ints, bounds: Floats) -> Floats:
    """Quantiles of gaps that were counted between these bounds, taken to lie evenly between them.

    A row for each row of counts. Gaps beyond the last bound are taken to be just there.
    """
    lower = np.concatenate([[0.0], bounds])
    upper = np.concatenate([bounds, bounds[-1:]])
    reached = counts.cumsum(axis=-1)
    wanted = np.maximum(counts.sum(-1, keepdims=True) * np.array(SHARES), 1e-9)
    place = (reached[:, None, :] < wanted[:, :, None]).sum(-1).clip(max=len(bounds))
    rows = np.arange(len(counts))[:, None]
    within = counts[rows, place]
    share = 1.0 - (reached[rows, place] - wanted) / np.maximum(within, 1)
    found: Floats = lower[place] + share * (upper[place] - lower[place])
    return found


class Engines:
    """What the engines say of themselves, by the same dimensions."""

    def __init__(self, workers: Iterable[WorkerState], by: Sequence[str]) -> None:
        """Taken down at once: workers change."""
        states = list(workers)
        self._all = _engines(states)
        self._groups: dict[Group, Figures] = {}
        if OF_WORKERS.issuperset(by):
            members: dict[Group, list[WorkerState]] = {}
            for state in states:
                of = of_worker(state.worker)
                members.setdefault(tuple(getattr(of, name) for name in by), []).append(state)
            self._groups = {group: _engines(found) for group, found in members.items()}

    def all_of_them(self, sums: Floats) -> Figures:
        """With what was counted of them."""
        return self._all | {"preemptions": int(sums[PREEMPTIONS])}

    def of(self, group: Group, sums: Floats) -> Figures | None:
        """None where engines cannot be told apart so."""
        found = self._groups.get(group)
        return found and found | {"preemptions": int(sums[PREEMPTIONS])}


def _engines(states: Sequence[WorkerState]) -> Figures:
    reports = [state.report for state in states if state.report is not None]
    used = [report.kv_used for report in reports if report.kv_used is not None]
    return {
        "workers": len(states),
        "healthy": sum(report.healthy for report in reports),
        "running": _sum([report.running for report in reports]),
        "waiting": _sum([report.waiting for report in reports]),
        "kv_used": sum(used) / len(used) if used else None,
    }


def _sum(told: Sequence[int | None]) -> int | None:
    known = [number for number in told if number is not None]
    return sum(known) if known else None


# Cost.


def costs(snapshot: Snapshot, by: Sequence[str], wanted: Callable[[Of], bool]) -> Figures:
    """Who has cost how much: all groups and what nobody took are what the workers cost."""
    spent = grouped(snapshot, by, lambda of: wanted(of) and not is_idle(of))
    idle = grouped(snapshot, (), lambda of: wanted(of) and is_idle(of))
    groups = [
        {"of": dict(zip(by, group, strict=True)), **_cost(sums)}
        for group, sums in zip(spent.groups, spent.sums.tolist(), strict=True)
        if any(sums)
    ]
    groups.sort(key=lambda told: -told["cost"])
    all_sums = spent.sums.sum(0) + idle.sums.sum(0)
    unallocated = dict(zip(SUMS, idle.sums.sum(0).tolist(), strict=True))
    return {
        "total": _cost(all_sums.tolist()),
        "unallocated": {name: unallocated[name] for name in ("cost", "worker_s")},
        "groups": groups,
    }


def batch_costs(batches: Iterable[tuple[str, str, Batch]], unix_at_0: float) -> Figures:
    """The same of each batch since its beginning, and how far it is."""
    groups = [
        {
            "of": {"batch": name, "tenant": tenant},
            **spent(batch.cost, batch.worker_s, batch.output_tokens, batch.kept_tokens),
            **{count: getattr(batch, count) for count in OF_A_BATCH},
            "first_seen": round(unix_at_0 + batch.first_at, 3),
            "last_seen": round(unix_at_0 + batch.last_at, 3),
        }
        for tenant, name, batch in batches
    ]
    return {"by": ["batch", "tenant"], "groups": groups}


def is_idle(of: Of) -> bool:
    """Does the cell hold what nobody took of a worker?"""
    return not (of.tier or of.tenant)


def _cost(told: Sequence[float]) -> Figures:
    sums = dict(zip(SUMS, told, strict=True))
    out, kept = sums["output_tokens"], sums["kept_tokens"]
    return spent(sums["cost"], sums["worker_s"], int(out), int(kept))


def spent(cost: float, worker_s: float, output_tokens: int, kept_tokens: int) -> Figures:
    """What that much output has cost."""
    return {
        "cost": cost,
        "worker_s": worker_s,
        "output_tokens": output_tokens,
        "kept_tokens": kept_tokens,
        "cost_per_million_tokens": _ratio(cost * MILLION, output_tokens),
        "cost_per_million_kept_tokens": _ratio(cost * MILLION, kept_tokens),
    }


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
