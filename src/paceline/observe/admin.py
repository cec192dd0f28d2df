"""What may operators ask of a running gateway? The admin API, on a listener of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from math import isfinite
from typing import Any, Protocol

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from paceline.domain.commands import Command
from paceline.domain.errors import (
    ConfigError,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    PacelineError,
    Unavailable,
)
from paceline.domain.gpu import Gpu
from paceline.kernel import Kernel
from paceline.kernel.timing import export, to_json
from paceline.kernel.worker import Accuracy, WorkerState
from paceline.observe.metrics import Metrics
from paceline.observe.room import Next, next_ones, room
from paceline.policy.pace import Slower
from paceline.policy.steptime import Load

MAX_DECISIONS = 1000


class Decided(Protocol):
    """A decision, with the Unix time at which it was taken."""

    @property
    def at(self) -> float: ...
    @property
    def command(self) -> Command: ...


class Operated(Protocol):
    """The gateway, as far as it takes orders. What it gives can be shown: nothing is secret.

    Orders that cannot be understood are a `ConfigError` and change nothing.
    """

    def ready(self) -> bool: ...
    def decisions(self) -> Iterable[Decided]: ...
    def settings(self) -> dict[str, Any]: ...
    def tiers(self) -> list[dict[str, Any]]: ...
    def tenants(self) -> list[dict[str, Any]]: ...
    async def reload(self) -> msgspec.Struct:
        """Read the configuration anew; gives what became of it."""
        ...

    def add(self, order: str) -> tuple[str, bool]:
        """Take on a worker; gives its id, and whether it is a new one."""
        ...

    def remove(self, worker_id: str, at_once: bool) -> None:
        """Let a worker go; `NotFound` if it is not there."""
        ...


def admin_app(
    kernel: Kernel,
    metrics: Metrics,
    operated: Operated,
    now: Callable[[], float],
    more: Iterable[Route] = (),
    gpus: Callable[[str], Sequence[Gpu]] = lambda worker_id: (),
    slower: Callable[[str], Slower | None] = lambda worker_id: None,
) -> Starlette:
    """The admin application, with `more` that it answers. Of a worker: `gpus`, what is known of
    its own, and `slower`, by how much it is slower than it should be."""

    async def fleet(request: Request) -> Response:
        coming = next_ones(kernel)
        models = {
            model: {"workers": await seen(list(pool.workers.values()), coming)}
            for model, pool in list(kernel.pools.items())
        }
        held = kernel.held()
        ready = operated.ready()
        body = {"policy": kernel.settings.policy, "ready": ready, "held": held, "models": models}
        return _json(body)

    async def workers(request: Request) -> Response:
        """The workers alone, each as `fleet` shows it."""
        return _json({"workers": await seen(list(kernel.workers.values()), next_ones(kernel))})

    async def seen(workers: list[WorkerState], coming: dict[str, Next]) -> list[dict[str, Any]]:
        """Between two workers the token streams go on."""
        views = []
        for worker in workers:
            known = {
                "slower": msgspec.to_builtins(slower(worker.worker.id)),
                "gpus_seen": msgspec.to_builtins(gpus(worker.worker.id)),
            }
            following = coming.get(worker.worker.model, Next())
            views.append(worker_view(worker, now(), following) | known)
            await asyncio.sleep(0)
        return views

    async def add_worker(request: Request) -> Response:
        """Add a worker, or change one: what a configuration says of it, and its `model`."""
        worker_id, new = operated.add(await _text(request))
        return _json({"id": worker_id, "new": new}, 201 if new else 200)

    async def remove_worker(request: Request) -> Response:
        """Let a worker go when its requests are done; `now=true`: they move, if they can."""
        worker_id, at_once = request.path_params["id"], _flag(request, "now")
        operated.remove(worker_id, at_once)
        left = kernel.workers.get(worker_id)
        in_flight = len(left.ledger.entries) if left is not None else 0
        return _json({"id": worker_id, "in_flight": in_flight}, 202 if in_flight else 200)

    async def tenants(request: Request) -> Response:
        """Tenants: tier, number of keys, limits, and how much of them is used."""
        return _json({"tenants": operated.tenants()})

    async def tiers(request: Request) -> Response:
        """Tiers and what they promise."""
        return _json({"tiers": operated.tiers()})

    async def config(request: Request) -> Response:
        """The configuration that runs, without its secrets."""
        return _json(operated.settings())

    async def reload(request: Request) -> Response:
        """Read the configuration anew; tells what changed and what needs a restart."""
        return _json(await operated.reload())

    async def recent(request: Request) -> Response:
        text = request.query_params.get("limit", "100")
        if not text.isdecimal() or not 1 <= int(text) <= MAX_DECISIONS:
            raise InvalidRequest(f"limit must be a number from 1 to {MAX_DECISIONS}", param="limit")
        wanted = request.query_params.get("request_id")
        found = list(operated.decisions())
        if wanted is not None:
            found = [d for d in found if d.command.request_id == wanted]
        return _json({"decisions": found[-int(text) :][::-1]})

    async def timing(request: Request) -> Response:
        return Response(to_json(export(kernel)), media_type="application/json")

    async def exposition(request: Request) -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def live(request: Request) -> Response:
        return _json({"status": "live"})

    async def readiness(request: Request) -> Response:
        if not operated.ready():
            raise Unavailable("a model has no usable worker, or the end is near", retry_after_s=1.0)
        return _json({"status": "ready"})

    return Starlette(
        routes=[
            Route("/metrics", exposition),
            Route("/health/live", live),
            Route("/health/ready", readiness),
            Route("/paceline/v1/fleet", fleet),
            Route("/paceline/v1/workers", workers),
            Route("/paceline/v1/workers", add_worker, methods=["POST"]),
            Route("/paceline/v1/workers/{id:path}", remove_worker, methods=["DELETE"]),
            Route("/paceline/v1/tenants", tenants),
            Route("/paceline/v1/tiers", tiers),
            Route("/paceline/v1/config", config),
            Route("/paceline/v1/config", reload, methods=["POST"]),
            Route("/paceline/v1/decisions", recent),
            Route("/paceline/v1/timing", timing),
            *more,
        ],
        exception_handlers={PacelineError: _refused, HTTPException: _refused},
    )


async def _refused(request: Request, error: Exception) -> Response:
    """An error in OpenAI's shape."""
    if isinstance(error, ConfigError):
        error = InvalidRequest(str(error), code=error.code)
    elif isinstance(error, HTTPException):
        told = f"{request.method} {request.url.path} does not exist here"
        error = (MethodNotAllowed if error.status_code == 405 else NotFound)(told)
    assert isinstance(error, PacelineError)
    headers = dict(error.headers())
    return Response(error.to_openai(), error.status, headers, media_type="application/json")


async def _text(request: Request) -> str:
    try:
        return (await request.body()).decode()
    except UnicodeDecodeError:
        raise InvalidRequest("the body is not text in UTF-8") from None


def _flag(request: Request, name: str) -> bool:
    text = request.query_params.get(name, "false")
    if text not in {"true", "false"}:
        raise InvalidRequest(f"{name} must be true or false", param=name)
    return text == "true"


def worker_view(state: WorkerState, now: float, following: Next) -> dict[str, Any]:
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
        "room": msgspec.to_builtins(room(state, now, following)),
        "cache_trust": state.trust,
        "predictions": {"ttft": _accuracy(state.ttft), "itl": _accuracy(state.itl)},
    }


def _accuracy(accuracy: Accuracy) -> dict[str, float]:
    return {"count": accuracy.count, "error": accuracy.error, "bias": accuracy.bias}


def _json(body: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(body), status, media_type="application/json")
