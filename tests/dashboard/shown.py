"""A dashboard over a fake gateway, for tests."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic, sleep

import aiohttp
import uvicorn
from fake_admin import FakeAdmin
from starlette.applications import Starlette

from paceline.dashboard.page import look, page
from paceline.dashboard.parts import View
from paceline.dashboard.server import dashboard_app
from paceline.dashboard.source import Source

NOW = 1_763_742_000.25


@contextmanager
def served(app: Starlette) -> Iterator[str]:
    """The URL of an application that a thread serves meanwhile."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", access_log=False))
    thread = threading.Thread(target=server.run)
    thread.start()
    give_up = monotonic() + 20
    while not server.started:
        assert monotonic() < give_up, "it does not start"
        sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def dashboard(fake: FakeAdmin) -> Iterator[str]:
    with served(fake.app()) as admin, served(dashboard_app(admin)) as shown:
        yield shown


def document(fake: FakeAdmin, view: View = View()) -> str:  # noqa: B008 (frozen)
    """The page over a fake gateway, at its time."""
    fake.now = lambda: NOW

    async def made(admin: str) -> str:
        async with aiohttp.ClientSession(admin) as session:
            return page(await look(Source(session), view), view, NOW)

    with served(fake.app()) as admin:
        return asyncio.run(made(admin))
