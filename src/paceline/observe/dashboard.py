"""How does the dashboard run beside the gateway, so that it never costs a token?

It is a process of its own. The gateway starts it, passes requests for it on, so that one port leads
to all that operators need, and ends it. Should the gateway be killed, the pipe to the dashboard
closes and it ends itself.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from time import monotonic

import aiohttp
import structlog
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from paceline.domain.errors import NotFound, Unavailable

PATIENCE_S = 8.0
"""With the dashboard, for one answer."""
RESTARTS, WITHIN_S = 5, 600.0
"""A dashboard that ends so often in so long is left alone."""
PAUSE_S = 1.0
"""Before it is started again."""
PASSED_ON = ("content-type", "content-encoding", "content-security-policy", "cache-control",
             "x-content-type-options", "referrer-policy")  # fmt: skip
"""Headers that come back from it."""

log = structlog.get_logger("paceline")


class Dashboard:
    """The process and the way to it. Owns both."""

    def __init__(self, wanted: bool) -> None:
        self._wanted = wanted
        self._session: aiohttp.ClientSession | None = None
        """While it is to run."""
        self.pid: int | None = None
        """While it does run."""

    def routes(self) -> list[Route]:
        return [Route("/", self.home), Route("/dashboard/{path:path}", self.passed_on)]

    async def home(self, request: Request) -> Response:
        """Leads to the dashboard, where there is one."""
        if not self._wanted:
            raise NotFound("there is no dashboard; `observe: {dashboard: true}` would start one")
        return RedirectResponse("dashboard/")

    async def passed_on(self, request: Request) -> Response:
        """The dashboard, made by a process of its own (`observe.dashboard`)."""
        if self._session is None:
            raise Unavailable("there is no dashboard, or not yet", retry_after_s=1.0)
        headers = {"accept-encoding": request.headers.get("accept-encoding", "identity")}
        path = "/" + request.path_params["path"]
        query = request.url.query
        url = f"{path}?{query}" if query else path
        try:
            async with self._session.get(url, headers=headers) as answer:
                body = await answer.read()
        except (aiohttp.ClientError, TimeoutError):
            raise Unavailable("the dashboard does not answer", retry_after_s=1.0) from None
        kept = {name: answer.headers[name] for name in PASSED_ON if name in answer.headers}
        return Response(body, answer.status, kept)

    async def run(self, admin: Callable[[], Awaitable[str]]) -> None:
        """Keep it running until cancelled. `admin` gives the URL that it asks."""
        if not self._wanted:
            return
        url = await admin()
        ends: deque[float] = deque(maxlen=RESTARTS)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            place = "http://127.0.0.1:{1}".format(*listener.getsockname())
            timeout = aiohttp.ClientTimeout(PATIENCE_S)
            async with aiohttp.ClientSession(
                place, timeout=timeout, auto_decompress=False
            ) as session:
                self._session = session
                log.info("dashboard", url=f"{url}/dashboard/")
                try:
                    while len(ends) < RESTARTS or monotonic() - ends[0] > WITHIN_S:
                        status = await self._once(url, listener)
                        ends.append(monotonic())
                        log.warning("the dashboard has ended", status=status)
                        await asyncio.sleep(PAUSE_S)
                    log.error("the dashboard ends again and again: no more of it", times=RESTARTS)
                finally:
                    self._session = None

    async def _once(self, admin: str, listener: socket.socket) -> int:
        """Run the process until it ends, or is no longer wanted; gives its exit status."""
        fd = listener.fileno()
        command = ("-m", "paceline.dashboard", "--admin", admin, "--fd", str(fd))
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable, *command, stdin=PIPE, stdout=DEVNULL, pass_fds=[fd],
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            log.warning("the dashboard did not start", because=str(error))
            return 1
        self.pid = process.pid
        try:
            return await process.wait()
        finally:
            self.pid = None
            await _ended(process)


async def _ended(process: Process) -> None:
    """It keeps nothing that is worth saving."""
    if process.returncode is None:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
