"""Does the dashboard run beside the gateway, and end with it?"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from time import monotonic
from typing import Any

import aiohttp
import pytest
import uvicorn
from starlette.applications import Starlette

from paceline.domain.errors import PacelineError
from paceline.observe import dashboard as beside
from paceline.observe.admin import _refused
from paceline.observe.dashboard import Dashboard

NOBODY = "http://127.0.0.1:9"
"""An admin listener that does not answer: the page says so, and is there all the same."""


async def nobody() -> str:
    return NOBODY


@asynccontextmanager
async def running(dashboard: Dashboard) -> AsyncIterator[aiohttp.ClientSession]:
    """The way to a dashboard that is kept running meanwhile."""
    app = Starlette(
        routes=dashboard.routes(),
        exception_handlers={PacelineError: _refused},
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off"))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        kept = asyncio.create_task(dashboard.run(nobody))
        url = "http://{}:{}".format(*listener.getsockname())
        try:
            async with aiohttp.ClientSession(url) as session:
                yield session
        finally:
            kept.cancel()
            await asyncio.gather(kept, return_exceptions=True)
            server.should_exit = True
            await serving


async def until(condition: Callable[[], object]) -> None:
    give_up = monotonic() + 30
    while not condition():
        assert monotonic() < give_up, "it never came"
        await asyncio.sleep(0.02)


async def page(session: aiohttp.ClientSession) -> tuple[int, str]:
    async with session.get("/dashboard/") as answer:
        return answer.status, await answer.text()


def played(play: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(play())


def alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_one_port_leads_to_all_of_it() -> None:
    async def play() -> None:
        dashboard = Dashboard(wanted=True)
        async with running(dashboard) as session:
            await until(lambda: dashboard.pid)
            async with session.get("/", allow_redirects=False) as answer:
                assert answer.headers["location"] == "dashboard/"
            status, text = await page(session)  # waits in the socket until it has started
            assert status == 200
            assert "The gateway does not answer" in text
            async with session.get("/dashboard/page.css") as answer:
                assert answer.headers["content-type"].startswith("text/css")
                assert "default-src 'none'" in answer.headers["content-security-policy"]
            async with session.get("/dashboard/nothing") as answer:
                assert answer.status == 404
            for asked, packed in (("gzip", "gzip"), ("identity", None)):
                headers = {"accept-encoding": asked}
                async with session.get("/dashboard/", headers=headers) as answer:
                    assert answer.headers.get("content-encoding") == packed
            plain = session.get("/dashboard/", skip_auto_headers=["accept-encoding"])
            async with plain as answer:
                assert "content-encoding" not in answer.headers

    played(play)


def test_a_dashboard_that_is_killed_comes_back() -> None:
    async def play() -> None:
        dashboard = Dashboard(wanted=True)
        async with running(dashboard) as session:
            await until(lambda: dashboard.pid)
            first = dashboard.pid
            assert first
            assert (await page(session))[0] == 200
            os.kill(first, signal.SIGKILL)
            await until(lambda: dashboard.pid not in (None, first))
            assert (await page(session))[0] == 200

    played(play)


def test_one_that_ends_again_and_again_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beside, "PAUSE_S", 0.0)
    monkeypatch.setattr(sys, "executable", "/bin/false")

    async def play() -> None:
        await asyncio.wait_for(Dashboard(wanted=True).run(nobody), 30)

    played(play)


def test_a_program_that_is_not_there_costs_the_gateway_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(beside, "PAUSE_S", 0.0)
    monkeypatch.setattr(sys, "executable", "/nowhere/python")

    async def play() -> None:
        await asyncio.wait_for(Dashboard(wanted=True).run(nobody), 30)

    played(play)


def test_it_ends_when_it_is_no_longer_wanted() -> None:
    seen: list[int] = []

    async def play() -> None:
        dashboard = Dashboard(wanted=True)
        async with running(dashboard):
            await until(lambda: dashboard.pid)
            seen.append(dashboard.pid or 0)

    played(play)
    assert not alive(seen[0])


def test_it_ends_itself_when_its_gateway_is_killed() -> None:
    parent = f"""
import asyncio
from paceline.observe.dashboard import Dashboard
async def main():
    dashboard = Dashboard(wanted=True)
    async def url():
        return {NOBODY!r}
    task = asyncio.create_task(dashboard.run(url))
    while not dashboard.pid:
        await asyncio.sleep(0.01)
    print(dashboard.pid, flush=True)
    await task
asyncio.run(main())
"""
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE) as gateway:
        assert gateway.stdout is not None
        while not (line := gateway.stdout.readline()).strip().isdigit():
            assert line
        pid = int(line)
        assert alive(pid)
        gateway.kill()
    asyncio.run(until(lambda: not alive(pid)))


def test_without_one_the_root_says_how_to_get_it() -> None:
    async def play() -> None:
        async with running(Dashboard(wanted=False)) as session:
            async with session.get("/") as answer:
                assert answer.status == 404
                assert "observe: {dashboard: true}" in await answer.text()
            assert (await page(session))[0] == 503

    played(play)
