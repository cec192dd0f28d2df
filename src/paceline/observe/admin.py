"""What may operators ask of a running gateway? The admin API, on a listener of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import isfinite
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from paceline.domain.errors import InvalidRequest, NotFound, PacelineError
from paceline.kernel import Kernel
from paceline.kernel.timing import export, to_json
from paceline.kernel.worker import Accuracy, WorkerState
from paceline.observe.metrics import Metrics
from paceline.policy.steptime import Load

MAX_DECISIONS = 1000


def admin_app(
    kernel: Kernel,
    metrics: Metrics,
    decisions: Callable[[], Iterable[msgspec.Struct]],
    now: Callable[[], float],
    ready: Callable[[], bool],
) -> Starlette:
    """The admin application."""

    async def fleet(request: Request) -> Response:
        moment = now()
        models = {
            model: {"workers": [worker_view(w, moment) for w in pool.workers.values()]}
            for model, pool in kernel.pools.items()
        }
        held = kernel.held()
        body = {"policy": kernel.settings.policy, "ready": ready(), "held": held, "models": models}
        return _json(body)

    async def recent(request: Request) -> Response:
        text = request.query_params.get("limit", "100")
        if not text.isdecimal() or not 1 <= int(text) <= MAX_DECISIONS:
            raise InvalidRequest(f"limit must be a number from 1 to {MAX_DECISIONS}", param="limit")
        wanted = request.query_params.get("request_id")
        found = [msgspec.to_builtins(d) for d in decisions()]
        if wanted is not None:
            found = [d for d in found if d["command"]["request_id"] == wanted]
        return _json({"decisions": found[-int(text) :][::-1]})

    async def timing(request: Request) -> Response:
        return Response(to_json(export(kernel)), media_type="application/json")

    async def exposition(request: Request) -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def live(request: Request) -> Response:
        return _json({"status": "live"})

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, PacelineError)
        return Response(error.to_openai(), error.status, media_type="application/json")

    async def missing(request: Request, error: Exception) -> Response:
        return await refused(request, NotFound(f"{request.url.path} does not exist here"))

    return Starlette(
        routes=[
            Route("/metrics", exposition),
            Route("/health/live", live),
            Route("/paceline/v1/fleet", fleet),
            Route("/paceline/v1/decisions", recent),
            Route("/paceline/v1/timing", timing),
        ],
        exception_handlers={PacelineError: refused, 404: missing},
    )


def worker_view(state: WorkerState, now: float) -> dict[str, Any]:
    """One worker, for people and scripts. Seconds and tokens."""
    ledger, worker, report = state.ledger, state.worker, state.report
    load = Load(ledger.streams, 0.0, ledger.kv)
    return {
        **msgspec.to_builtins(worker),
        "usable": state.usable(now),
        "draining": state.draining,
        "ejected_for_s": max(state.ejected_until - now, 0.0)
        if isfinite(state.ejected_until)
        else 0,
        "report": msgspec.to_builtins(report),
        "in_flight": {
            "streams": ledger.streams,
            "arriving": len(ledger.entries) - ledger.streams,
            "uncached_tokens_ahead": round(ledger.ahead),
            "context_tokens": round(ledger.kv),
        },
        "timing": {
            **msgspec.to_builtins(state.timing.model()),
            "step_s": state.timing.expected_s(load),
            "prefill_budget": state.windows.budget,
            "overhead_s": state.windows.overhead_s,
            "prefill_tokens_per_s": state.prefill_rate(now),
        },
        "cache_trust": state.trust,
        "predictions": {"ttft": _accuracy(state.ttft), "itl": _accuracy(state.itl)},
    }


def _accuracy(accuracy: Accuracy) -> dict[str, float]:
    return {"count": accuracy.count, "error": accuracy.error, "bias": accuracy.bias}


def _json(body: object) -> Response:
    return Response(msgspec.json.encode(body), media_type="application/json")
