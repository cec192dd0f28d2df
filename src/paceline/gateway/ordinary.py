"""What does Paceline answer clients itself? Health and the list of models, in OpenAI's shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from paceline.domain.errors import MethodNotAllowed, NotFound, PacelineError, Unavailable


def ordinary_app(
    names: Mapping[str, str], started_at: float, ready: Callable[[], bool]
) -> Starlette:
    """The application behind the relay.

    `names`: public names and aliases, with their models, as they are at the time of each request.
    """

    def model(name: str) -> dict[str, object]:
        owner = {"object": "model", "owned_by": "paceline", "created": int(started_at)}
        alias = {} if names[name] == name else {"alias_of": names[name]}
        return {"id": name, **owner, **alias}

    async def models(request: Request) -> Response:
        return _json({"object": "list", "data": [model(name) for name in names]})

    async def one_model(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in names:
            raise NotFound.model(name)
        return _json(model(name))

    async def live(request: Request) -> Response:
        return _json({"status": "live"})

    async def readiness(request: Request) -> Response:
        if not ready():
            raise Unavailable("a model has no usable worker, or the end is near", retry_after_s=1.0)
        return _json({"status": "ready"})

    async def refused(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            text = f"{request.method} {request.url.path} is not supported here"
            error = (MethodNotAllowed if error.status_code == 405 else NotFound)(text)
        assert isinstance(error, PacelineError)
        return Response(
            error.to_openai(), error.status, dict(error.headers()), media_type="application/json"
        )

    return Starlette(
        routes=[
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", one_model),
            Route("/health/live", live),
            Route("/health/ready", readiness),
        ],
        exception_handlers={PacelineError: refused, HTTPException: refused},
    )


def _json(body: object) -> Response:
    return Response(msgspec.json.encode(body), media_type="application/json")
