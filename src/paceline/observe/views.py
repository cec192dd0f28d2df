"""How is the fleet doing? What the admin API tells of what was counted."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from time import monotonic

import msgspec
import numpy as np
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from paceline.domain.errors import InvalidRequest
from paceline.kernel import Kernel
from paceline.observe.cluster import WINDOWS, Cluster, Of, of_worker, slot_s
from paceline.observe.sharing import exported
from paceline.observe.summary import (
    DIMENSIONS,
    OF_A_BATCH,
    Engines,
    Figures,
    batch_costs,
    costs,
    report,
)

COLUMNS = (
    "cost",
    "worker_s",
    "output_tokens",
    "kept_tokens",
    "cost_per_million_tokens",
    "cost_per_million_kept_tokens",
)
"""Of costs as CSV, after the dimensions that were asked by."""
BATCH_COLUMNS = (*COLUMNS, *OF_A_BATCH, "first_seen", "last_seen")
UNALLOCATED = "unallocated"


def cluster_routes(
    cluster: Cluster,
    kernel: Kernel,
    bounds: Sequence[float],
    wall: Callable[[], float],
    now: Callable[[], float] = monotonic,
) -> list[Route]:
    """`bounds`: of the gaps that the relay counts; `now`: on the clock of the cluster's looks."""
    edges = np.array(bounds)

    async def summary(request: Request) -> Response:
        """Requests, promises kept, burn and quantiles of the last `window` seconds (10, 60, 600 or
        3600), `by` model, tier, tenant, role, node, worker or several of them; any of these names
        narrows it to one value."""
        window_s, by, where = _asked(request, default="tier")
        told = {"at": wall(), "window_s": window_s, "covered_s": 0.0, "by": by}
        alone = [w for w in kernel.workers.values() if _is(of_worker(w.worker), where)]
        engines = None if "tier" in where or "tenant" in where else Engines(alone, by)

        def work() -> Figures:
            snapshot = cluster.snapshot(window_s)
            told["covered_s"] = snapshot.covered_s
            return told | report(snapshot, by, lambda of: _is(of, where), edges, engines)

        return _json(await cluster.aside(work))

    async def history(request: Request) -> Response:
        """The same for each part of the window, oldest first, with the counts of all gaps."""
        window_s, by, where = _asked(request, default="tier")
        now = wall()
        head = {"at": now, "window_s": window_s, "slot_s": slot_s(window_s), "by": by}

        def work() -> Figures:
            ago_s, parts = 0.0, []
            for slot, snapshot in reversed(cluster.history(window_s)):
                ago_s += slot.seconds
                told = report(snapshot, by, lambda of: _is(of, where), edges, gap_counts=True)
                parts.append({"from": now - ago_s, "seconds": slot.seconds, **told})
            return {**head, "gap_bounds_s": list(bounds), "slots": parts[::-1]}

        return _json(await cluster.aside(work))

    async def sketches(request: Request) -> Response:
        """All counts of the `window`, for several gateways' to be added up."""
        window_s, _, _ = _asked(request, default="")
        at = wall()
        return _json(await cluster.aside(lambda: exported(cluster.snapshot(window_s), at)))

    async def cost(request: Request) -> Response:
        """What the workers cost in the `window`, `by` whoever took their time; `by=batch`: what
        each batch has cost since its beginning, the last 200; `format=csv`."""
        at = wall()
        if "batch" in request.query_params.get("by", "").split(","):
            return batches(request, at)
        window_s, by, where = _asked(request, default="tenant", window="3600")

        def work() -> Figures:
            snapshot = cluster.snapshot(window_s)
            covered_s = snapshot.covered_s
            told = costs(snapshot, by, lambda of: _is(of, where))
            return {"at": at, "window_s": window_s, "covered_s": covered_s, "by": by, **told}

        return _table(request, await cluster.aside(work), COLUMNS)

    def batches(request: Request, at: float) -> Response:
        asked = request.query_params
        if asked["by"] != "batch":
            raise InvalidRequest("by batch goes alone: each is of one tenant", param="by")
        for name in ("window", *DIMENSIONS):
            if name in asked and name != "tenant":
                because = f"each batch is told as a whole: {name} cannot narrow it, tenant can"
                raise InvalidRequest(because, param=name)
        only, here = asked.get("tenant"), now()
        known = cluster.batches.newest(here)
        wanted = [each for each in known if only is None or each[0] == only]
        return _table(request, {"at": at, **batch_costs(wanted, at - here)}, BATCH_COLUMNS)

    return [
        Route("/paceline/v1/summary", summary),
        Route("/paceline/v1/history", history),
        Route("/paceline/v1/sketches", sketches),
        Route("/paceline/v1/cost", cost),
    ]


def _asked(
    request: Request, default: str, window: str = "60"
) -> tuple[int, list[str], dict[str, str]]:
    """Which window, by which dimensions, and what is wanted of them."""
    text = request.query_params.get("window", window)
    if text not in map(str, WINDOWS):
        raise InvalidRequest(
            f"window must be one of {', '.join(map(str, WINDOWS))}", param="window"
        )
    by = [name for name in request.query_params.get("by", default).split(",") if name]
    if unknown := [name for name in by if name not in DIMENSIONS]:
        known = ", ".join(DIMENSIONS)
        raise InvalidRequest(f"by {unknown[0]!r}: there are {known}", param="by")
    where = {
        name: request.query_params[name] for name in DIMENSIONS if name in request.query_params
    }
    return int(text), by, where


def _is(of: Of, where: Mapping[str, str]) -> bool:
    return all(getattr(of, name) == value for name, value in where.items())


def _table(request: Request, told: Figures, columns: Sequence[str]) -> Response:
    form = request.query_params.get("format", "json")
    if form not in {"json", "csv"}:
        raise InvalidRequest("format must be json or csv", param="format")
    if form == "json":
        return _json(told)
    return Response(as_csv(told, columns), media_type="text/csv")


def as_csv(told: Figures, columns: Sequence[str] = COLUMNS) -> str:
    """Costs as a table: a line for each group, and one for what nobody took."""
    out = io.StringIO()
    write = csv.writer(out).writerow
    by = told["by"]
    write([*by, *columns])
    for group in told["groups"]:
        write([*group["of"].values(), *(group[name] for name in columns)])
    if idle := told.get("unallocated"):
        write([*([UNALLOCATED] * len(by)), *(idle.get(name) for name in columns)])
    return out.getvalue()


def _json(body: object) -> Response:
    return Response(msgspec.json.encode(body), media_type="application/json")
