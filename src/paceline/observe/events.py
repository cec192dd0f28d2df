"""What happened in the last second? A stream of moments, for whoever wants to follow."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import suppress
from typing import Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from paceline.domain.errors import Unavailable
from paceline.kernel import Kernel
from paceline.observe.admin import Decided

EVERY_S = 1.0
MOST_LISTENERS = 16
MOST_TOLD = 50
"""Decisions that one moment tells in full; of the others it tells how many there were."""


class Followed(Protocol):
    """The gateway, as far as it is followed."""

    def ready(self) -> bool: ...
    def decisions(self) -> Iterable[Decided]: ...


def event_routes(
    kernel: Kernel, followed: Followed, wall: Callable[[], float], over: asyncio.Event
) -> list[Route]:
    """`/paceline/v1/events`, until the gateway is `over`. `wall` gives Unix time, as decisions have
    it."""
    listeners: set[object] = set()

    async def events(request: Request) -> Response:
        """Server-sent: each second readiness, who waits, decisions by kind and the newest of them.
        Who reads slowly gets fewer moments that span more."""
        if len(listeners) >= MOST_LISTENERS:
            raise Unavailable(f"{MOST_LISTENERS} already listen", retry_after_s=10.0)
        return StreamingResponse(moments(), media_type="text/event-stream")

    async def moments() -> AsyncIterator[bytes]:
        """Nothing is kept for a listener: it gets what is new when it is ready to read."""
        me, since = object(), wall()
        listeners.add(me)
        try:
            while not over.is_set():
                at = wall()
                new = [d for d in followed.decisions() if since <= d.at < at]
                since = at
                told = {
                    "at": at,
                    "ready": followed.ready(),
                    "held": kernel.held(),
                    "count": Counter(type(d.command).__name__ for d in new),
                    "decisions": new[-MOST_TOLD:],
                }
                yield b"data: " + msgspec.json.encode(told) + b"\n\n"
                with suppress(TimeoutError):
                    await asyncio.wait_for(over.wait(), EVERY_S)
        finally:
            listeners.discard(me)

    return [Route("/paceline/v1/events", events)]
