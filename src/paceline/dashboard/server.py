"""What does the dashboard's process answer? The page, its style and its script."""

from __future__ import annotations

import gzip
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files
from time import time

import aiohttp
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from paceline.dashboard.page import look, page
from paceline.dashboard.parts import View
from paceline.dashboard.source import Source

KINDS = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
HEADERS = {
    "cache-control": "no-cache",
    "content-security-policy": (
        "default-src 'none'; style-src 'self'; style-src-attr 'unsafe-inline'; script-src 'self'; "
        "img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'self'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
"""Nothing from elsewhere is loaded or run, whatever a model or a tenant is called."""
MOST_NAME = 300
"""Letters of what a query may name."""


def dashboard_app(admin: str) -> Starlette:
    """The application over the admin listener at `admin`."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with aiohttp.ClientSession(admin) as session:
            app.state.source = Source(session)
            yield

    return Starlette(
        routes=[Route("/", whole), Route("/{name}", still)],
        lifespan=lifespan,
    )


async def whole(request: Request) -> Response:
    """The page, made anew each time."""
    asked = request.query_params
    view = View(*(asked.get(name, "")[:MOST_NAME] for name in View.__struct_fields__))
    seen = await look(request.app.state.source, view)
    return _sent(request, page(seen, view, time()), "text/html")


async def still(request: Request) -> Response:
    """What stays as it is."""
    name = request.path_params["name"]
    kind = KINDS.get(name.rpartition(".")[2])
    found = files("paceline.dashboard").joinpath(name)
    if kind is None or not found.is_file():
        return Response("There is nothing here.", 404, media_type="text/plain")
    return _sent(request, found.read_text("utf-8"), kind)


def _sent(request: Request, text: str, kind: str) -> Response:
    """Packed here, so that the gateway, which passes it on, has little to carry."""
    body, headers = text.encode(), dict(HEADERS)
    if "gzip" in request.headers.get("accept-encoding", ""):
        body = gzip.compress(body, 4)
        headers["content-encoding"] = "gzip"
    return Response(body, headers=headers, media_type=kind)
